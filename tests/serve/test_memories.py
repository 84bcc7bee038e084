"""Memories over the wire: learned, forked, forgotten, rolled back, taken along."""

import dataclasses

import pytest
from served import LIMITS, TEXT, Bytes, client, ended, events, learned, says, stacked

from nestlearn import Session

KINDS = ("stacked", "hope")


@pytest.fixture(params=KINDS)
def asks(request, tmp_path):
    with client(tmp_path, request.param) as asks:
        yield asks


@pytest.mark.parametrize("asks", ["stacked"], indirect=True)
def test_a_memory_is_made_and_deleted(asks):
    made = asks.post("/v1/memories", json={"name": "mine"}).json()
    assert (made["id"], made["position"], made["points"]) == ("mine", 0, [])
    assert asks.post("/v1/memories", json={"name": "mine"}).status_code == 409
    assert [m["id"] for m in asks.get("/v1/memories").json()["data"]] == ["mine"]
    assert asks.delete("/v1/memories/mine").json()["deleted"]
    assert asks.get("/v1/memories/mine").status_code == 404
    assert asks.get("/v1/memories").json()["data"] == []


def test_learning_tells_how_far_it_is(asks):
    asks.post("/v1/memories", json={"name": "mine"})
    body = {"text": TEXT, "source": "note", "stream": True}
    told = events(asks.post("/v1/memories/mine/learn", json=body))
    assert [told[0]["event"], told[1]["event"], told[-1]["event"]] == ["job", "begin", "done"]
    pieces = [each for each in told if each["event"] == "piece"]
    assert len(pieces) >= 8  # of a text of one piece, too
    assert "".join("".join(piece["words"]) for piece in pieces) == TEXT
    assert pieces[-1]["tokens"] == len(TEXT)
    surprise = [x for piece in pieces for x in piece["surprise"]]
    assert surprise[0] is None
    assert all(x > 0 for x in surprise[1:])
    assert sum(level["moved"] for piece in pieces for level in piece["levels"]) > 0
    assert any(level["norm"] > 0 for level in pieces[-1]["levels"])
    about = asks.get("/v1/memories/mine").json()
    last = about["history"][-1]
    assert (last["what"], last["source"], last["tokens"]) == ("learn", "note", len(TEXT))
    assert about["position"] == len(TEXT)
    job = asks.get(f"/v1/jobs/{told[0]['id']}?after=3").json()
    assert (job["state"], job["events"][0]["n"]) == ("done", 3)
    again = events(asks.get(f"/v1/jobs/{told[0]['id']}/events?after={job['events'][-1]['n']}"))
    assert [each["event"] for each in again] == ["job", "done"]
    assert [each["id"] for each in asks.get("/v1/jobs").json()["data"]] == [told[0]["id"]]


def test_what_is_learned_is_what_a_session_learns(tmp_path):
    """Read in pieces, and saved after each, it is the same memory."""
    with client(tmp_path) as asks:
        learned(asks, "mine")
    once = Session(stacked(), None, Bytes())
    once.learn(TEXT)
    there = Session(stacked(), tmp_path / "mine", Bytes())
    assert all(d.distance <= 1e-5 * d.norm for d in once.diff(there))
    assert there.memory.position == once.memory.position


def test_a_fork_goes_its_own_way(asks):
    learned(asks, "mine")
    made = asks.post("/v1/memories/mine/fork", json={"to": "twin"})
    assert made.status_code == 201
    assert made.json()["history"][-1]["source"] == "mine"
    before = says(asks, memory="mine")
    assert says(asks, memory="twin") == before
    learned(asks, "twin", "zebras and quartz. " * 4)
    assert says(asks, memory="twin") != before
    assert says(asks, memory="mine") == before
    assert asks.post("/v1/memories/mine/fork", json={"to": "twin"}).status_code == 409


def test_a_memory_is_rolled_back_and_forward(asks):
    learned(asks, "mine")
    first = says(asks, memory="mine")
    learned(asks, "mine", "zebras and quartz. " * 4)
    second = says(asks, memory="mine")
    points = asks.get("/v1/memories/mine").json()["points"]
    assert [(p["what"], p["position"]) for p in points] == [("create", 0), ("learn", len(TEXT))]
    back = asks.post("/v1/memories/mine/rollback", json={"point": points[1]["point"]}).json()
    assert back["history"][-1] == {"what": "rollback", "to": 2, "time": back["history"][-1]["time"]}
    assert says(asks, memory="mine") == first
    newest = back["points"][-1]["point"]  # what it was until then
    asks.post("/v1/memories/mine/rollback", json={"point": newest})
    assert says(asks, memory="mine") == second
    gone = asks.post("/v1/memories/mine/rollback", json={"point": 99})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "point_not_found")


@pytest.mark.parametrize("asks", ["stacked"], indirect=True)
def test_forgetting_can_be_rolled_back(asks):
    learned(asks, "mine")
    known, bare = says(asks, memory="mine"), says(asks)
    about = asks.post("/v1/memories/mine/reset").json()
    assert about["position"] == 0
    assert says(asks, memory="mine") == bare
    asks.post("/v1/memories/mine/rollback", json={"point": about["points"][-1]["point"]})
    assert says(asks, memory="mine") == known


def test_one_level_is_forgotten(tmp_path):
    with client(tmp_path) as asks:
        learned(asks, "mine")
        about = asks.post("/v1/memories/mine/reset", json={"level": 0})
        assert about.json()["position"] == len(TEXT)
        wrong = asks.post("/v1/memories/mine/reset", json={"level": 7})
        assert (wrong.status_code, "levels 0 to 1" in wrong.text) == (400, True)


def test_a_memory_is_taken_along(asks):
    learned(asks, "mine")
    known = says(asks, memory="mine")
    file = asks.get("/v1/memories/mine/file")
    assert "mine.safetensors" in file.headers["content-disposition"]
    assert asks.put("/v1/memories/other/file", content=file.content).status_code == 201
    assert says(asks, memory="other") == known
    assert asks.get("/v1/memories/other").json()["history"][-1]["what"] == "upload"
    assert asks.put("/v1/memories/other/file", content=file.content).status_code == 409
    asks.post("/v1/memories/other/reset")
    put = asks.put("/v1/memories/other/file?replace=true", content=file.content)
    assert (put.status_code, says(asks, memory="other")) == (200, known)


def test_points_are_few_and_cost_nothing(tmp_path):
    with client(tmp_path, limits=dataclasses.replace(LIMITS, points=2)) as asks:
        for n in range(4):
            learned(asks, "mine", f"{n} " * 9)
        points = asks.get("/v1/memories/mine").json()["points"]
    assert [p["point"] for p in points] == [3, 4]
    one = tmp_path / "mine" / "points" / "000004" / "memory.json"
    assert one.is_file()
    assert all(p.name.startswith(("memory", "tensors")) for p in one.parent.iterdir())


def test_the_commands_know_the_servers_memories(tmp_path, call, monkeypatch):
    from nestlearn.hf.folder import save_stack

    save_stack(stacked(), tmp_path / "stack")
    with client(tmp_path / "stack" / "memories") as asks:
        learned(asks, "mine")
    code, out, _ = call("memory", "show", tmp_path / "stack", "mine")
    assert (code, f"{len(TEXT)} tokens" in out) == (0, True)


@pytest.mark.parametrize("asks", ["stacked"], indirect=True)
def test_a_surprise_is_measured_with_and_without(asks):
    learned(asks, "mine")
    told = asks.post("/v1/memories/mine/surprise", json={"text": "The key is ümlaut"}).json()
    assert "".join(told["words"]) == "The key is ümlaut"
    assert len(told["with"]) == len(told["without"]) == len(told["words"])
    assert told["with"][1:] != told["without"][1:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_is_stopped_and_keeps_what_it_has(tmp_path, kind):
    limits = dataclasses.replace(LIMITS, save_seconds=0)  # saved after each piece
    with client(tmp_path, kind, limits) as asks:
        stop(asks, TEXT * 60)


def stop(asks, long):
    asks.post("/v1/memories", json={"name": "mine"})
    job = asks.post("/v1/memories/mine/learn", json={"text": long}).json()["id"]
    busy = asks.post("/v1/memories/mine/reset")
    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "memory_busy")
    assert asks.delete("/v1/memories/mine").status_code == 409
    while not any(e["event"] == "saved" for e in asks.get(f"/v1/jobs/{job}").json()["events"]):
        pass
    assert asks.delete(f"/v1/jobs/{job}").status_code == 200
    told = ended(asks, job)
    assert told["state"] == "stopped"
    position = asks.get("/v1/memories/mine").json()["position"]
    assert 0 < position < len(long)
    assert position == [e for e in told["events"] if e["event"] == "saved"][-1]["position"]
    assert asks.post("/v1/memories/mine/reset").status_code == 200


def test_studying_needs_a_model_that_follows_instructions(asks):
    asks.post("/v1/memories", json={"name": "mine"})
    refused = asks.post("/v1/memories/mine/study", json={"text": TEXT})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported")
