"""Sessions that learn, generate, save, load and fork in a random order, against the same texts
learned one after the other. `python tests/learn/interleave.py 200` runs 200 such orders, and says
what they did.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from people import ids, session, stacked

from nestlearn import state

OPTIONS = {"max_new_tokens": 4, "do_sample": False}


def run(seed: int, folder: Path, steps: int = 14) -> Counter[str]:
    """One order; how often it did what, and how many sessions were compared at its end.

    AssertionError where one of them differs from the sequential result.
    """
    draw, model = random.Random(seed), stacked()
    people = [session(model, folder / "p0"), session(model, folder / "p1")]
    read = {id(each): [] for each in people}  # what each has learned by now
    saved, done = {}, Counter()
    for step in range(steps):
        one = draw.choice(people)
        act = draw.choice(("learn", "learn", "learn", "generate", "save", "load", "fork"))
        possible = {"load": one.path in saved, "fork": len(people) < 5}
        if not possible.get(act, True):
            continue
        done[act] += 1
        if act == "learn":
            text = ids(draw.randint(1, 19), seed=1000 * seed + step)
            one.learn(text)
            read[id(one)].append(text)
        elif act == "generate":
            one.generate(ids(3, seed=step), **OPTIONS)
        elif act == "save":
            one.save()
            saved[one.path] = list(read[id(one)])
        elif act == "load":
            if draw.random() < 0.5:
                one.load()
            else:  # in a session of its own
                people[people.index(one)] = one = session(model, one.path)
            read[id(one)] = list(saved[one.path])
        elif act == "fork":
            twin = one.fork(folder / f"p{len(people)}-{step}")
            people.append(twin)
            read[id(twin)] = list(read[id(one)])
            saved[twin.path] = list(read[id(one)])
    for one in people:
        _compare(one, read[id(one)], model)
        done["compared"] += 1
    return done


def _compare(one, texts, model) -> None:
    memory = model.init_memory(1)
    if texts:
        _, memory = model.learn(torch.cat(texts, 1))
    for (path, a), (_, b) in zip(state.leaves(one.memory), state.leaves(memory), strict=True):
        if isinstance(a, torch.Tensor):
            assert a.shape == b.shape, path
            assert a.numel() == 0 or (a - b).abs().max() <= 1e-6, path
        else:
            assert a == b, path


if __name__ == "__main__":
    orders = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    did, begin = Counter(), time.perf_counter()
    for number in range(orders):
        with tempfile.TemporaryDirectory() as place:
            did += run(number, Path(place))
    acts = ", ".join(f"{did[act]} {act}" for act in ("learn", "generate", "save", "load", "fork"))
    print(
        f"{orders} interleavings ({acts}): {did['compared']} sessions equal the sequential result, "
        f"in {time.perf_counter() - begin:.0f} s"
    )
