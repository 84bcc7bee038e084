"""`nestlearn learn`: a text read once, with its loss before and after, and what was forgotten."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from nestlearn.hf.plan import Memory
from nestlearn.learn import Session

BLOCK = 2048  # tokens of one `learn`, which is also what a rollback takes back
SAMPLE = 2048  # tokens, at most, of a text on which a loss is measured


def read_and_learn(
    session: Session, ids: list[int], keep: list[int] | None, tolerance: float | None,
    source: str, say: Callable[..., None],
) -> bool:  # fmt: skip
    """Learn from the tokens, with progress on stderr; True if it was stopped by Ctrl-C.

    The text's last part is measured as it is met, so before it was learned: what the model makes
    of *new* text of the kind. keep: tokens on which forgetting is measured (default: samples of
    the base model, the text that is most its own).
    """
    if len(ids) < 2:
        raise ValueError("the text is shorter than two tokens: there is nothing to learn")
    own = own_text(session) if keep is None else torch.tensor([keep[:SAMPLE]])
    before_own = _loss(session, own)
    if tolerance is not None:
        session.guard(own, tolerance)
    losses, stopped, taken_back, done, begin = [], False, 0, 0, time.perf_counter()
    with _progress() as progress:
        task = progress.add_task("learning", total=len(ids), loss="", rate="")
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
            progress.update(task, advance=report.tokens, loss=f"{report.loss:.3f}", rate=rate)
    last = torch.tensor([ids[: len(losses) * BLOCK][-SAMPLE:]])
    if losses and last.shape[1] > 1:
        base, now = _loss(session, last, session.model.init_memory(1)), _loss(session, last)
        say(
            f"Loss on the text, as it was met: {losses[0]:.3f} at first, {losses[-1]:.3f} at last; "
            f"on its last {last.shape[1]:,} tokens {base:.3f} without a memory, {now:.3f} now."
        )
    name = "its own samples" if keep is None else "the text to keep"
    say(f"Forgotten: loss on {name} {before_own:.3f} before, {_loss(session, own):.3f} now.")
    if taken_back:
        say(f"{taken_back} of {len(losses)} blocks were taken back: they harmed {name}.", "yellow")
    return stopped


def _loss(session: Session, ids: Tensor, memory: Memory | None = None) -> float:
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


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
        console=Console(stderr=True),
    )
