"""Answers in turns: fair, apart bit for bit, and never held up by one who does not read."""

import asyncio
import hashlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from served import TEXT, TOKENS, as_user, client, learned, says

from nestlearn.serve.answers import Asked, Spoken, draw
from nestlearn.serve.turns import Turns

WAYS = [
    {"text": "The key", "tokens": 14}, {"text": "Bob", "tokens": 9, "temperature": 1.3, "seed": 1},
    {"text": "Alice keeps " * 20, "tokens": 8},
    {"text": "mat", "tokens": 12, "temperature": 1.2, "seed": 4},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["stacked", "hope"])
def test_answers_are_apart_bit_for_bit(tmp_path, kind):
    """Twelve at once, of two users, beside a text that is learned, say what each says alone."""
    tokens = {hashlib.sha256(t.encode()).hexdigest(): name for name, t in TOKENS.items()}
    with client(tmp_path, kind, tokens=tokens) as asks:
        for name, text in (("alice", TEXT), ("bob", "zebras and quartz. " * 5)):
            learned(asks, "mine", text, headers=as_user(name))
        asks.post("/v1/memories", json={"name": "other"}, headers=as_user("bob"))
        most = 14 if kind == "stacked" else 4  # a step of a Hope costs more
        ways = [{**way, "tokens": min(way["tokens"], most)} for way in WAYS]
        every = [
            {"headers": as_user(name), "memory": memory, **way}
            for name in TOKENS for memory in ("mine", None) for way in ways[: 4 if memory else 2]
        ]  # fmt: skip
        alone = [says(asks, **each) for each in every]
        job = asks.post(
            "/v1/memories/other/learn", json={"text": TEXT * 4}, headers=as_user("bob")
        ).json()["id"]
        with ThreadPoolExecutor(len(every)) as pool:
            together = list(pool.map(lambda each: says(asks, **each), every))
        asks.delete(f"/v1/jobs/{job}", headers=as_user("bob"))
    assert together == alone
    assert len(set(alone)) >= 5


def test_a_long_answer_does_not_hold_up_a_short_one(tmp_path):
    with client(tmp_path) as asks, ThreadPoolExecutor(1) as pool:
        long = pool.submit(says, asks, tokens=240)
        time.sleep(0.05)
        begin = time.monotonic()
        says(asks, tokens=2)
        took = time.monotonic() - begin
        assert not long.done()
        long.result()
        assert took < (time.monotonic() - begin) / 2


def test_who_does_not_read_holds_up_nobody(tmp_path):
    with client(tmp_path) as asks:
        body = b'{"prompt": "a", "stream": true, "max_tokens": 20}'
        lines = [b"POST /v1/completions HTTP/1.1", b"Host: localhost",
                 b"Content-Type: application/json", b"Content-Length: %d" % len(body)]  # fmt: skip
        slow = []
        for _ in range(20):
            one = socket.create_connection((asks.base_url.host, asks.base_url.port))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            one.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
            slow.append(one)
        assert says(asks, tokens=2)
        for one in slow:
            one.close()


def test_who_goes_away_is_answered_no_more(tmp_path):
    with client(tmp_path) as asks:
        body = {"prompt": "a", "stream": True, "max_tokens": 500}
        with asks.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        begin = time.monotonic()
        says(asks, tokens=40)
        assert time.monotonic() - begin < 5


def test_turns_come_in_the_order_of_asking():
    turns, order = Turns(), []

    def work(n):
        with turns:
            order.append(n)

    with turns:
        threads = []
        for n in range(8):
            threads.append(threading.Thread(target=work, args=(n,)))
            threads[-1].start()
            while len(turns._waiting) <= n:
                time.sleep(0.001)
        turns.pause()
        order.append("me")
    for thread in threads:
        thread.join()
    assert order == [*range(8), "me"]


def test_who_learns_leaves_others_half_of_the_time():
    """One step of a study takes as long as many tokens: these come between two of them."""
    turns, done = Turns(), threading.Event()
    made, steps = [], 0

    def answer():
        while not done.is_set():
            with turns:
                time.sleep(0.001)
                made.append(1)

    thread = threading.Thread(target=answer)
    with turns:
        thread.start()
        while steps < 3:
            time.sleep(0.1)  # a long step
            before = len(made)
            turns.pause()
            steps += 1
            assert len(made) - before >= 5
    done.set()
    thread.join()
    begin = time.monotonic()
    turns.rest(5)
    assert time.monotonic() - begin < 1  # nobody wants it


def test_a_token_is_drawn():
    scores = torch.tensor([1.0, 3.0, 2.0, -float("inf")])
    generator = torch.Generator().manual_seed(0)
    assert draw(scores, Asked(1, temperature=0), generator) == 1
    assert draw(scores, Asked(1, temperature=1e-9), generator) == 1
    drawn = {draw(scores, Asked(1, temperature=2), generator) for _ in range(200)}
    assert drawn == {0, 1, 2}
    assert {draw(scores, Asked(1, top_p=0.5), generator) for _ in range(50)} == {1}
    assert {draw(scores, Asked(1, top_p=0.8), generator) for _ in range(99)} == {1, 2}


@pytest.mark.parametrize("text", ["plain", "ümläut 日本", "🦉 and 🦊"])
@pytest.mark.parametrize("stops", [(), ("zzz",), ("t ",), ("本",), ("🦊", "x")])
def test_tokens_become_text_without_half_letters(text, stops):
    spoken = Spoken(lambda ids: bytes(ids).decode(errors="replace"), stops)
    parts = []
    for token in text.encode():
        parts.append(spoken.add(token))
        if spoken.stopped:
            break
    parts.append(spoken.end())
    ends = [text.find(stop) for stop in stops if stop in text]
    assert "".join(parts) == (text[: min(ends)] if ends else text)
    assert not any("\ufffd" in part for part in parts)


def test_what_may_become_a_stop_waits():
    spoken = Spoken(lambda ids: bytes(ids).decode(), ("abcd",))
    said = [spoken.add(token) for token in b"xabcabc"]
    assert said == ["x", "", "", "", "abc", "", ""]
    assert spoken.end() == "abc"
    broken = Spoken(lambda ids: bytes(ids).decode(errors="replace"), ())
    assert "".join([*(broken.add(255) for _ in range(40)), broken.end()]) == "\ufffd" * 40


def test_a_job_is_followed_from_anywhere():
    from nestlearn.serve.desk import Desk
    from nestlearn.serve.lessons import Job

    job = Job("a", "mine", "learn")
    job.tell("begin")

    async def follow(after):
        found = []
        async for told in Desk.follow(None, job, after):
            found.append(told["event"])
            if told["event"] == "begin":
                threading.Timer(0.01, job.tell, ["piece"]).start()
                threading.Timer(0.02, job.tell, ["done"], {"end": True}).start()
        return found

    assert asyncio.run(follow(0)) == ["begin", "piece", "done"]
    assert asyncio.run(follow(2)) == ["done"]
    assert asyncio.run(follow(9)) == []
