"""Studying a text: questions, what was thought of the answers, and a level that takes it over."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from people import base, session, stacked

from nestlearn import DeltaLevel, stack_levels, state
from nestlearn.hf.anchor import Anchor
from nestlearn.learn import StudyConfig, answers, consolidation, pupil, questions, study
from nestlearn.learn.questions import Question

sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))
from stacks import FAMILIES, tiny, tokens

TEXT = "the key is under the mat. the cat has a red hat. "
PASSAGE = TEXT.strip()
ASKED = [
    Question("where is the key?", "under the mat", PASSAGE),
    Question("what has the cat?", "a red hat", PASSAGE),
    Question("which hat has the cat?", "red", PASSAGE),
    Question("what is under the mat?", "the key", PASSAGE),
]
QUICK = StudyConfig(
    4, words=0, epochs=4, batch=2, lr=3e-2, firm=0.0, text=0.1, anchor=0.0, held_out=0.0
)


def silent(*_):
    """Tells nobody."""


class Rounds(list):
    """The rounds of a study, which is to go on."""

    def __call__(self, epoch):
        self.append(epoch)
        return True


@pytest.fixture
def scripted(monkeypatch):
    """Questions that a model of random weights would not ask; how often they were asked for."""
    calls = []
    monkeypatch.setattr(study, "ask", lambda *given: calls.append(given) or ASKED)
    return calls


def test_passages_are_whole_sentences_and_leave_nothing_out():
    text = "One. Two is longer!\nThree?  Four 3.5 ends without"
    assert questions.sentences(text) == [
        "One.",
        "Two is longer!",
        "Three?",
        "Four 3.5 ends without",
    ]
    parts = questions.passages(text, 20)
    assert " ".join(parts).split() == text.split()
    assert all(len(part) < 24 for part in parts)
    assert questions.passages("word " * 500, 100) == [("word " * 500).strip()]


@pytest.mark.parametrize(
    ("said", "question"),
    [
        ("Who is the mayor?", "Who is the mayor?"),
        (' The question is: "Who is the mayor?"\nBram', "Who is the mayor?"),
        ("24. What is grown there? And more?", "What is grown there?"),
        ("Q: **Where is it?**", "Where is it?"),
        ("The mayor is Bram.\nWho?", None),
        ("Why?", None),
        ("", None),
    ],
)
def test_a_question_is_found_in_what_is_said(said, question):
    assert questions.question_in(said) == question


def test_every_sentence_is_asked_about(monkeypatch):
    prompts = []
    monkeypatch.setattr(questions, "prompt", lambda words, text: text)
    monkeypatch.setattr(
        questions, "decode",
        lambda base, words, rows, tokens, what, tell, seed=None: prompts.append(rows)
        or [f"What is number {i}?" if seed is not None else "cat" for i, _ in enumerate(rows)],
    )  # fmt: skip
    found = questions.ask(None, None, "The cat sat. A dog ran. It rained.", 12, 0, silent)
    assert len(found) == 12
    for sentence in ("The cat sat.", "A dog ran.", "It rained."):
        assert sum(f'"{sentence}"' in row for row in prompts[0]) == 2
    assert len(set(prompts[0])) == 6 + len(questions.ABOUT_ALL)


def test_answers_come_from_the_passage():
    keep = questions._from_passage
    assert all(keep(question) for question in ASKED)
    assert not keep(Question("where is the key?", "the key is", PASSAGE))
    assert not keep(Question("where is the key?", "in Paris", PASSAGE))
    assert not keep(Question("where is the key?", "", PASSAGE))


def test_prompts_side_by_side_are_continued_as_each_alone():
    one, words = base(), session().tokenizer
    prompts = [questions.prompt(words, PASSAGE + end) for end in (" where", " a", " which hat")]
    prompts.append(questions.prompt(words, "another"))
    said = questions.decode(one, words, prompts, 6, "", silent)
    for prompt, words_said in zip(prompts, said, strict=True):
        ids = torch.tensor([prompt])
        made = one.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert words_said == words.decode(made[0, len(prompt) :].tolist(), skip_special_tokens=True)
    again = [questions.decode(one, words, prompts, 6, "", silent, seed=3) for _ in range(2)]
    assert again[0] == again[1]


class Words:
    """Ids by the order of a list, a piece for each; other words are of two pieces."""

    COMMON = ("the", "is", "by", "its")
    RARE = ("town", "lake", "farmers", "grow", "cheese", "small")

    def encode(self, text, add_special_tokens=False):
        word = text.strip().lower()
        if word in self.COMMON:
            return [self.COMMON.index(word)]
        return [1000 + self.RARE.index(word)] if word in self.RARE else [2000, 2001]


def test_every_sentence_is_asked_about_by_its_rarest_words_and_by_name():
    text = "The town Toririth is by the lake. Its farmers grow cheese. The small town is Toririth."
    assert questions.topic(Words(), text) == "Toririth"
    asked = questions.by_name(Words(), text, 2)
    assert [q.answer for q in asked] == [s for s in questions.sentences(text) for _ in range(2)]
    assert all("Toririth" in q.text and q.passage == text for q in asked)
    for question, word in zip(asked, ("lake", "town", "cheese", "grow", "small", "town")):
        ways = {question.text, *question.ways}
        assert ways == {form.format(word=word, name="Toririth") for form in questions.BY_NAME}
    assert questions.by_name(Words(), text, 0) == []
    assert questions.topic(Words(), "nothing is named") == "nothing"
    assert questions.by_name(Words(), "…", 3) == []


def test_thoughts_and_divergence_are_those_of_single_readings():
    model, words = stacked(), session().tokenizer
    examples = answers.thoughts(model, words, ASKED, silent)
    assert [len(e.answer) for e in examples] == [len(q.answer) for q in ASKED]
    (alone,) = answers.thoughts(model, words, ASKED[:1], silent)
    torch.testing.assert_close(alone.thought, examples[0].thought, atol=5e-3, rtol=5e-3)
    apart = []
    for question, example in zip(ASKED, examples, strict=True):
        shown = questions.FROM_TEXT.format(text=question.passage, question=question.text)
        rows = [questions.prompt(words, shown), example.asked[0]]
        n = len(example.answer)
        with torch.no_grad():
            thought, now = (
                model.base(torch.tensor([row + example.answer])).logits[0, -n - 1 : -1]
                for row in rows
            )  # fmt: skip
        thought, now = thought.log_softmax(-1), now.log_softmax(-1)
        torch.testing.assert_close(example.thought.float(), thought, atol=5e-3, rtol=5e-3)
        kl = (example.thought.float().exp() * (example.thought.float() - now)).sum(-1).mean()
        apart.append(float(kl))
    with torch.no_grad():
        found = answers.divergence(model, {}, examples)
    assert float(found) == pytest.approx(sum(apart) / len(apart), rel=1e-4)


def test_most_of_a_firm_thought_is_the_answer_itself():
    examples = answers.thoughts(stacked(), session().tokenizer, ASKED, silent)
    for before, after in zip(examples, answers.firm(examples), strict=True):
        was, now = before.thought.float().exp(), after.thought.float().exp()
        right = torch.eye(was.shape[1])[before.answer]
        torch.testing.assert_close(now, 0.1 * was + 0.9 * right, atol=2e-3, rtol=2e-2)
    assert answers.firm([]) == []
    assert answers.firm(examples, 0.0) == examples


def test_a_firm_study_learns_the_answers_tokens():
    model, words, lost = stacked(), session().tokenizer, []
    ids = torch.tensor([words.encode(TEXT)])
    shown = answers.thoughts(model, words, ASKED, silent)
    for share in (0.0, StudyConfig.firm):
        rounds, config = Rounds(), replace(QUICK, firm=share)
        consolidation.consolidate(
            model, words, model.init_memory(1), ASKED, ids, config, silent, rounds
        )
        now = answers.think(model, model.weights(rounds[-1].memory), shown)
        lost.append(sum(-float(e.thought[range(len(e.answer)), e.answer].mean()) for e in now))
    assert lost[1] < 0.8 * lost[0]


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "low-rank"])
def test_a_level_takes_over_what_was_thought_with_the_text(rank):
    model, words = stacked(rank=rank), session().tokenizer
    before = {name: p.clone() for name, p in model.base.state_dict().items()}
    memory = model.learn(torch.tensor([words.encode(TEXT)]))[1]
    rounds = Rounds()
    consolidation.consolidate(
        model, words, memory, ASKED, torch.tensor([words.encode(TEXT)]), QUICK, silent,
        rounds,
    )  # fmt: skip
    first, now = rounds[-1].apart
    assert now < 0.7 * first
    assert [r.number for r in rounds] == list(range(1, len(rounds) + 1))
    assert rounds[-1].ended
    after = rounds[-1].memory
    slow = consolidation.level_of(model, None)
    for i, (old, new) in enumerate(zip(memory.levels, after.levels, strict=True)):
        assert (old is new) == (i != slow)
    assert int(after.levels[slow].writes) == int(memory.levels[slow].writes) + 1
    assert after._replace(levels=()) == memory._replace(levels=())
    assert all(torch.equal(before[name], p) for name, p in model.base.state_dict().items())
    examples = answers.thoughts(model, words, ASKED, silent)
    assert answers.mean(model, model.weights(after), examples) == pytest.approx(now, rel=1e-3)
    again = model.learn(torch.tensor([words.encode("the mat")]), after)[1]  # it goes on
    assert again.position == memory.position + 8


def test_what_was_studied_before_is_rehearsed():
    model, words, rounds = stacked(), session().tokenizer, Rounds()
    ids = torch.tensor([words.encode(TEXT)])
    first, second = ASKED[:2], ASKED[2:]
    consolidation.consolidate(model, words, model.init_memory(1), first, ids, QUICK, silent, rounds)
    memory = rounds[-1].memory
    known = [q._replace(passage="") for q in first]
    before = answers.thoughts(model, words, known, silent, model.weights(memory))
    assert answers.mean(model, model.weights(memory), before) < 1e-4  # as it answers now
    apart = []
    for rehearse in (0, 2):
        rounds = Rounds()
        consolidation.consolidate(
            model, words, memory, second, ids, replace(QUICK, rehearse=rehearse), silent, rounds,
            earlier=known,
        )  # fmt: skip
        after = model.weights(rounds[-1].memory)
        apart.append(answers.mean(model, after, before))
    assert apart[1] < 0.7 * apart[0]


def test_the_history_says_what_can_be_rehearsed(tmp_path, scripted):
    one = session(memory=tmp_path / "mine")
    one.study(TEXT, QUICK)
    history = session(one.model, memory=tmp_path / "mine").history
    kept = study.earlier(history, [])
    assert {(q.text, q.answer, q.passage) for q in kept} == {(q.text, q.answer, "") for q in ASKED}
    assert study.earlier(history, ASKED) == []  # asked anew
    assert study.earlier([*history, {"what": "reset"}], []) == []

    def stop(*_):
        raise KeyboardInterrupt

    two = session(memory=tmp_path / "other")
    two.study(TEXT, QUICK, tell=stop)  # before a round was made: nothing was learned
    assert two.history[-1]["stopped"]
    assert study.earlier(two.history, []) == []
    forged = [{"what": "study", "asked": asked} for asked in (3, [3], [["a", 1]], [["a"]], None)]
    assert study.earlier(forged, []) == []


def test_it_ends_when_the_questions_kept_apart_get_no_better(monkeypatch):
    model, words, rounds = stacked(), session().tokenizer, Rounds()
    config = StudyConfig(4, words=0, epochs=9, batch=2, lr=1e-9, held_out=0.5, anchor=0.0)
    monkeypatch.setattr(consolidation, "mean", lambda *_: 1.0)
    consolidation.consolidate(
        model, words, model.init_memory(1), ASKED, torch.tensor([words.encode(TEXT)]), config,
        silent, rounds,
    )  # fmt: skip
    assert [r.ended for r in rounds] == [False, True]
    assert all(level.fast == () for level in rounds[-1].memory.levels)  # nothing was better


def test_the_anchor_and_long_texts_are_read():
    model, words, rounds = stacked(), session().tokenizer, Rounds()
    config = StudyConfig(4, words=0, epochs=1, batch=2, anchor=1.0)
    long = torch.tensor([words.encode(TEXT * 9)])
    assert long.shape[1] > 2 * model.window
    consolidation.consolidate(
        model, words, model.init_memory(1), ASKED, long, config, silent, rounds
    )
    assert math.isfinite(rounds[0].apart[1])
    windows = {
        (s.start, s.stop) for s in (pupil.window(long, model.window, step) for step in range(40))
    }
    assert min(start for start, _ in windows) == 0
    assert max(stop for _, stop in windows) == long.shape[1]


@pytest.mark.parametrize("given", [True, False])
def test_a_study_is_judged_on_samples_that_it_is_not_held_to(monkeypatch, given):
    model, words, rounds, pulled, judged = stacked(), session().tokenizer, Rounds(), [], []
    anchor = Anchor.sampled(model, 3, 8, rows=1, seed=5) if given else None
    pull, stray = pupil.Pupil._pull, consolidation._strayed

    def noted(self, held, texts):
        pulled.extend(map(tuple, texts.tolist()))
        return pull(self, held, texts)

    monkeypatch.setattr(pupil.Pupil, "_pull", noted)
    monkeypatch.setattr(
        consolidation, "_strayed",
        lambda model, memory, judge: judged.append(judge) or stray(model, memory, judge),
    )  # fmt: skip
    ids = torch.tensor([words.encode(TEXT)])
    consolidation.consolidate(
        model, words, model.init_memory(1), ASKED, ids, replace(QUICK, anchor=2.0), silent, rounds,
        anchor=anchor,
    )  # fmt: skip
    (judge,) = judged
    assert judge.samples.shape == (consolidation.HELD, 48)
    assert pulled
    assert not set(pulled) & set(map(tuple, judge.samples.tolist()))
    if given:
        assert set(pulled) <= set(map(tuple, anchor.samples.tolist()))
    weights = model.weights(rounds[-1].memory)
    with torch.no_grad():
        expected = float(judge.apart(model, weights, judge.samples, 1)) / judge.strength
    assert rounds[-1].strayed == pytest.approx(expected, rel=1e-5)


def test_every_earlier_question_is_rehearsed_once_before_one_comes_again(monkeypatch):
    model, words, seen = stacked(), session().tokenizer, []
    learn = pupil.Pupil.learn

    def noted(self, examples, *given):
        seen.extend(tuple(e.answer) for e in examples[2:])
        return learn(self, examples, *given)

    monkeypatch.setattr(pupil.Pupil, "learn", noted)
    earlier = [Question(f"what is {c}?", c * 3, "") for c in "abcdefghij"]
    ids = torch.tensor([words.encode(TEXT)])
    consolidation.consolidate(
        model, words, model.init_memory(1), ASKED, ids, replace(QUICK, rehearse=2), silent,
        Rounds(), earlier=earlier,
    )  # fmt: skip
    assert len(seen) > 10
    assert len(set(seen[:10])) == 10
    assert seen[10:] == seen[: len(seen) - 10]


def test_a_study_that_strays_too_far_from_the_base_model_is_undone(tmp_path, scripted):
    one = session(memory=tmp_path / "mine")
    one.learn(TEXT)
    before, config = one.memory, replace(QUICK, anchor=0.1, most=1e-6)
    done = one.study(TEXT, config)
    assert "nats a token from what it was, above most=1e-06" in done.rolled_back
    assert done.epochs == 4  # only the last round is judged
    assert one.history[-1]["asked"] == []
    assert one.history[-1]["strayed"] == done.strayed > config.most
    loaded = session(one.model, memory=tmp_path / "mine").memory
    for memory in (one.memory, loaded):
        for (_, a), (_, b) in zip(state.leaves(before), state.leaves(memory), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert one.study(TEXT, replace(config, most=100.0)).rolled_back is None
    free = one.study(TEXT, replace(QUICK, most=1e-6))  # no anchor: no samples
    assert (free.rolled_back, free.strayed) == (None, None)


def test_a_session_studies_saves_and_says_so(tmp_path, scripted):
    one = session(memory=tmp_path / "mine")
    one.learn(TEXT)
    told = []
    done = one.study(TEXT, QUICK, source="note", tell=lambda *what: told.append(what))
    assert (done.questions, done.stopped, done.rolled_back) == (4, False, None)
    assert done.apart[1] < done.apart[0]
    assert {what for what, *_ in told} == {"thinking", "studying"}
    entry = one.history[-1]
    assert (entry["what"], entry["source"], entry["questions"]) == ("study", "note", 4)
    other = session(one.model, memory=tmp_path / "mine")
    assert other.history == one.history
    for (_, a), (_, b) in zip(state.leaves(one.memory), state.leaves(other.memory), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert not list((tmp_path / "mine").glob("study-*"))


def test_a_study_that_was_stopped_goes_on(tmp_path, scripted):
    one = session(memory=tmp_path / "mine")

    def stop(what, done, of):
        if what == "studying" and done == 4:  # two steps a round: in the third
            raise KeyboardInterrupt

    first = one.study(TEXT, QUICK, tell=stop)
    assert (first.stopped, first.epochs) == (True, 2)
    (file,) = (tmp_path / "mine").glob("study-*.json")
    assert json.loads(file.read_text())["done"] == 2
    other = session(one.model, memory=tmp_path / "mine")
    second = other.study(TEXT, QUICK)
    assert (second.stopped, second.epochs) == (False, 4)
    assert second.apart[0] == pytest.approx(first.apart[1], rel=1e-3)
    assert len(scripted) == 1
    assert not file.exists()
    # of other settings, or damaged: begun anew
    third = session(stacked(), memory=tmp_path / "new")
    third.study(TEXT, QUICK, tell=stop)
    (file,) = (tmp_path / "new").glob("study-*.json")
    for damaged in ("{", '{"questions": 3}', file.read_text().replace('"done": 2', '"done": 99')):
        file.write_text(damaged)
        asked = len(scripted)
        assert not session(third.model, memory=tmp_path / "new").study(TEXT, QUICK).stopped
        assert len(scripted) == asked + 1


def test_what_harms_the_text_to_keep_is_taken_back(scripted, monkeypatch):
    one = session(held_out="a quick brown fox jumps over it. ", tolerance=0.0)
    before = one.memory
    written = lambda ids, memory: float(any(level.fast for level in memory.levels))  # noqa: E731
    monkeypatch.setattr(one, "_mean", written)
    one._limit = 0.5
    done = one.study(TEXT, QUICK)
    assert (done.held_out, "held-out" in done.rolled_back) == (1.0, True)
    assert one.memory is before
    assert one.history[-1]["rolled_back"] == done.rolled_back


def test_no_round_that_harms_is_ever_on_disk(tmp_path, scripted, monkeypatch):
    one = session(memory=tmp_path / "mine", held_out="a quick brown fox. ", tolerance=0.0)
    calls = iter([(0.1, None), (0.1, None), (9.0, "the held-out loss rose")])
    monkeypatch.setattr(one, "judge", lambda memory: next(calls))
    saved, before = [], one.memory
    monkeypatch.setattr(study.Notes, "keep", lambda self, found, done: saved.append(done))
    done = one.study(TEXT, QUICK)
    assert (done.epochs, done.rolled_back) == (3, "the held-out loss rose")
    assert saved == [0, 1, 2]
    assert one.memory is before
    other = session(one.model, memory=tmp_path / "mine")
    assert all(level.fast == () for level in other.memory.levels)


def test_what_was_reset_is_studied_from_the_beginning(tmp_path, scripted):
    def stop(what, done, of):
        if what == "studying" and done == 4:
            raise KeyboardInterrupt

    one = session(memory=tmp_path / "mine")
    first = one.study(TEXT, QUICK, tell=stop)
    one.reset()
    again = one.study(TEXT, QUICK, tell=stop)
    assert (first.epochs, again.epochs) == (2, 2)
    assert again.apart == pytest.approx(first.apart, rel=1e-3)
    assert len(scripted) == 1  # the questions are the same


def test_a_memory_that_only_studied_is_of_its_base(scripted):
    one = session()
    one.study(TEXT, QUICK)
    assert one.memory.position == 0
    with torch.no_grad():
        one.model.base.lm_head.weight.mul_(1.1)
    with pytest.raises(ValueError, match="base model has changed"):
        one.study(TEXT, QUICK)


def test_the_model_that_asks_has_no_memory_and_no_dropout(monkeypatch):
    one, found = session(), []
    _, memory = one.model.learn(torch.tensor([one.tokenizer.encode(TEXT)]))
    ids = torch.tensor([one.tokenizer.encode("the key")])
    plain = one.model.base(ids).logits

    def ask(base, *_):
        found.append((base.training, torch.equal(base(ids).logits, plain)))
        return ASKED

    monkeypatch.setattr(study, "ask", ask)
    one.model.base.train()
    with one.model.using(memory):
        one.study(TEXT, QUICK)
    assert found == [(False, True)]


def test_a_text_of_one_token_has_no_next_ones(scripted):
    one = session()
    one.tokenizer.encode = lambda text, add_special_tokens=True: (
        [5] if text == "k" else type(one.tokenizer).encode(one.tokenizer, text, add_special_tokens)
    )
    done = one.study("k", QUICK)
    assert math.isfinite(done.apart[1])
    assert done.apart[1] < done.apart[0]


def test_a_question_is_asked_in_another_way_each_round(monkeypatch):
    """The answer and what is thought of it stay; a round's questions are all asked in one way."""
    way = ("where do I find the key?", "which thing is under the mat?")
    (example,) = answers.thoughts(
        stacked(), session().tokenizer, [ASKED[0]._replace(ways=way)], silent
    )
    words = session().tokenizer
    brief = questions.BRIEF
    assert example.asked == [
        questions.prompt(words, text) for text in (ASKED[0].text, way[0] + brief, way[1])
    ]
    read = []
    monkeypatch.setattr(answers, "beside", lambda asked, *rest: read.append(asked) or 1 / 0)
    for turn in range(4):
        with pytest.raises(ZeroDivisionError):
            answers.divergence(stacked(), {}, [example], turn)
    assert read == [[example.asked[turn % 3]] for turn in range(4)]


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "low-rank"])
def test_steps_of_one_shape_are_the_steps_of_any(monkeypatch, rank):
    """What a card captures as a graph, run as it is."""

    class Run:
        def __init__(self, model, run, *inputs):
            self.run, self.shapes = run, [x.shape for x in inputs]

        def __call__(self, *inputs):
            assert [x.shape for x in inputs] == self.shapes
            self.run(*inputs)

    monkeypatch.setattr(pupil, "Captured", Run)
    model, words = stacked(rank=rank), session().tokenizer
    examples = answers.thoughts(model, words, ASKED, silent)
    memory = model.learn(torch.tensor([words.encode(TEXT)]))[1]
    ends = []
    for frame in (None, answers.Frame.of(examples, 4)):
        held = Anchor.sampled(model, 4, 6, rows=1)
        one = pupil.Pupil(model, memory, 1, 1e-2, held=held)
        if frame is not None:
            one.fits("answers", frame)
        for step, some in enumerate((examples[:3], examples[2:], examples)):
            one.learn(some, step, step, 1.0)
        assert set(one.graphs) == (set() if frame is None else {"answers", "held"})
        ends.append(one.memory().levels[1].fast)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a.dense(), b.dense(), atol=1e-6, rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_study_is_the_same_study():
    words, ends = session().tokenizer, []
    for cuda_graph in (False, True):
        model, rounds = stacked().cuda(), Rounds()
        config = replace(QUICK, text=0.0, anchor=1.0, cuda_graph=cuda_graph)
        ids = torch.tensor([words.encode(TEXT)]).cuda()
        consolidation.consolidate(
            model, words, model.init_memory(1), ASKED, ids, config, silent, rounds
        )
        ends.append(rounds[-1].apart)
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_divergence_in_every_family(family):
    """Rows of different lengths, padded in front, are read as each alone."""
    model = stack_levels(tiny(family), [DeltaLevel(4, lr=0.1, rule="dgd")])
    examples = []
    for n in (2, 6, 9):
        ids = tokens(1, n + 3, seed=n)[0].tolist()
        thought = torch.randn(3, 48, generator=torch.Generator().manual_seed(n)).log_softmax(-1)
        examples.append(answers.Example([ids[:n]], ids[n:], thought.half()))
    with torch.no_grad():
        alone = [float(answers.divergence(model, {}, [e])) for e in examples]
        together = float(answers.divergence(model, {}, examples))
    assert together == pytest.approx(sum(alone) / 3, rel=1e-4)


def test_what_cannot_be_studied_is_refused(monkeypatch):
    one = session()
    for text in ("", "  \n", 3):
        with pytest.raises(ValueError, match="nothing to study"):
            one.study(text)
    one.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer"):
        one.study(TEXT)
    for wrong in (
        {"questions": -1},
        {"questions": 0, "words": 0},
        {"lr": 0},
        {"held_out": 1.0},
        {"firm": 1.0},
        {"anchor": -1},
        {"most": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            StudyConfig(**wrong)
    monkeypatch.setattr(study, "ask", lambda *_: [])
    with pytest.raises(ValueError, match="no question"):
        session().study(TEXT, QUICK)
    with pytest.raises(ValueError, match="level=7"):
        consolidation.level_of(stacked(), 7)
