"""`nestlearn learn`: a text read once, its loss before and after, and what that cost elsewhere."""

from __future__ import annotations

import math
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from nestlearn.cli.commands import say
from nestlearn.hf.plan import StackMemory
from nestlearn.learn import Session, Studied, StudyConfig

BLOCK = 2048  # tokens of one `learn`, which is also what a rollback takes back
SAMPLE = 2048  # tokens, at most, of a text on which a loss is measured


def introduction(session: Session, name: str) -> str:
    """Which memory it is, how much it has read and from what, since when, and how large it is."""
    position = session.memory.position
    learned = [r for r in session.history if r["what"] in ("learn", "study")]
    if not position and not learned:
        full = session.model.memory_bytes() / 1e6
        return f"Memory {name}: new, nothing read yet; it will take {full:,.1f} MB."
    held = sum(session.bytes.values()) / 1e6
    parts = sum(r["what"] == "learn" for r in learned)
    studied = len(learned) - parts
    since = ""
    if learned:
        since = f" since {time.strftime('%d %b %Y', time.localtime(learned[0]['time']))}"
    sources = [str(r["source"]) for r in learned if r.get("source")]
    last = f", the last from {sources[-1]}" if sources else ""
    also = f", {studied:,} studied" if studied else ""
    return (
        f"Memory {name}: {position:,} tokens read in {parts:,} parts{also}{since}{last}; its "
        f"weights have moved by {session.moved:.2%}; {held:,.1f} MB."
    )


def read_and_learn(
    session: Session, ids: list[int], keep: list[int] | None, tolerance: float | None, source: str
) -> tuple[bool, float]:  # fmt: skip
    """Learn from the tokens, with progress on stderr; whether Ctrl-C stopped it, and its seconds.

    A text of several blocks is also measured as it is met, so before it was learned: what the
    model makes of *new* text of the kind. keep: tokens on which forgetting is measured (default:
    samples of the base model, the text that is most its own).
    """
    if len(ids) < 2:
        raise ValueError("the text is shorter than two tokens: there is nothing to learn")
    own = own_text(session) if keep is None else torch.tensor([keep[:SAMPLE]])
    if own.shape[1] < 2:
        raise ValueError("the text to keep is shorter than two tokens: it cannot be measured")
    before, before_own = session.memory, _loss(session, own)
    if tolerance is not None:
        session.guard(own, tolerance)
    losses, stopped, taken_back, done, begin = [], False, 0, 0, time.perf_counter()
    with progress() as board:
        task = board.add_task("learning", total=len(ids), loss="", rate="")
        for a in range(0, len(ids), BLOCK):
            try:
                report = session.learn(torch.tensor([ids[a : a + BLOCK]]), source=source)
            except KeyboardInterrupt:
                stopped = True
                break
            losses.append(report.loss)
            taken_back += report.rolled_back is not None
            done += report.tokens
            rate = f"{done / (time.perf_counter() - begin):,.0f} tokens/s"
            board.update(task, advance=report.tokens, loss=f"{report.loss:.3f}", rate=rate)
    seconds = time.perf_counter() - begin
    _report(session, ids[:done], before, losses)
    name = "its own samples" if keep is None else "the text to keep"
    say(f"Forgotten: loss on {name} {before_own:.3f} before, {_loss(session, own):.3f} now.")
    chunks = [level.chunk for level in session.model.config.levels if level.chunk]
    if chunks and not any(int(level.writes) for level in session.memory.levels):
        say(
            f"No level has written anything yet: the fastest does every {min(chunks):,} tokens. "
            "Give more text, or stack with a smaller --chunk.", "yellow",
        )  # fmt: skip
    if taken_back:
        say(f"{taken_back} of {len(losses)} blocks were taken back: they harmed {name}.", "yellow")
    return stopped, seconds


def study_text(session: Session, text: str, config: StudyConfig, source: str) -> Studied:
    """Study a text that was read, with progress on stderr, and say what came of it."""
    own, begin = own_text(session), time.perf_counter()
    before = _loss(session, own)
    with progress("", measured=False) as board:
        task = board.add_task("", total=None, loss="", rate="")

        def tell(what: str, done: int, count: int) -> None:
            if board.tasks[0].description != what:  # its rate and time left are its own
                board.reset(task, description=what)
            board.update(task, completed=done, total=count)

        studied = session.study(text, config, source=source, tell=tell)
    first, now = studied.apart
    if math.isnan(first):
        say("Stopped before the first round was made.")
        return studied
    say(
        f"Studied in {time.perf_counter() - begin:,.0f} seconds: {studied.questions:,} questions"
        f", {studied.epochs:,} times. Without the text it is {now:.3f} nats a token from the "
        f"answers, {first:.3f} before."
    )
    if studied.rolled_back:
        say(f"Nothing of the study was kept: {studied.rolled_back}.", "yellow")
    say(f"Forgotten: loss on its own samples {before:.3f} before, {_loss(session, own):.3f} now.")
    return studied


def _report(session: Session, read: list[int], before: StackMemory, losses: list[float]) -> None:
    """Say what was learned: the loss on the text, and on its parts as they were met."""
    last = torch.tensor([read[-SAMPLE:]])
    if last.shape[1] < 2:
        return
    part = f" (its last {last.shape[1]:,} tokens)" if len(read) > SAMPLE else ""
    old, now = _loss(session, last, before), _loss(session, last)
    fresh = _loss(session, last, session.model.init_memory(1)) if before.position else None
    beside = "" if fresh is None else f"; without a memory {fresh:.3f}"
    say(f"Loss on the text{part}: {old:.3f} before, {now:.3f} after{beside}.")
    if len(losses) > 1:
        size = len(read) % BLOCK or BLOCK
        say(
            f"As it was met, before it was learned: {losses[0]:.3f} in its first {BLOCK:,} tokens, "
            f"{losses[-1]:.3f} in its last {size:,}."
        )


def _loss(session: Session, ids: Tensor, memory: StackMemory | None = None) -> float:
    memory = session.memory if memory is None else memory
    return float(session.model.losses(ids.to(session.model.lr[0].device), memory)[:, 1:].mean())


def own_text(session: Session, tokens: int = 256) -> Tensor:
    """What the base model says of itself [1, T], always the same."""
    model = session.model
    begin = model.base.config.bos_token_id
    start = torch.tensor([[begin if isinstance(begin, int) else 0]], device=model.lr[0].device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model.generate(
            start, max_new_tokens=min(tokens, model.window - 1), do_sample=True,
            attention_mask=torch.ones_like(start), pad_token_id=0, eos_token_id=None,
        )  # fmt: skip


def progress(unit: str = "tokens", measured: bool = True) -> Progress:
    """On stderr: how much is done, how fast, how long it will take, and with `measured` a loss."""
    loss = (TextColumn("loss {task.fields[loss]}"),) if measured else ()
    tokens = TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        tokens if unit else MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        *loss,
        console=Console(stderr=True),
    )
