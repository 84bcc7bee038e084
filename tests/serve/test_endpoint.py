"""OpenAI's endpoints: answers, streams, usage, which memory answers."""

import pytest
from served import LIMITS, TEXT, client, events, learned, says

KINDS = ("stacked", "hope")
TALK = {"messages": [{"role": "user", "content": "Where is the key?"}], "max_tokens": 6}


@pytest.fixture(scope="module", params=KINDS)
def asks(request, tmp_path_factory):
    with client(tmp_path_factory.mktemp("memories"), request.param) as asks:
        learned(asks, "mine")
        yield asks


def test_the_model_and_its_memories_are_models(asks):
    names = [each["id"] for each in asks.get("/v1/models").json()["data"]]
    assert names == ["tiny", "tiny:mine"]


def test_a_chat_is_answered(asks):
    made = asks.post("/v1/chat/completions", json={"model": "tiny", **TALK})
    told = made.json()
    assert made.status_code == 200, told
    assert told["object"] == "chat.completion"
    assert told["choices"][0]["message"]["role"] == "assistant"
    assert told["choices"][0]["finish_reason"] == "length"
    read = told["usage"]["prompt_tokens"]
    assert told["usage"] == {
        "prompt_tokens": read, "completion_tokens": 6, "total_tokens": read + 6
    }  # fmt: skip
    assert made.headers["content-security-policy"].startswith("default-src 'none'")


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_stream_says_the_same(asks, path):
    what = TALK if path.startswith("chat") else {"prompt": "The key", "max_tokens": 6}
    body = {"model": "tiny:mine", "seed": 3, "temperature": 0.8, "top_p": 0.9, **what}
    whole = asks.post(f"/v1/{path}", json=body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    parts = events(asks.post(f"/v1/{path}", json={**body, **options}))
    choices = [part["choices"][0] for part in parts if part["choices"]]
    if path == "completions":
        assert "".join(c["text"] for c in choices) == whole["choices"][0]["text"]
    else:
        text = "".join(c["delta"].get("content", "") for c in choices)
        assert text == whole["choices"][0]["message"]["content"]
        assert choices[0]["delta"]["role"] == "assistant"
        assert parts[0]["object"] == "chat.completion.chunk"
    assert choices[-1]["finish_reason"] == "length"
    assert parts[-1]["usage"] == whole["usage"]
    assert len({part["id"] for part in parts}) == 1


def test_a_memory_is_named_in_the_model_or_beside_it(asks):
    bare, named = says(asks), says(asks, model="tiny:mine")
    assert named != bare
    assert says(asks, memory="mine") == named
    assert says(asks, memory=None) == bare
    for body in ({"model": "tiny:other"}, {"model": "tiny", "memory": "other"}):
        refused = asks.post("/v1/completions", json={"prompt": "a", **body})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "memory_not_found")
    both = asks.post("/v1/completions", json={"prompt": "a", "model": "tiny:a", "memory": "b"})
    assert both.status_code == 400


def test_a_stop_ends_an_answer_before_it(asks):
    said = says(asks, tokens=20)
    stop = said[5:7]
    assert says(asks, tokens=20, stop=stop) == said[: said.index(stop)]
    assert says(asks, tokens=20, stop=["not in it", stop]) == said[: said.index(stop)]
    assert says(asks, prompt=list(b"The key"), tokens=20) == said


def test_the_same_seed_says_the_same(asks):
    options = {"temperature": 1.3, "tokens": 12}
    assert says(asks, seed=5, **options) == says(asks, seed=5, **options)
    assert says(asks, seed=5, **options) != says(asks, seed=6, **options)


def test_answering_changes_no_memory(asks):
    before = asks.get("/v1/memories/mine").json()
    says(asks, model="tiny:mine")
    asks.post("/v1/chat/completions", json={"model": "tiny:mine", **TALK})
    assert asks.get("/v1/memories/mine").json() == before


@pytest.mark.parametrize("stream", [False, True])
def test_a_talk_may_be_learned(asks, stream):
    asks.post("/v1/memories", json={"name": f"talk{stream}"})
    body = {**TALK, "memory": f"talk{stream}", "learn": "both", "stream": stream}
    made = asks.post("/v1/chat/completions", json=body)
    told = events(made)[-1] if stream else made.json()
    about = asks.get(f"/v1/memories/talk{stream}").json()
    assert about["position"] == told["learned"]["tokens"] > 6
    assert about["history"][-1]["source"] == "chat"


def test_of_a_talk_one_side_may_be_learned(tmp_path):
    with client(tmp_path) as asks:
        for side in ("user", "assistant"):
            asks.post("/v1/memories", json={"name": side})
            body = {**TALK, "memory": side, "learn": side, "temperature": 0}
            assert "tokens" in asks.post("/v1/chat/completions", json=body).json()["learned"]
        assert says(asks, memory="user") != says(asks, memory="assistant")
    with client(tmp_path / "hope", "hope") as asks:
        asks.post("/v1/memories", json={"name": "a"})
        body = {**TALK, "memory": "a", "learn": "user"}
        assert "say 'both'" in asks.post("/v1/chat/completions", json=body).text


def test_a_talk_of_parts_is_one_of_texts(asks):
    parts = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "the key?"}]
    body = {"temperature": 0, "max_tokens": 6}
    answers = [
        asks.post("/v1/chat/completions", json={**body, "messages": [{**said, "role": "user"}]})
        for said in ({"content": parts}, {"content": "Where is the key?"})
    ]
    one, two = (answer.json()["choices"][0]["message"]["content"] for answer in answers)
    assert one == two


def test_what_the_server_says_is_what_a_session_says(tmp_path):
    """With full deltas to the token; the server adds nothing to the model."""
    from served import Bytes, stacked

    from nestlearn import Session

    with client(tmp_path) as asks:
        learned(asks, "mine")
        said = says(asks, model="tiny:mine", tokens=20)
    session = Session(stacked(), tmp_path / "mine", Bytes(), read_only=True)
    assert session.generate("The key", max_new_tokens=20, do_sample=False, pad_token_id=0) == said
    once = Session(stacked(), None, Bytes())
    once.learn(TEXT)
    assert once.generate("The key", max_new_tokens=20, do_sample=False, pad_token_id=0) == said


def test_the_page_asks_no_other_host(asks):
    import re

    for path in ("/", "/page.css", "/page.js", "/curves.js"):
        file = asks.get(path)
        assert file.status_code == 200
        found = re.findall(r"https?://[^\s\"']+", file.text)
        assert set(found) <= {"http://www.w3.org/2000/svg"}
        assert "style=" not in file.text
        assert "innerHTML" not in file.text
    assert asks.get("/health").json() == {"ok": True}
    assert asks.get("/v1/about").json()["limits"]["tokens"] == LIMITS.tokens
