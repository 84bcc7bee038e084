"""Saves that are killed, and files that are damaged; the tests do a few dozen of each.

`python tests/learn/torture.py 1000 1000` kills 1,000 saves and damages 1,000 files.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from people import ids, session, stacked

from nestlearn import state
from nestlearn.learn import load_memory, save_memory


def _save_for_ever(folder: Path, model, memories, ready: int) -> None:
    """In a child: the two memories in turn, until it is killed; a byte to `ready` at the start."""
    digest = load_memory(folder, model).digest
    os.write(ready, b"!")
    while True:
        for number, memory in enumerate(memories):
            digest = save_memory(folder, model, memory, [{"number": number}], expected=digest)


def kill(times: int, folder: Path, seed: int = 0) -> tuple[int, int]:
    """Kill -9 so many saves at random moments; how often the first and the second memory stood
    there afterwards. AssertionError if anything else did, or litter grew.
    """
    draw, model = random.Random(seed), stacked()
    memories = [model.learn(ids(length))[1] for length in (37, 22)]
    save_memory(folder, model, memories[0], [{"number": 0}])
    begin, digest = time.perf_counter(), load_memory(folder, model).digest
    for number in (1, 0):
        digest = save_memory(folder, model, memories[number], [{"number": number}], expected=digest)
    both = time.perf_counter() - begin
    after = [0, 0]
    for _ in range(times):
        heard, ready = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _save_for_ever(folder, model, memories, ready)
            finally:
                os._exit(1)
        os.close(ready)
        assert os.read(heard, 1) == b"!", "the child failed before it could save"
        os.close(heard)
        time.sleep(draw.random() * 3 * both)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "a save failed before it was killed"
        stored = load_memory(folder, model)
        number = stored.history[0]["number"]
        for (_, a), (_, b) in zip(
            state.leaves(stored.memory), state.leaves(memories[number]), strict=True
        ):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        after[number] += 1
        assert len(list(folder.iterdir())) < 12  # an interrupted save's rest goes with the next
    digest = load_memory(folder, model).digest
    save_memory(folder, model, memories[0], [], expected=digest)
    assert len(list(folder.iterdir())) == 2
    return after[0], after[1]


def damage(times: int, folder: Path, seed: int = 0) -> None:
    """Damage one file of a memory in so many ways; AssertionError unless each is refused with a
    ValueError, the session that tried goes on unchanged, and the file is not overwritten.
    """
    draw, model = random.Random(seed), stacked()
    one = session(model, folder / "good")
    one.learn(ids(37))
    one.save()
    bad, memory = folder / "bad", one.memory
    one.path = bad
    for n in range(times):
        shutil.copytree(folder / "good", bad, dirs_exist_ok=True)
        path = draw.choice(sorted(bad.iterdir()))
        before = path.read_bytes()
        raw = bytearray(before)
        way = draw.choice(("flip", "cut", "insert", "swap", "fill", "empty", "remove"))
        at = draw.randrange(len(raw))
        if way == "flip":
            raw[at] ^= 1 << draw.randrange(8)
        elif way == "cut":
            del raw[at:]
        elif way == "insert":
            raw[at:at] = draw.randbytes(draw.randint(1, 9))
        elif way == "swap":
            raw[at : at + 8] = raw[at : at + 8][::-1]
        elif way == "fill":
            raw[at : at + 64] = draw.choice((b"\0", b"[", b'"', b"9")) * len(raw[at : at + 64])
        elif way == "empty":
            raw.clear()
        if way == "remove":
            path.unlink()
        elif bytes(raw) == before:
            continue
        else:
            path.write_bytes(raw)
        with pytest.raises((ValueError, FileNotFoundError), match="bad"):  # it names the folder
            one.load()
        assert one.memory is memory, n
        assert path.exists() == (way != "remove"), n
        assert way == "remove" or path.read_bytes() == bytes(raw), n
        shutil.rmtree(bad)


if __name__ == "__main__":
    kills, wounds = (int(text) for text in (sys.argv[1:] or ("1000", "1000")))
    with tempfile.TemporaryDirectory() as place:
        first, second = kill(kills, Path(place, "killed"))
        print(f"{kills} saves killed: {first} times the one memory, {second} times the other")
        damage(wounds, Path(place))
        print(f"{wounds} damaged memories refused")
