"""What is timed: passes through a layer, decoding, training steps, and the machine's own peak."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nestlearn.experiments.language import quick_models
from nestlearn.experiments.models import with_parameters
from nestlearn.models.hope import HopeLM
from nestlearn.train import TrainConfig
from nestlearn.train.optimize import adamw

from .contestants import (
    FORWARD,
    OURS,
    TRAIN,
    Contestant,
    Shape,
    far_contestants,
)
from .harness import FLAT, Measured, Task, summary

DECODE, STEP, PEAK, SHARE = "decode", "training step", "peak", "share of peak"
LARGE, SMALL = "one large product", "40 products of 64 × 64 × 64"


@dataclass(frozen=True)
class Settings:
    """What a run measures. lengths, model_lengths, flat_lengths: tokens; limit: seconds per run."""

    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    rounds: int = 4
    limit: float = 10.0
    shape: Shape = Shape()  # noqa: RUF009  a NamedTuple cannot change
    batch: int = 2
    layers: bool = True
    decode: bool = True
    compiled: bool = True
    memory: bool = True
    model: bool = True
    model_batch: int = 8
    model_lengths: tuple[int, ...] = (256, 1024, 2048)
    model_size: str = "tiny"
    flat: bool = False
    flat_lengths: tuple[int, ...] = (1024, 65536)
    stream_tokens: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    peak_size: int = 2048

    @classmethod
    def quick(cls) -> Settings:
        """Seconds: to see that it works. Its numbers are of one round, so no evidence."""
        return cls(
            lengths=(256,), rounds=1, compiled=False, memory=False, model_lengths=(256,),
            stream_tokens=(10_000,), flat_lengths=(256, 1024),
        )  # fmt: skip


def tasks(entrants: Sequence[Contestant], settings: Settings) -> list[Task]:
    """All that is timed in the rounds."""
    found: list[Task] = []
    for c in entrants:
        layer = c.make(settings.shape)
        if settings.layers:
            found += layer_tasks(c, layer, settings.lengths, settings)
        if settings.decode:
            found += decode_tasks(c, layer, settings)
    if settings.flat:
        for c in far_contestants():
            layer, alone = c.make(settings.shape), replace(settings, batch=1)
            found += layer_tasks(c, layer, settings.flat_lengths, alone, FLAT)
    if settings.layers:
        found += peak_tasks(settings.peak_size)
    if settings.model:
        found += model_tasks(settings)
    return found


# ------------------------------------------------------------------------------------ layers


def layer_tasks(
    c: Contestant, layer: nn.Module, lengths: Sequence[int], settings: Settings, prefix: str = ""
) -> list[Task]:
    """Forward without a graph, and forward + backward, at every length in which c takes part."""
    found = []
    batch = settings.batch if c.batch is None else c.batch
    for length in (n for n in lengths if c.wants(n)):
        if c.prepare is not None:
            c.prepare(length)
        for kind in c.kinds:
            found.append(
                Task(
                    c.name, prefix + kind, length,
                    run=pass_through(c, layer, kind, length, batch, settings.shape),
                    amount=batch * length, unit="tokens/s",
                    # flat: what is compared is the lengths, so they run after one another
                    group=prefix + kind + ("" if prefix else f" {length}"),
                    lenient=not c.ours or c.compiled, facts=facts(c, layer, batch, settings.shape),
                )
            )  # fmt: skip
    return found


def pass_through(
    c: Contestant, layer: nn.Module, kind: str, length: int, batch: int, shape: Shape
) -> Callable[[], Any]:
    """One pass over [batch, length, width]; with backward: gradients of input and parameters."""
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(batch, length, shape.width, generator=generator)

    def forward() -> None:
        with torch.no_grad():
            c.step(layer, x, None)

    def train() -> None:
        layer.zero_grad(set_to_none=True)
        y, _ = c.step(layer, x.detach().requires_grad_(), None)
        y.backward(x)  # any direction will do

    return forward if kind == FORWARD else train


def facts(c: Contestant, layer: nn.Module, batch: int, shape: Shape) -> Measured:
    """What a record says of its contestant besides the numbers."""
    return {
        "ours": c.ours,
        "note": c.note,
        "batch": batch,
        "width": shape.width,
        "heads": shape.heads,
        "chunk": shape.chunk,
        "parameters": sum(p.numel() for p in layer.parameters()),
    }


# ------------------------------------------------------------------------------------ decode


def decode_tasks(c: Contestant, layer: nn.Module, settings: Settings) -> list[Task]:
    """One token after another, batch 1, for a whole chunk: its end costs more than its inside."""
    tokens = settings.shape.chunk
    return [
        Task(
            c.name, DECODE, position,
            run=partial(_decode, c, layer, tokens, *_seen(c, layer, position, settings.shape)),
            amount=1000 / tokens, unit="ms/token", group=DECODE, rate=False, metric="latency",
            lenient=not c.ours or c.compiled, facts=facts(c, layer, 1, settings.shape),
        )
        for position in c.decode
    ]  # fmt: skip


@torch.no_grad()
def _decode(c: Contestant, layer: nn.Module, tokens: int, x: Tensor, state: Any) -> None:
    for _ in range(tokens):
        _, state = c.step(layer, x, state)


@torch.no_grad()
def _seen(c: Contestant, layer: nn.Module, position: int, shape: Shape) -> tuple[Tensor, Any]:
    """One token [1, 1, width], and the state after so many.

    Where the state's size does not grow, a far position is a near one with another number in it:
    the cost cannot know what was read, only how much, and that is the number.
    """
    generator = torch.Generator().manual_seed(position)
    read = position if c.grows else min(position, 100)
    past = torch.randn(1, read, shape.width, generator=generator)
    _, state = c.step(layer, past, None)
    return past[:, -1:], state if read == position else at_position(state, position)


def at_position(state: Any, position: int) -> Any:
    """The state tree with this number in every field that counts tokens."""
    if not isinstance(state, tuple):
        return state
    names = getattr(state, "_fields", None)
    if names is None:
        return tuple(at_position(part, position) for part in state)
    counts = {"position", "seq_index"}
    parts = [position if n in counts else at_position(v, position) for n, v in zip(names, state)]
    build: Any = type(state)
    return build(*parts)


# ------------------------------------------------------------------------------------- model


def model_tasks(settings: Settings) -> list[Task]:
    """Training steps of the quickstart's Hope and its Transformer of the same parameters."""
    hope, transformer = quick_models(256, settings.model_size)
    torch.manual_seed(0)
    ours = HopeLM(hope.config)
    count = ours.parameter_count()
    models = {"Hope": ours}
    models["Transformer"] = HopeLM(with_parameters(transformer.config, count))
    found = []
    for name, model in models.items():
        config = TrainConfig(lr=1e-6)  # small: random bytes have nothing to teach
        optimizer = adamw(model, config, torch.device("cpu"))
        for length in settings.model_lengths:
            about = {"ours": name != "Transformer", "note": "", "batch": settings.model_batch,
                     "width": hope.config.dim, "heads": hope.config.heads,
                     "chunk": hope.config.mixer.chunk,
                     "parameters": model.parameter_count()}  # fmt: skip
            found.append(
                Task(
                    name, STEP, length,
                    run=training_step(model, optimizer, settings.model_batch, length, config.clip),
                    amount=1.0, unit="s/step", group=f"{STEP} {length}", rate=False,
                    metric="time", lenient="compiled" in name, facts=about,
                )
            )  # fmt: skip
    return found


def training_step(
    model: HopeLM, optimizer: torch.optim.Optimizer, batch: int, length: int, clip: float
) -> Callable[[], Any]:
    """Forward, backward, clipping and AdamW on random bytes, as the training loop does it."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 256, (batch, length + 1), generator=generator)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits, _ = model(ids[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()

    return step


# ------------------------------------------------------------------------------- operations


def peak_tasks(size: int) -> list[Task]:
    """The machine's matrix products in float32: one large, and many of a chunk's size at once."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for name, shape in ((LARGE, (1, size, size)), (SMALL, (40, 64, 64))):
        a = torch.randn(*shape, generator=generator)
        a = a[0] if shape[0] == 1 else a
        found.append(
            Task(
                name, PEAK, None, run=partial(torch.matmul, a, a), unit="GFLOP/s", group=PEAK,
                amount=2e-9 * shape[0] * shape[1] ** 3, facts={"size": list(shape)},
            )
        )  # fmt: skip
    return found


def counted_flops(c: Contestant, length: int, batch: int, shape: Shape) -> int:
    """FLOPs of the matrix products of one forward + backward.

    What torch's counter knows: mm, bmm and their kin, 2 for each multiply-add. Elementwise work and
    triangular solves are not in it, so a share of the peak that is computed from it is a lower
    bound of what the machine does.
    """
    plain = replace(c, compiled=False)
    run = pass_through(plain, plain.make(shape), TRAIN, length, batch, shape)
    in_place = {  # not among those that torch counts
        torch.ops.aten.baddbmm_: lambda total, a, b, **_: 2 * math.prod(total) * a[-1]
    }
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    counts = counter.get_flop_counts().get("Global", {})
    return sum(n for op, n in counts.items() if "mm" in str(op))


def share_records(
    entrants: Sequence[Contestant], found: Sequence[Task], settings: Settings
) -> list[Measured]:
    """For our SelfModifyingTitans: counted FLOPs by time, in % of both peaks, round by round."""
    peaks = {t.contestant: t.values for t in found if t.kind == PEAK}
    counts: dict[tuple[str, int], int] = {}
    records = []
    for c in (c for c in entrants if c.name.startswith(OURS) and TRAIN in c.kinds):
        timed = [t for t in found if t.contestant == c.name and t.kind == TRAIN and t.values]
        for task in timed:
            assert task.length is not None
            base = min(timed, key=lambda t: t.length or 0).length or 1
            if (c.name, base) not in counts:  # the work is linear in the length: count the shortest
                counts[c.name, base] = counted_flops(c, base, settings.batch, settings.shape)
            per_token = counts[c.name, base] / (settings.batch * base)
            for name, values in peaks.items():
                shares = [1e-7 * per_token * v / p for v, p in zip(task.values, values)]
                records.append(
                    {"contestant": c.name, "kind": SHARE, "T": task.length, "metric": f"of {name}",
                     "unit": "%", **summary(shares), "dropped": "",
                     "flops_per_token": per_token, **task.facts}
                )  # fmt: skip
    return records
