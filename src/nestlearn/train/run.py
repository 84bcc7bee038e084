"""The training loop, read top to bottom.

Step n is a function of the weights, the optimizer's state, the memory carried from the step before
(with stream > 1) and (seed, n) alone: the batch and every random draw are keyed by them. A resumed
run therefore repeats, bit for bit, what an uninterrupted one does on the same machine and number of
threads.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn

from nestlearn import state as tree
from nestlearn.disk import atomic_write
from nestlearn.scan import Writer
from nestlearn.train.checkpoint import Record, RunFolder
from nestlearn.train.data import Corpus, keyed_seed, restarts
from nestlearn.train.optimize import Captured, adamw, schedule
from nestlearn.train.plots import loss_curves

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_COUNTS = ("steps", "batch", "length", "stream", "eval_every", "eval_windows", "checkpoint_every")


@dataclass(frozen=True)
class TrainConfig:
    """How to train: AdamW, linear warmup, cosine decay, clipped gradients.

    steps: optimizer steps. batch, length: windows per step and tokens per window. lr: the peak;
    warmup: steps of the linear rise to it; final_lr: the share of lr at the last step.
    weight_decay: on matrices only (ndim >= 2, without `no_decay = True`). clip: the largest
    gradient norm. eval_every, checkpoint_every: in steps; the last step always does both.
    dtype: "float32", or "bfloat16" (autocast; weights stay float32). device: "auto" is CUDA
    where there is one, else Apple's GPU where it works, else the CPU. cuda_graph: on CUDA, capture
    a step's forward and backward.
    stream: windows that a row of the batch reads one after another with the model's memory carried
    from step to step, before it starts anew elsewhere (1: every window starts anew). So a model
    learns to go on in streams much longer than its windows. The gradient stays within a step: what
    was carried is data, and start values learn as if the memory were theirs plus a constant. Rows
    start anew at different steps; validation reads every window from the start.
    """

    steps: int = 500
    batch: int = 8
    length: int = 256
    lr: float = 3e-3
    warmup: int = 50
    final_lr: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    eval_every: int = 100
    eval_windows: int = 16
    checkpoint_every: int = 100
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    cuda_graph: bool = True
    stream: int = 1

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 1, name, value, "an integer of 1 or more")
        _require(self.warmup >= 0, "warmup", self.warmup, "0 or more steps")
        shorter = f"at most steps={self.steps}, e.g. warmup={self.steps // 10}"
        _require(self.warmup <= self.steps, "warmup", self.warmup, shorter)
        _require(0 < self.lr < math.inf, "lr", self.lr, "a positive learning rate, e.g. 3e-3")
        _require(0 <= self.final_lr <= 1, "final_lr", self.final_lr, "a share of lr, from 0 to 1")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        betas_ok = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(betas_ok, "betas", self.betas, "two numbers from 0 to below 1")
        _require(self.clip > 0, "clip", self.clip, "a positive norm (math.inf: no clipping)")
        _require(self.dtype in _DTYPES, "dtype", self.dtype, f"one of {', '.join(_DTYPES)}")


def _require(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r}: choose {remedy}")


def train(
    model: nn.Module,
    corpus: Corpus,
    config: TrainConfig,
    out: Path | str | None,
    *,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[Record], None] | None = None,
    optimizer: Callable[[nn.Module, TrainConfig], torch.optim.Optimizer] | None = None,
) -> list[Record]:
    """Train the model in place and return the log, one record per step.

    model: `logits, state = model(ids, state=None)` with ids int64 [B, T] and logits [B, T, V],
    and `save_pretrained(folder)`. out: the run's folder (config.json, log.jsonl, loss.png, model/
    and checkpoints/), None to write nothing. resume: go on from the newest whole checkpoint in
    out. on_step: called with each record. optimizer: makes one of the model's parameters instead of
    AdamW (its weight decay and betas are its own; its lr follows the schedule). A record has step,
    loss (nats per token), bits_per_byte, lr, grad_norm, tokens_per_second, and where evaluated
    val_loss and val_bits_per_byte.

    With config.stream > 1 the model also has `init_state(batch)`, a state tree, and takes it as
    `state`; checkpoints hold what is carried.

    ValueError where out already holds a run, cannot be resumed, or the text is too short, or with
    stream > 1 where the model's state grows with the stream (attention) or length is not a multiple
    of the tokens between its memories' updates and bounds;
    FloatingPointError at a loss that is not finite; KeyboardInterrupt, after a checkpoint, naming
    how to go on; OSError when the disk refuses. Checkpoints written so far are always kept.
    """
    device = resolve_device(config.device)
    model.to(device)
    run = optimizer(model, config) if optimizer else adamw(model, config, device)
    windows = corpus.val_windows(config.eval_windows, config.length)
    _batch(corpus, config, 0)  # a short text fails before any file
    memory = _Carried(model, config) if config.stream > 1 else None
    carried = memory.state if memory else None
    folder, step, log = _open(model, run, corpus, config, out, resume, carried)
    model.train()
    gradients = _Gradients(model, config, memory)
    with _fork_rng(device), _Interrupt() as interrupt, _Display(config, step, progress) as display:
        try:
            while step < config.steps:
                record = _update(model, run, corpus, config, step, gradients)
                step += 1
                if step % config.eval_every == 0 or step == config.steps:
                    record |= _validate(model, corpus, windows, config)
                log.append(record)
                if folder:
                    folder.append(record)
                    if step % config.checkpoint_every == 0 or step == config.steps:
                        folder.save(step, model, run, carried)
                display.show(record)
                if on_step:
                    on_step(record)
                interrupt.check()
        except KeyboardInterrupt:
            if folder is None or interrupt.forced:  # forced: this step may be half made
                raise
            path = folder.save(step, model, run, carried)
            raise KeyboardInterrupt(
                f"stopped after step {step} of {config.steps}, saved as {path}; go on with "
                "resume=True (the same command with --resume)"
            ) from None
    if folder:
        _write_model(model, corpus, folder.out / "model")
        loss_curves({folder.out.resolve().name: log}, folder.out / "loss.png")
    return log


def _open(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    corpus: Corpus,
    config: TrainConfig,
    out: Path | str | None,
    resume: bool,
    carried: Any,
) -> tuple[RunFolder | None, int, list[Record]]:
    """The run's folder, the steps already made and their log."""
    if out is None:
        if resume:
            raise ValueError("resume=True needs out, the folder of the run to go on with")
        return None, 0, []
    settings = getattr(getattr(model, "config", None), "to_dict", None)
    identity = {
        "train": asdict(config) | _other_than_adamw(optimizer),
        "corpus": corpus.describe(),
        "model": settings() if settings else None,
    }
    folder = RunFolder(Path(out), identity)
    if resume:
        return folder, *folder.resume(model, optimizer, carried)
    folder.start()
    return folder, 0, []


def _other_than_adamw(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """What a resumed run must use again, where it is not what the configuration says."""
    if isinstance(optimizer, torch.optim.AdamW):
        return {}
    return {"optimizer": f"{type(optimizer).__name__}({optimizer.defaults})"}


def _batch(corpus: Corpus, config: TrainConfig, step: int) -> torch.Tensor:
    return corpus.batch(step, config.batch, config.length, config.seed, config.stream)


def _update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    corpus: Corpus,
    config: TrainConfig,
    step: int,
    gradients: _Gradients,
) -> Record:
    """One optimizer step, the one after `step` others."""
    began = time.perf_counter()
    torch.manual_seed(keyed_seed(config.seed, step, 1))  # dropout and the like: no stored state
    device = next(model.parameters()).device
    ids = _batch(corpus, config, step).to(device)
    lr = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = gradients(ids, restarts(step, config.batch, config.stream))
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.clip))
    value = float(loss.detach())
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise FloatingPointError(
            f"the loss is {value} and the gradient norm {norm} at step {step + 1}: lower lr "
            f"(now {config.lr}), lengthen warmup (now {config.warmup}) or clip lower (now "
            f"{config.clip}); the checkpoints before it are kept"
        )
    optimizer.step()
    tokens = config.batch * config.length
    return {
        "step": step + 1,
        "loss": value,
        "bits_per_byte": corpus.bits_per_byte(value, "train"),
        "lr": lr,
        "grad_norm": norm,
        "tokens_per_second": round(tokens / (time.perf_counter() - began), 1),
    }


class _Carried:
    """What every row's memory holds from step to step, and what a step makes of it.

    state: tensors [batch, ...], always the same ones, written in place: a CUDA graph and a
    checkpoint that is loaded find them there. They are data, no part of a graph of gradients.
    """

    def __init__(self, model: Any, config: TrainConfig) -> None:
        _check_carries(model, config)
        self.model = model
        with torch.no_grad():  # clones: two leaves of a first state may be one tensor
            self.state = tree.tree_map(torch.clone, model.init_state(config.batch))
        device = next(model.parameters()).device
        self._anew = torch.ones(config.batch, dtype=torch.bool, device=device)

    def starts(self, anew: torch.Tensor) -> None:
        """Say which rows start anew at the next step, bool [batch]."""
        self._anew.copy_(anew)

    def given(self) -> Any:
        """Return the state that the step begins with, differentiable in the start values."""
        return tree.tree_map(self._given, self.model.init_state(len(self._anew)), self.state)

    def _given(self, fresh: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
        anew = self._anew.view(-1, *[1] * (fresh.ndim - 1))
        with torch.no_grad():  # a choice, no factor: a row that starts anew takes nothing over
            value = torch.where(anew, fresh, carried)
        if not fresh.is_floating_point():
            return value
        return value + (fresh - fresh.detach())  # a zero with the gradient of the start value

    def take(self, state: Any) -> None:
        """Carry the state that the step ended with."""
        with torch.no_grad():
            tree.tree_map(lambda mine, new: mine.copy_(new), self.state, state)


def _check_carries(model: nn.Module, config: TrainConfig) -> None:
    """Refuse, by ValueError, a model whose memory cannot be carried, and a length that cuts it."""
    given = f"stream={config.stream}"
    if not hasattr(model, "init_state"):
        raise ValueError(f"{given}: {type(model).__name__} has no init_state(batch); use stream=1")
    before, after = _shapes_around_a_token(model)
    for path, shape in before.items():
        if after.get(path) != shape:
            raise ValueError(
                f"{given}: the model's state grows with the stream (state.{path} has shape {shape} "
                f"before a token and {after.get(path)} after it), as attention's cache does, and "
                "is not carried from step to step; use stream=1, or a mixer with a memory of fixed "
                "size"
            )
    # A step begins at position 0 again, so it has to end where every chunk and bound does.
    period = math.lcm(*_periods(model))
    if config.length % period:
        raise ValueError(
            f"length={config.length}: with {given} give a multiple of {period}, so that every "
            "window ends where the chunks, bounds and fades of the model's memories do"
        )


def _shapes_around_a_token(model: Any) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of the state's tensors before and after one token."""
    device = next(model.parameters()).device
    with _evaluating(model), torch.no_grad():
        before = model.init_state(1)
        _, after = model(torch.zeros(1, 1, dtype=torch.int64, device=device), state=before)
    return [
        {path: tuple(x.shape) for path, x in tree.leaves(state) if isinstance(x, torch.Tensor)}
        for state in (before, after)
    ]


def _periods(model: nn.Module) -> list[int]:
    """After how many tokens each memory of the model is at a chunk's end, its bound, its fade."""
    writers, fades = [], []
    for module in model.modules():
        fades.append(getattr(module, "fade_every", None) or 1)
        groups = getattr(module, "groups", ())  # a number in a convolution of torch
        parts = (module, *groups) if isinstance(groups, tuple) else (module,)
        writers += [getattr(part, "writer", None) for part in parts]
    ends = [w.chunk if w.bound is None else w.bounded for w in writers if isinstance(w, Writer)]
    return [*ends, *fades]


class _Gradients:
    """The loss of a batch, with its gradients in `.grad`; and what is carried, carried on.

    On CUDA forward and backward are one graph.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, carried: _Carried | None) -> None:
        self.model, self.dtype, self.carried = model, config.dtype, carried
        self.captures = config.cuda_graph and next(model.parameters()).is_cuda
        self._graph: Captured | None = None

    def __call__(self, ids: torch.Tensor, anew: torch.Tensor) -> torch.Tensor:
        """ids [B, T + 1]. anew: the rows that start anew, bool [B]."""
        if self.carried:
            self.carried.starts(anew)
        if not self.captures:
            return self._step(ids)
        if self._graph is None:  # the runs before the capture carry nothing on
            self._graph = Captured(self.model, self._step, ids, first=self._run)
        return self._graph(ids)

    def _step(self, ids: torch.Tensor) -> torch.Tensor:
        loss, state = self._run(ids)
        if self.carried:
            self.carried.take(state)
        return loss

    def _run(self, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        for parameter in self.model.parameters():
            parameter.grad = None
        given = self.carried.given() if self.carried else None
        losses, state = _nats(self.model, ids, self.dtype, given)
        loss = losses.mean()
        loss.backward()
        return loss.detach(), state


def _nats(
    model: nn.Module, windows: torch.Tensor, dtype: str, state: Any = None
) -> tuple[torch.Tensor, Any]:
    """Cross entropy at every position of windows [B, T + 1], in nats, float32 [B, T]; the state."""
    with torch.autocast(windows.device.type, _DTYPES[dtype], enabled=dtype != "float32"):
        logits, state = model(windows[:, :-1], state=state)
    flat = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return flat.view(windows.shape[0], -1), state


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of the update after `step` others: linear to lr, then cosine to the end."""
    return config.lr * schedule(step, config.steps, config.warmup, final=config.final_lr)


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


@torch.no_grad()
def evaluate(
    model: nn.Module, windows: torch.Tensor, batch: int = 8, dtype: str = "float32"
) -> tuple[float, torch.Tensor]:
    """Return the mean loss over windows int64 [N, T + 1], and by position, in nats per token [T].

    batch: windows at once. Every module's training mode is put back afterwards.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows has shape {tuple(windows.shape)}; pass [N >= 1, T + 1 >= 2]")
    _require(dtype in _DTYPES, "dtype", dtype, f"one of {', '.join(_DTYPES)}")
    device = next(model.parameters()).device
    with _evaluating(model):
        total = torch.zeros(windows.shape[1] - 1, dtype=torch.float64)
        for part in windows.split(batch):
            losses, _ = _nats(model, part.to(device), dtype)
            total += losses.cpu().double().sum(0)  # Apple's GPU has no float64
    by_position = total / windows.shape[0]
    return float(by_position.mean()), by_position.float()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's own mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _validate(
    model: nn.Module, corpus: Corpus, windows: torch.Tensor, config: TrainConfig
) -> Record:
    loss, _ = evaluate(model, windows, config.batch, config.dtype)
    return {"val_loss": loss, "val_bits_per_byte": corpus.bits_per_byte(loss, "val")}


def _write_model(model: Any, corpus: Corpus, path: Path) -> None:
    def write(temp: Path) -> None:
        temp.mkdir()
        model.save_pretrained(temp)
        if corpus.tokenizer:
            corpus.tokenizer.save(temp)
        if path.exists():  # of a shorter run; should a kill fall here, --resume writes it again
            shutil.rmtree(path)

    atomic_write(path, write)


def _fork_rng(device: torch.device) -> Any:
    """The caller's random state is as it was after training."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


class _Interrupt:
    """Holds Ctrl-C until a step is whole; a second one does not wait."""

    def __init__(self) -> None:
        self.asked = self.forced = False
        self._before: Any = None

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():  # only there signals arrive
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self.forced = self.asked
        self.asked = True
        if self.forced:
            raise KeyboardInterrupt

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt


class _Display:
    """A progress bar on stderr, and a line for every validation."""

    def __init__(self, config: TrainConfig, step: int, shown: bool) -> None:
        self._bar: Progress | None = None
        if shown:
            self._bar = Progress(
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[rate]} tokens/s"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(
                "", total=config.steps, completed=step, loss="–", rate="–"
            )

    def __enter__(self) -> _Display:
        (self._bar or nullcontext()).__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar:
            self._bar.__exit__(*error)

    def show(self, record: Record) -> None:
        if self._bar is None:
            return
        rate = f"{record['tokens_per_second']:,.0f}"
        loss = f"{record['loss']:.3f}"
        self._bar.update(self._task, completed=record["step"], loss=loss, rate=rate)
        if "val_loss" in record:
            bits = record["val_bits_per_byte"]
            more = f" ({bits:.3f} bits per byte)" if bits is not None else ""
            text = f"step {record['step']}: validation loss {record['val_loss']:.3f} nats{more}"
            self._bar.console.print(text, highlight=False)
