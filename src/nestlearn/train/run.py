"""The training loop, read top to bottom.

Step n is a function of the weights, the optimizer's state, the memory carried from the step before
(with stream > 1) and (seed, n) alone: the batch and every random draw are keyed by them. A resumed
run therefore repeats, bit for bit, what an uninterrupted one does on the same machine and number of
threads.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nestlearn.captured import Captured
from nestlearn.disk import atomic_write
from nestlearn.models import HopeLM
from nestlearn.train.carried import Carried
from nestlearn.train.checkpoint import Record, RunFolder
from nestlearn.train.config import TrainConfig, learning_rate
from nestlearn.train.data import Corpus, keyed_seed, restarts
from nestlearn.train.losses import evaluate, nats
from nestlearn.train.optimize import adamw
from nestlearn.train.plots import loss_curves
from nestlearn.train.terminal import Display, Interrupt


def train(
    model: nn.Module, corpus: Corpus, config: TrainConfig, out: Path | str | None, *,
    resume: bool = False, progress: bool = True, on_step: Callable[[Record], None] | None = None,
    optimizer: Callable[[nn.Module, TrainConfig], torch.optim.Optimizer] | None = None,
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
    memory = Carried(model, config) if config.stream > 1 else None
    carried = memory.state if memory else None
    folder, step, log = _open(model, run, corpus, config, out, resume, carried)
    model.train()
    gradients = _Gradients(model, config, memory)
    with _fork_rng(device), Interrupt() as interrupt, Display(config, step, progress) as display:
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
        _write_model(model, corpus, config, log, folder.out / "model")
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


class _Gradients:
    """The loss of a batch, with its gradients in `.grad`; and what is carried, carried on.

    On CUDA forward and backward are one graph.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, carried: Carried | None) -> None:
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
        losses, state = nats(self.model, ids, self.dtype, given)
        loss = losses.mean()
        loss.backward()
        return loss.detach(), state


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


def _validate(
    model: nn.Module, corpus: Corpus, windows: torch.Tensor, config: TrainConfig
) -> Record:
    loss, _ = evaluate(model, windows, config.batch, config.dtype)
    return {"val_loss": loss, "val_bits_per_byte": corpus.bits_per_byte(loss, "val")}


def _write_model(
    model: Any, corpus: Corpus, config: TrainConfig, log: list[Record], path: Path
) -> None:
    about = {"trained": _told(corpus, config, log)} if isinstance(model, HopeLM) else {}

    def write(temp: Path) -> None:
        temp.mkdir()
        model.save_pretrained(temp, **about)
        if corpus.tokenizer:
            corpus.tokenizer.save(temp)
        if path.exists():  # of a shorter run; should a kill fall here, --resume writes it again
            shutil.rmtree(path)

    atomic_write(path, write)


def _told(corpus: Corpus, config: TrainConfig, log: list[Record]) -> str:
    """How a model was trained, for its card."""
    text, said = corpus.describe(), asdict(config)
    lines = [
        f"{config.steps:,} steps of {config.batch} windows of {config.length} tokens, on "
        f"{text['train_tokens']:,} tokens of {text['files']} files named {text['name']} "
        f"(sha256 {text['sha256'][:16]}).",
    ]
    if log and "val_bits_per_byte" in log[-1]:
        lines += [f"On its validation text: {log[-1]['val_bits_per_byte']:.3f} bits per byte."]
    return "\n".join([*lines, "", *(f"* {name}: {value}" for name, value in said.items())])


def _fork_rng(device: torch.device) -> Any:
    """The caller's random state is as it was after training."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
