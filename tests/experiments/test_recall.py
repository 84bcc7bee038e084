"""Table 1 and figure 9 end to end, tiny; and what another process answers from a saved state."""

import io
import lzma
import random
import tarfile
from itertools import count

import pytest
import torch

from nestlearn import state as tree
from nestlearn.evals import ruler
from nestlearn.evals.haystack import Asked
from nestlearn.evals.needles import Words
from nestlearn.experiments import books, lessons, recall, runner
from nestlearn.experiments.asked import SHAPED, Elsewhere, answers, read
from nestlearn.experiments.lessons import Lesson, _Update
from nestlearn.layers.linear import StaticProjections
from nestlearn.models.hope import HopeLM

STORY = "1 Mary moved to the {0}.\n2 Where is Mary? \t{0}\t1\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Books of made-up words, words for keys, and stories."""
    place, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    for name in ("gutenberg", "ruler_words", "babi"):
        (place / name).mkdir()
    words = ["".join(draw.choices("abcdefg", k=draw.randint(2, 6))) for _ in range(60)]
    for name in ("train-0", "valid", "test"):
        told = "\n".join(" ".join(draw.choices(words, k=9)) + "." for _ in range(200))
        (place / "gutenberg" / f"{name}.txt.xz").write_bytes(lzma.compress(told.encode()))
    for name in ("adjective", "noun"):
        (place / "ruler_words" / f"{name}list.txt").write_text("\n".join(words[:30]))
    with tarfile.open(place / "babi" / "babi_en_1k.tar.gz", "w:gz") as archive:
        for task in range(1, 6):
            for split in ("train", "test"):
                told = "".join(STORY.format(p) for p in ("garden", "office", "milk")).encode()
                member = tarfile.TarInfo(f"en/qa{task}_some-facts_{split}.txt")
                member.size = len(told)
                archive.addfile(member, io.BytesIO(told))
    return place


class Here(Elsewhere):
    """This process in place of another one, whose start takes seconds."""

    def __init__(self, folder, device):
        self.lm = HopeLM.from_pretrained(folder).eval()

    def __exit__(self, *_):
        pass

    def ask(self, state, length, questions, most):
        like = read(self.lm, [b" " * min(length, SHAPED)])
        return answers(self.lm, tree.load(state, like), questions, most)


@pytest.mark.parametrize(
    ("name", "model"),
    [("table1", "Hope"), ("reach", "DeltaNet, shut below 0.2"), ("fig9", "Transformer")],
)
def test_it_trains_asks_and_draws(folder, tmp_path, monkeypatch, name, model):
    monkeypatch.setattr(recall, "Elsewhere", Here)
    options = {"data": str(folder), "quick": True, "workers": 0, "progress": False}
    text = runner.run(name, tmp_path, models=[model], device="cpu", **options)
    assert f"| {model} | " in text
    assert "another process asked" in text
    assert (tmp_path / f"{name}.png").is_file()
    assert len(list((tmp_path / "models").iterdir())) == 1


def test_another_process_answers_as_this_one_does(tmp_path):
    torch.manual_seed(0)
    asked = [Asked(b"The key is under the mat. " * 30, q, ("x",), ()) for q in (b"\nA", b"\nWho?")]
    # a memory, and a cache that stops growing; of one the other has the file, not the process
    for name, other in (("Hope", Elsewhere), ("Hope-Attention", Here)):
        lm = HopeLM(recall.config_of(name, (32, 2, 2))).eval()
        lm.save_pretrained(tmp_path / name)
        here = answers(lm, read(lm, [one.text for one in asked]), [b"\n\n\nA", b"\nWho?"], 6)
        with other(tmp_path / name, "cpu") as elsewhere:
            there, size = recall.said(lm, asked, 6, elsewhere)
        assert there == here
        assert size > 1000


def test_states_of_windows_have_the_bytes_of_hope():
    with torch.device("meta"):
        hope = HopeLM(recall.config_of("Hope", (64, 3, 2)))
    of = books.state_bytes(hope.config)
    for name in ("Transformer", "Hope-Attention"):
        config = recall.config_of(name, (64, 3, 2))
        kept = config.mixer.window + books.SINKS
        cache = 2 * kept * 64 * 3 * books.CACHED
        assert cache + books.state_bytes(config) == pytest.approx(of, rel=0.01)


@pytest.mark.parametrize("model", recall.COSTLY[:3])
def test_a_step_costs_what_it_is_told_to(model):
    """Gates hear of the bytes of haystacks, and of nothing else."""
    torch.manual_seed(0)
    ids, every = torch.randint(0, 99, (2, 33)), torch.ones(2, 33, dtype=torch.bool)
    first = every.clone()
    first[1] = False

    def grad(hay, shut, costly=True):
        torch.manual_seed(0)
        lm = HopeLM(recall.config_of(model, (16, 1, 2)))
        _Update(lm, 0.1, costly, torch.device("cpu"))(ids, every, hay, shut)
        mixer = lm.blocks[0].mixer
        return (mixer.gates if isinstance(mixer, StaticProjections) else mixer.eta).bias.grad[:2]

    free = grad(~every, 3.0)
    assert torch.equal(free, grad(every, 0.0))
    torch.testing.assert_close(free, grad(every, 3.0, costly=False), rtol=1e-5, atol=0)
    once, thrice = grad(every, 1.0) - free, grad(every, 3.0) - free
    least = 0.005 if model.startswith("Hope") else 0.01
    assert (once > least).all()  # of sigmoid(0) or, in Hope, of 0.02: 1/4 or 0.0196, of two heads
    torch.testing.assert_close(thrice, 3 * once)
    torch.testing.assert_close(grad(first, 1.0) + grad(~first, 1.0) - 2 * free, 2 * once)
    with pytest.raises(AssertionError, match="no steps"):
        _Update(HopeLM(recall.config_of("Transformer", (16, 1, 2))), 0.1, True, torch.device("cpu"))


COURSE = {
    "model": "DeltaNet", "size": (16, 1, 2), "steps": 24, "language": 0.1, "costly": True,
    "lessons": [Lesson(32, 2, 1.0, 0.5), Lesson(96, 2, 1.0, 1.0)],
    "lr": 1e-2, "seed": 0, "device": "cpu",
}  # fmt: skip


def make(lesson, rng):
    words = Words(("blue", "old", "tiny"), ("fox", "lamp", "river"))
    return ruler.drill(lesson.length + 1, words, rng)


def test_a_step_without_a_gradient_is_left_out_and_many_end_a_training(tmp_path, monkeypatch):
    run, calls = _Update._run, count(1)

    def broken(self, *given):
        loss = run(self, *given)
        if next(calls) >= first:
            next(self.model.parameters()).grad.fill_(torch.nan)
        return loss

    monkeypatch.setattr(_Update, "_run", broken)
    monkeypatch.setattr(lessons, "SKIPPED", 12)  # two of 24
    first = 23
    lm, told = recall.trained({**COURSE, "out": tmp_path / "two"}, make, lambda *_: None)
    assert told["skipped"] == 2
    assert all(w.isfinite().all() for w in lm.parameters())
    first = 0
    with pytest.raises(FloatingPointError, match="at step 3"):
        recall.trained({**COURSE, "out": tmp_path / "all"}, make, lambda *_: None)


def test_a_stopped_training_goes_on_as_if_it_had_not(tmp_path):
    cell = COURSE
    whole, told = recall.trained({**cell, "out": tmp_path / "whole"}, make, lambda *_: None)
    assert {lesson for _, lesson, _ in told["curve"]} == {0, 1}

    def stop(share, _):
        if share > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recall.trained({**cell, "out": tmp_path / "parts"}, make, stop)
    parts, _ = recall.trained({**cell, "out": tmp_path / "parts"}, make, lambda *_: None)
    for one, other in zip(whole.parameters(), parts.parameters()):
        assert torch.equal(one, other)
