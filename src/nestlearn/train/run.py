"""The training loop, read top to bottom.

Step n is a function of the weights, the optimizer's state, the memory carried from the step before
(with stream > 1) and (seed, n) alone: the batch and every random draw are keyed by them. A resumed
run therefore repeats, bit for bit, what an uninterrupted one does on the same machine and number of
threads. Several processes (ranks) read a share of the same batch each: their number changes a step
by rounding alone.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nestlearn import state as tree
from nestlearn.captured import Captured
from nestlearn.disk import atomic_write
from nestlearn.train.carried import Carried
from nestlearn.train.checkpoint import Record
from nestlearn.train.config import TrainConfig, learning_rate
from nestlearn.train.data import Corpus, keyed_seed, restarts
from nestlearn.train.folder import RunFolder, weights
from nestlearn.train.losses import cast, evaluate, evaluating, nats
from nestlearn.train.meters import Meters
from nestlearn.train.optimize import adamw
from nestlearn.train.parallel import Engine, in_parts, shard, shares, whole
from nestlearn.train.plots import loss_curves
from nestlearn.train.ranks import ALONE, Ranks
from nestlearn.train.terminal import Display, Interrupt

_STOPPED = (
    "stopped after step {} of {}, saved as {}; go on with resume=True (the same command with "
    "--resume)"
)


def train(
    model: nn.Module, corpus: Corpus, config: TrainConfig, out: Path | str | None, *,
    resume: bool = False, progress: bool = True, on_step: Callable[[Record], None] | None = None,
    optimizer: Callable[[nn.Module, TrainConfig], Optimizer] | None = None,
) -> list[Record]:  # fmt: skip
    """Train the model in place and return the log, one record per step.

    model: `logits, state = model(ids, state=None)` with ids int64 [B, T] and logits [B, T, V],
    and `save_pretrained(folder)`. out: the run's folder (config.json, log.jsonl, loss.png, model/
    and checkpoints/), None to write nothing. resume: go on from the newest whole checkpoint in
    out. on_step: called with each record. optimizer: makes one of the model's parameters instead of
    AdamW (its weight decay and betas are its own; its lr follows the schedule). A record has step,
    loss (nats per token), bits_per_byte, lr, grad_norm, tokens_per_second, and where evaluated
    val_loss and val_bits_per_byte.

    With config.stream > 1 the model also has `init_state(batch)`, a state tree, and takes it as
    `state`; checkpoints hold what is carried. In a process group every process calls this alike:
    each reads its rows of every batch, rank 0 alone writes and shows anything, and with
    config.parallel "fsdp" the model is left in parts.

    ValueError where out already holds a run, cannot be resumed, or the text is too short, or with
    stream > 1 for a state that grows (attention) or a length that is no multiple of the tokens
    between two updates; FloatingPointError at a loss that is not finite; KeyboardInterrupt, after a
    checkpoint, naming how to go on; OSError when the disk refuses. Checkpoints are always kept.
    """
    run = _Run(model, corpus, config, optimizer)
    ranks, carried = run.ranks, run.memory.state if run.memory else None
    folder, step, log = run.open(out, resume, carried)
    eager = _Gradients(model.train(), config, run.memory, ranks)
    gradients = _InOneGraph(eager) if eager.captures else eager
    display = Display(config, step, progress and ranks.first, run.meters)
    writing = folder or contextlib.nullcontext()  # ends before the run does, whatever comes
    alone = torch.random.fork_rng([run.device] if run.device.type == "cuda" else [])
    with alone, Interrupt(ranks) as interrupt, run.meters.traced(out), display, writing:
        try:
            while step < config.steps:
                began = time.perf_counter()
                loss = gradients(*run.begin(step))
                record = run.update(step, loss, began)
                step += 1
                record |= run.validate(step)
                log.append(record)
                if folder:
                    folder.append(record)
                    if step % config.checkpoint_every == 0 or step == config.steps:
                        folder.save(step, model, run.optimizer, carried, later=True)
                run.meters.step(record)
                display.show(record)
                if on_step:
                    on_step(record)
                interrupt.check(folder is not None and folder.failed)
        except KeyboardInterrupt:
            if folder is None or interrupt.forced:  # forced: this step may be half made
                raise
            path = folder.save(step, model, run.optimizer, carried)
            raise KeyboardInterrupt(_STOPPED.format(step, config.steps, path)) from None
    if folder:
        folder.settle()
        ranks.first_says(lambda: run.finish(folder, log))
    return log


class _Run:
    """The parts of a training, where it runs; and what is done before and after gradients.

    kept: the model that is written at the end, `model` itself or, where ranks hold parts of that, a
    whole one on the first rank that stands at the start.
    """

    def __init__(
        self, model: nn.Module, corpus: Corpus, config: TrainConfig,
        make: Callable[[nn.Module, TrainConfig], Optimizer] | None,
    ) -> None:  # fmt: skip
        self.model, self.corpus, self.config = model, corpus, config
        self.ranks, self.device = Ranks.here(), resolve_device(config.device)
        self.meters = Meters(model, config, self.device, self.ranks)
        self.kept: Any = model
        if shares(model, config, self.device, self.ranks):
            self.kept = copy.deepcopy(model).cpu() if self.ranks.first else None
            shard(model, self.device, self.ranks)
        else:
            model.to(self.device)
        self.optimizer = make(model, config) if make else adamw(model, config, self.device)
        self.windows = corpus.val_windows(config.eval_windows, config.length)
        _batch(corpus, config, 0)  # a short text fails before any file
        self.memory = Carried(model, config, self.ranks) if config.stream > 1 else None

    def open(
        self, out: Path | str | None, resume: bool, carried: Any
    ) -> tuple[RunFolder | None, int, list[Record]]:
        """The run's folder, the steps already made and their log."""
        if out is None:
            if resume:
                raise ValueError("resume=True needs out, the folder of the run to go on with")
            return None, 0, []
        settings = getattr(getattr(self.model, "config", None), "to_dict", None)
        identity = {
            "train": asdict(self.config) | _other_than_adamw(self.optimizer),
            "corpus": self.corpus.describe(),
            "model": settings() if settings else None,
        }
        folder = RunFolder(Path(out), identity, self.ranks)
        if resume:
            return folder, *folder.resume(self.model, self.optimizer, carried)
        folder.start()
        return folder, 0, []

    def begin(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A rank's rows of the batch after `step` others, and which rows of the whole batch start
        anew; the step's rate and draws are set.
        """
        config, ranks = self.config, self.ranks
        draws = () if ranks.first else (ranks.rank,)
        torch.manual_seed(keyed_seed(config.seed, step, 1, *draws))  # dropout and such: not stored
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        ids = _batch(self.corpus, config, step)[ranks.rows(config.batch)].to(self.device)
        return ids, restarts(step, config.batch, config.stream, config.stream_from)

    def update(self, step: int, loss: torch.Tensor, began: float) -> Record:
        """The optimizer's step, by the gradients that are there; what to say of the whole step."""
        config = self.config
        norm = float(whole(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)))
        losses = self.ranks.gather(float(loss))
        value = sum(losses) / self.ranks.size
        if not (math.isfinite(value) and math.isfinite(norm)):
            where = [str(rank) for rank, each in enumerate(losses) if not math.isfinite(each)]
            whose = f" on rank {', '.join(where)}" if where and self.ranks.size > 1 else ""
            raise FloatingPointError(
                f"the loss is {value}{whose} and the gradient norm {norm} at step {step + 1}: "
                f"lower lr (now {config.lr}), lengthen warmup (now {config.warmup}) or clip lower "
                f"(now {config.clip}); the checkpoints before it are kept"
            )
        self.optimizer.step()
        tokens = config.batch * config.length
        return {
            "step": step + 1,
            "loss": value,
            "bits_per_byte": self.corpus.bits_per_byte(value, "train"),
            "lr": learning_rate(config, step),
            "grad_norm": norm,
            "tokens_per_second": round(tokens / (time.perf_counter() - began), 1),
        }

    def validate(self, step: int) -> Record:
        """The loss on the validation text; nothing where none is due after so many steps."""
        config = self.config
        if step % config.eval_every and step < config.steps:
            return {}
        if self.ranks.size == 1:
            loss, _ = evaluate(self.model, self.windows, config.batch, config.dtype)
        else:
            loss = self._evaluate_shares()
        return {"val_loss": loss, "val_bits_per_byte": self.corpus.bits_per_byte(loss, "val")}

    @torch.no_grad()
    def _evaluate_shares(self) -> float:
        """The mean loss, each rank having read as many windows: the last again to make up a
        number.
        """
        model, windows, ranks = self.model, self.windows, self.ranks
        device = next(model.parameters()).device
        own = torch.arange(-(-len(windows) // ranks.size)) * ranks.size + ranks.rank
        total = 0.0
        with evaluating(model):
            for numbers in own.split(self.config.batch // ranks.size):
                some = windows[numbers.clamp(max=len(windows) - 1)].to(device)
                with cast(device, self.config.dtype):
                    logits, _ = model(some[:, :-1])
                losses = nats(logits, some).double().mean(1)
                total += float(losses[(numbers < len(windows)).to(device)].sum())
        return sum(ranks.gather(total)) / len(windows)

    def finish(self, folder: RunFolder, log: list[Record]) -> None:
        """Write what a whole run leaves: the model and the picture of its losses."""
        if self.kept is not self.model:
            self.kept.load_state_dict(weights(folder.path(log[-1]["step"])))
        tells = "trained" in inspect.signature(self.kept.save_pretrained).parameters
        about = {"trained": self._told(log)} if tells else {}
        path = folder.out / "model"

        def write(temp: Path) -> None:
            temp.mkdir()
            self.kept.save_pretrained(temp, **about)
            if self.corpus.tokenizer:
                self.corpus.tokenizer.save(temp)
            if path.exists():  # of a shorter run; should a kill fall here, --resume writes it again
                shutil.rmtree(path)

        atomic_write(path, write)
        loss_curves({folder.out.resolve().name: log}, folder.out / "loss.png")

    def _told(self, log: list[Record]) -> str:
        """How a model was trained, for its card."""
        config, text = self.config, self.corpus.describe()
        lines = [
            f"{config.steps:,} steps of {config.batch} windows of {config.length} tokens, on "
            f"{text['train_tokens']:,} tokens of {text['files']} files named {text['name']} "
            f"(sha256 {text['sha256'][:16]})."
        ]
        if log and "val_bits_per_byte" in log[-1]:
            lines += [f"On its validation text: {log[-1]['val_bits_per_byte']:.3f} bits per byte."]
        settings = (f"* {name}: {value}" for name, value in asdict(config).items())
        return "\n".join([*lines, "", *settings])


def _other_than_adamw(optimizer: Optimizer) -> dict[str, str]:
    """What a resumed run must use again, where it is not what the configuration says."""
    if isinstance(optimizer, torch.optim.AdamW):
        return {}
    return {"optimizer": f"{type(optimizer).__name__}({optimizer.defaults})"}


def _batch(corpus: Corpus, config: TrainConfig, step: int) -> torch.Tensor:
    return corpus.batch(step, config.batch, config.length, config.seed, config.stream)


class _Gradients:
    """A rank's loss, and its gradients in `.grad`, means over ranks; what is carried goes on."""

    def __init__(
        self, model: nn.Module, config: TrainConfig, carried: Carried | None, ranks: Ranks = ALONE
    ) -> None:
        self.model, self.carried, self.ranks = model, carried, ranks
        self.parts, self.dtype = config.accumulate, config.dtype
        first = next(model.parameters())
        self.captures = config.cuda_graph and first.is_cuda and not in_parts(first)
        self.engine = Engine(model, ranks, by_hand=self.captures)

    def __call__(
        self, ids: torch.Tensor, anew: torch.Tensor | None = None, takes: bool = True
    ) -> torch.Tensor:
        """ids: a rank's rows [b, T + 1]. anew: the batch's rows that start anew, bool [B] (None:
        said before). takes: whether what is carried goes on.
        """
        if self.carried and anew is not None:
            self.carried.starts(anew)
        for parameter in self.model.parameters():
            parameter.grad = None
        count = len(ids) // self.parts
        losses = []
        for begin in range(0, len(ids), count):
            rows = slice(begin, begin + count)
            windows, read = ids[rows], ids[rows, :-1]
            with self.engine.averages(now=begin + count == len(ids)):
                given = self.carried.given(rows) if self.carried else None
                with cast(ids.device, self.dtype):
                    logits, state = self.engine.ready(read, given)(read, state=given)
                state = tree.detach(state) if self.carried else None  # no graph of it is kept
                loss = nats(logits, windows).mean()
                del logits  # room for the backward pass
                (loss / self.parts).backward()
            losses.append(loss.detach())
            if self.carried and takes:
                self.carried.take(state, rows)
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0]


class _InOneGraph:
    """The same on CUDA, forward and backward as one graph; not for a model in parts."""

    def __init__(self, gradients: _Gradients) -> None:
        self.gradients = gradients
        self._graph: Captured | None = None

    def __call__(self, ids: torch.Tensor, anew: torch.Tensor) -> torch.Tensor:
        own = self.gradients
        if own.carried:
            own.carried.starts(anew)
        if self._graph is None:  # the runs before the capture carry nothing on
            self._graph = Captured(own.model, own, ids, first=partial(own, takes=False))
        loss = self._graph(ids)
        if own.ranks.size > 1:
            own.ranks.average(own.model)
        return loss


def resolve_device(name: str) -> torch.device:
    """Return the device that a name means, "auto" included; ValueError if it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if _apple_works() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r} is not usable ({reason}); try auto or cpu") from error
    return device


def _apple_works() -> bool:
    """Whether Apple's GPU is there, and runs, forward and backward, what memories are made of."""
    if not torch.backends.mps.is_available():
        return False
    try:
        x = torch.eye(4, device="mps").requires_grad_()
        y = torch.linalg.solve_triangular(x, x, upper=False, unitriangular=True)
        (y.cumsum(0).exp() @ torch.linalg.vector_norm(x, dim=0)).sum().backward()
        return bool(x.grad is not None and x.grad.isfinite().all())
    except (RuntimeError, NotImplementedError, TypeError):
        return False
