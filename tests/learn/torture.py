"""Saves that are killed, and files that are damaged; the tests do a dozen and more of each.

`python tests/learn/torture.py 1000 1000` kills 1,000 saves and damages 1,000 files.
"""

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from people import ids, session, stacked

from nestlearn import state
from nestlearn.learn import load_memory, save_memory
from servers import server


def _save_for_ever(folder: Path, sources: list[Path], ready) -> None:
    """In a child: the two memories in turn, until it is killed; a byte to `ready` at the start."""
    model = stacked()
    memories = [load_memory(source, model).memory for source in sources]
    digest = load_memory(folder, model).digest
    ready.send_bytes(b"!")
    while True:
        for number, memory in enumerate(memories):
            digest = save_memory(folder, model, memory, [{"number": number}], expected=digest)


def kill(times: int, folder: Path, seed: int = 0) -> tuple[int, int]:
    """Kill -9 so many saves at random moments; how often the first and the second memory stood
    there afterwards. AssertionError if anything else did, or litter grew.
    """
    draw, model = random.Random(seed), stacked()
    memories = [model.learn(ids(length))[1] for length in (37, 22)]
    sources = [folder.with_name(f"{folder.name}-{number}") for number in range(2)]
    for source, memory in zip(sources, memories):
        save_memory(source, model, memory, [])
    save_memory(folder, model, memories[0], [{"number": 0}])
    begin, digest = time.perf_counter(), load_memory(folder, model).digest
    for number in (1, 0):
        digest = save_memory(folder, model, memories[number], [{"number": number}], expected=digest)
    both = time.perf_counter() - begin
    after, context = [0, 0], server()
    for _ in range(times):
        heard, ready = context.Pipe(duplex=False)
        child = context.Process(target=_save_for_ever, args=(folder, sources, ready), daemon=True)
        child.start()
        ready.close()
        try:
            heard.recv_bytes()
        except EOFError:
            raise AssertionError("the child failed before it could save") from None
        time.sleep(draw.random() * 3 * both)
        assert child.is_alive(), "a save failed before it was killed"
        child.kill()
        child.join()
        heard.close()
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
        begin = time.perf_counter()
        first, second = kill(kills, Path(place, "killed"))
        took = time.perf_counter() - begin
        print(
            f"{kills} saves killed in {took:.0f} s: {first} times the one memory stood "
            f"there whole, {second} times the other"
        )
        begin = time.perf_counter()
        damage(wounds, Path(place))
        print(f"{wounds} damaged memories refused in {time.perf_counter() - begin:.0f} s")
