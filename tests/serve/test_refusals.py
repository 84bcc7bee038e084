"""What is refused, in which words, and that nothing has changed then."""

import dataclasses
import json
import os

import pytest
from served import LIMITS, TEXT, TOKENS, as_user, client, learned, says

from nestlearn.serve import Limits
from nestlearn.serve.users import check_host, read_tokens

NAMES = (
    "..",
    ".",
    ".hidden",
    "a/b",
    "..%2f..%2fetc",
    "a\\b",
    "",
    "x" * 65,
    "a b",
    "a.b",
    "é",
    "-a",
)
CHAT, TEXTS = "/v1/chat/completions", "/v1/completions"
SAID = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("memories")


@pytest.fixture(scope="module")
def asks(place):
    with client(place, limits=dataclasses.replace(LIMITS, tokens=64, text=500)) as asks:
        learned(asks, "mine")
        yield asks


def refused(response, status, *words):
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error
    return error


# ------------------------------------------------------------------------------------ requests


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b'"a"', b"\xff\xfe", b"[" * 9000, b"nul"])
def test_what_is_no_json_object(asks, body):
    made = asks.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    refused(made, 400)


def test_another_content_type(asks):
    refused(asks.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"}), 415, "JSON")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", None), ("messages", []), ("messages", "hi"), ("messages", [1]),
        ("messages", [{"role": "wizard", "content": "a"}]), ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": 3}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}]),
        ("messages", [{"role": "user", "content": "\ud800"}]),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", "9"),
        ("max_tokens", True), ("max_tokens", 10**30), ("temperature", -1), ("temperature", "hot"),
        ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0), ("top_p", 2),
        ("stop", 3), ("stop", [""]), ("stop", [1]), ("stop", ["a"] * 9), ("seed", 1.5),
        ("n", 2), ("logprobs", True), ("tools", [{}]), ("stream", "yes"), ("model", 3),
        ("memory", 3), ("stream_options", 1), ("learn", "everything"), ("learn", "user"),
        ("logit_bias", {"1": 5}), ("response_format", {"type": "json_object"}),
    ],
)  # fmt: skip
def test_a_field_of_another_kind(asks, field, value):
    body = {"model": "tiny", "messages": SAID, field: value}
    made = asks.post(CHAT, content=json.dumps(body), headers={"Content-Type": "application/json"})
    refused(made, 400)
    assert made.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", [None, "", [], [1, "a"], [256], [-1], [True], 7, ["a", "b"]])
def test_a_prompt_of_another_kind(asks, prompt):
    refused(asks.post(TEXTS, json={"prompt": prompt}), 400)


def test_another_model_and_another_path(asks):
    error = refused(asks.post(CHAT, json={"model": "gpt-9", "messages": SAID}), 404, "gpt-9")
    assert error["code"] == "model_not_found"
    refused(asks.get("/v1/nothing"), 404)
    refused(asks.get(CHAT), 405)


def test_too_many_tokens(asks):
    body = {"prompt": "a" * 60, "max_tokens": 5}
    error = refused(asks.post(TEXTS, json=body), 400, "more than 64")
    assert error["code"] == "context_length_exceeded"
    assert asks.post(TEXTS, json={"prompt": "a" * 60}).json()["usage"]["completion_tokens"] == 4
    refused(asks.post("/v1/memories/mine/learn", json={"text": "a" * 501}), 400, "501 tokens")
    refused(asks.post("/v1/memories/mine/learn", json={"text": "a"}), 400, "two tokens")
    refused(asks.post("/v1/memories/mine/learn", json={"text": ""}), 400)


def test_more_tokens_than_positions(tmp_path):
    with client(tmp_path, positions=64) as asks:
        refused(asks.post(TEXTS, json={"prompt": "a" * 60, "max_tokens": 5}), 400, "more than 64")


def test_a_body_that_is_too_large(tmp_path):
    with client(tmp_path, limits=dataclasses.replace(LIMITS, body=2000, upload=3000)) as asks:
        body = {"prompt": "a" * 3000}
        assert refused(asks.post(TEXTS, json=body), 413)["code"] == "too_large"

        def parts():
            for _ in range(40):
                yield b"x" * 100

        refused(
            asks.post(TEXTS, content=parts(), headers={"Content-Type": "application/json"}), 413
        )
        refused(asks.put("/v1/memories/a/file", content=parts()), 413)
        assert says(asks, tokens=2)
    assert not list(tmp_path.iterdir())


def test_too_many_requests(tmp_path):
    with client(tmp_path, limits=Limits(requests=3)) as asks:
        for _ in range(3):
            assert asks.get("/v1/models").status_code == 200
        late = asks.get("/v1/models")
        refused(late, 429, "3 requests a minute")
        assert 0 < int(late.headers["retry-after"]) <= 61


def test_too_many_memories_and_jobs(tmp_path):
    limits = dataclasses.replace(LIMITS, memories=2, jobs=1)
    with client(tmp_path, limits=limits) as asks:
        for name in "ab":
            asks.post("/v1/memories", json={"name": name})
        refused(asks.post("/v1/memories", json={"name": "c"}), 409, "2 memories")
        begun = asks.post("/v1/memories/a/learn", json={"text": TEXT * 20})
        refused(asks.post("/v1/memories/b/learn", json={"text": TEXT}), 429, "jobs")
        asks.delete(f"/v1/jobs/{begun.json()['id']}")


def test_a_request_that_takes_too_long(tmp_path):
    with client(tmp_path, limits=dataclasses.replace(LIMITS, seconds=0.2)) as asks:

        def slow():
            import time

            yield b"{"
            time.sleep(0.5)
            yield b"}"

        made = asks.post(CHAT, content=slow(), headers={"Content-Type": "application/json"})
        refused(made, 408)


# --------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_none(asks, place, name):
    before = sorted(place.rglob("*"))
    refused(asks.post("/v1/memories", json={"name": name}), 400)
    refused(asks.post("/v1/memories/mine/fork", json={"to": name}), 400)
    body = {"prompt": "a", "memory": name}
    assert asks.post(TEXTS, json=body).status_code in (400, 404)
    assert asks.post(TEXTS, json={"prompt": "a", "model": f"tiny:{name}x/.."}).status_code == 400
    for verb, path in (
        ("GET", ""), ("DELETE", ""), ("POST", "/reset"), ("POST", "/rollback"), ("GET", "/file"),
        ("PUT", "/file"), ("POST", "/learn"), ("POST", "/study"), ("POST", "/surprise"),
    ):  # fmt: skip
        quoted = name.replace("/", "%2F").replace("\\", "%5C").replace(".", "%2E")
        body = {"text": TEXT, "point": 1}
        kind = {"content": b"x"} if verb == "PUT" else {"json": body}
        made = asks.request(
            verb, f"/v1/memories/{quoted}{path}", **({} if verb in ("GET", "DELETE") else kind)
        )
        assert made.status_code in (400, 404, 405), (verb, path, made.text)
    assert sorted(place.rglob("*")) == before


def test_a_point_is_a_number(asks):
    for point in ("../../x", "1", 0, -1, 1.5, None, 10**7):
        refused(asks.post("/v1/memories/mine/rollback", json={"point": point}), 400)
    refused(asks.get("/v1/jobs/..%2f..%2fx"), 404)
    refused(asks.get("/v1/jobs/job-0?after=x"), 404)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_static_files_are_four(asks):
    for path in ("/../app.py", "/%2e%2e/app.py", "/app.py", "/page/index.html"):
        assert asks.get(path).status_code == 404


# --------------------------------------------------------------------------------------- files


def test_a_file_that_is_no_memory(asks, place, tmp_path):
    import torch
    from safetensors.torch import save

    good = asks.get("/v1/memories/mine/file").content
    size = int.from_bytes(good[:8], "little")
    altered = bytearray(good)
    altered[-3] ^= 1
    header = json.loads(good[8 : 8 + size])
    header["__metadata__"]["nestlearn-memory"] = header["__metadata__"]["nestlearn-memory"].replace(
        '"position": ', '"position": 9'
    )
    other = json.dumps(header).encode()
    bad = [
        b"", b"x", good[:-1], good[: len(good) // 2], good + b"x", bytes(altered),
        b"\x80\x04\x95pickle.", (2**60).to_bytes(8, "little") + b"{}", save({"a": torch.ones(2)}),
        save({"a": torch.ones(2)}, {"nestlearn-memory": "{}"}),
        save({"a": torch.ones(2)}, {"nestlearn-memory": "["}),
        len(other).to_bytes(8, "little") + other + good[8 + size :],
    ]  # fmt: skip
    before = sorted(place.rglob("*"))
    known = says(asks, memory="mine", tokens=4)
    for content in bad:
        error = refused(asks.put("/v1/memories/new/file", content=content), 400)
        assert error["code"] == "invalid_file"
        assert str(place) not in error["message"]
        put = asks.put("/v1/memories/mine/file?replace=true", content=content)
        refused(put, 400)
    assert sorted(place.rglob("*")) == before
    assert says(asks, memory="mine", tokens=4) == known


@pytest.mark.parametrize("kind", ["stacked", "hope"])
def test_a_file_of_another_model(tmp_path, kind):
    with client(tmp_path / "a", kind) as asks:
        learned(asks, "mine")
        file = asks.get("/v1/memories/mine/file").content
    with client(tmp_path / "b", kind, seed=1) as asks:
        refused(asks.put("/v1/memories/mine/file", content=file), 400, "another")
        cut = asks.put("/v1/memories/mine/file", content=file[: len(file) // 2])
        refused(cut, 400)
        assert asks.get("/v1/memories").json()["data"] == []


@pytest.mark.parametrize("kind", ["stacked", "hope"])
def test_a_memory_that_was_damaged(tmp_path, kind):
    with client(tmp_path, kind) as asks:
        learned(asks, "mine")
        for path in (tmp_path / "mine").glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-9])
        for path in (tmp_path / "mine").glob("*.json"):
            os.utime(path)  # as a disk that is mounted anew
        error = refused(asks.post(TEXTS, json={"prompt": "a", "memory": "mine"}), 409, "damaged")
        assert str(tmp_path) not in error["message"]
        assert says(asks, tokens=2)


# --------------------------------------------------------------------------------------- users


def test_users_do_not_see_each_other(tmp_path):
    import hashlib

    tokens = {hashlib.sha256(t.encode()).hexdigest(): name for name, t in TOKENS.items()}
    with client(tmp_path, tokens=tokens) as asks:
        alice, bob = as_user("alice"), as_user("bob")
        job = learned(asks, "mine", headers=alice)
        assert (tmp_path / "alice" / "mine" / "memory.json").is_file()
        assert asks.get("/v1/memories", headers=bob).json()["data"] == []
        for verb, path, body in (
            ("GET", "/v1/memories/{}", None), ("DELETE", "/v1/memories/{}", None),
            ("GET", "/v1/memories/{}/file", None), ("POST", "/v1/memories/{}/reset", {}),
            ("POST", "/v1/memories/{}/rollback", {"point": 1}),
            ("POST", "/v1/memories/{}/fork", {"to": "x"}),
            ("POST", "/v1/memories/{}/learn", {"text": TEXT}),
            ("POST", "/v1/memories/{}/surprise", {"text": TEXT}),
            ("POST", TEXTS, {"prompt": "a", "memory": "{}"}),
        ):  # fmt: skip
            made = []
            for name in ("mine", "none"):  # another's is as one that is not there
                filled = json.loads(json.dumps(body).replace("{}", name)) if body else body
                told = asks.request(verb, path.format(name), json=filled, headers=bob)
                made.append((told.status_code, told.text.replace(name, "NAME")))
            assert made[0] == made[1]
            assert made[0][0] == 404
        assert asks.get(f"/v1/jobs/{job['id']}", headers=bob).status_code == 404
        assert asks.get(f"/v1/jobs/{job['id']}", headers=alice).status_code == 200
        for wrong in ({}, {"Authorization": "Bearer nobody"}, {"Authorization": "Bearer"},
                      {"Authorization": f"Basic {TOKENS['bob']}"}):  # fmt: skip
            assert refused(asks.get("/v1/models", headers=wrong), 401)["code"] == "invalid_api_key"
        assert asks.get("/").status_code == 200  # the page asks for the token


def test_a_page_elsewhere_cannot_ask(asks):
    refused(asks.get("/v1/models", headers={"Origin": "http://evil.example"}), 403)
    refused(asks.get("/v1/models", headers={"Host": "evil.example"}), 421)
    own = str(asks.base_url).rstrip("/")
    assert asks.get("/v1/models", headers={"Origin": own}).status_code == 200
    assert asks.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200


def test_tokens_are_lines(tmp_path):
    import hashlib

    path = tmp_path / "tokens"
    secret = hashlib.sha256(b"bob-has-another-token").hexdigest()
    path.write_text(f"# ours\nalice alice-has-a-long-token\n\nbob sha256:{secret}  # hashed\n")
    found = read_tokens(path)
    assert (sorted(found.values()), found[secret]) == (["alice", "bob"], "bob")
    for text, words in (
        ("alice", "line 1: give a user's name"), ("../a alice-has-a-long-token", "line 1"),
        ("a short", "at least 16"), ("a sha256:12", "64 hexadecimal"), ("", "holds no token"),
        ("a the-same-long-token-1\nb the-same-long-token-1", "line 2: this is a's token"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_tokens(path)


def test_others_are_served_with_tokens_only(tmp_path, call):
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ValueError, match="give --tokens FILE"):
            check_host(host, None)
        check_host(host, {"x": "a"})
    for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        check_host(host, None)
    code, _, said = call("serve", tmp_path, "--host", "0.0.0.0")
    assert (code, "give --tokens FILE" in said) == (2, True)
    code, _, said = call("serve", tmp_path / "none")
    assert code == 2
    code, _, said = call("serve", tmp_path)
    assert (code, "no model in" in said) == (2, True)


def test_the_extra_is_named_where_it_is_missing(call, tmp_path, monkeypatch):
    from nestlearn.cli import serving

    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    code, _, said = call("serve", tmp_path)
    assert (code, 'pip install "nestlearn[serve]"' in said) == (2, True)


def test_limits_are_positive():
    with pytest.raises(ValueError, match="tokens=0"):
        Limits(tokens=0)
    assert Limits(save_seconds=0).save_seconds == 0
