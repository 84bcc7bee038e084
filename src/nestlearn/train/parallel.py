"""One model on many ranks: whole on each (DDP), or in parts (FSDP2); and its tensors, whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from nestlearn import state as tree
from nestlearn.train.config import TrainConfig
from nestlearn.train.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_TRAINED = 16  # bytes of a float32 weight with its gradient and AdamW's two moments


def shares(model: nn.Module, config: TrainConfig, device: torch.device, ranks: Ranks) -> bool:
    """Whether the ranks hold parts of the model; `auto`: where a whole one would fill half a card.

    ValueError where the ranks and `accumulate` do not divide the batch.
    """
    parts = ranks.size * config.accumulate
    if config.batch % parts:
        raise ValueError(
            f"batch={config.batch}: choose a multiple of {parts}, the number of processes "
            f"({ranks.size}) times accumulate ({config.accumulate})"
        )
    if ranks.size == 1 or config.parallel != "auto":
        return ranks.size > 1 and config.parallel == "fsdp"
    if device.type != "cuda":
        return False
    room = torch.cuda.get_device_properties(device).total_memory
    return _TRAINED * sum(p.numel() for p in model.parameters()) > room / 2


def shard(model: nn.Module, device: torch.device, ranks: Ranks) -> None:
    """Leave each rank its part of every parameter, in place, a block at a time (FSDP2).

    A block is gathered when it is run. The blocks are the model's `blocks`, if it has such.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (ranks.size,))
    said = {name: dict(vars(p)) for name, p in model.named_parameters()}
    for part in (*getattr(model, "blocks", ()), model):
        fully_shard(part, mesh=mesh)
        if hasattr(part, "init_state"):  # start values are parameters, too
            register_fsdp_forward_method(part, "init_state")
    for name, p in model.named_parameters():  # `no_decay` and the like
        vars(p).update(said[name])


def in_parts(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether each rank has a part of it. The type of such tensors takes longer to load than all
    else of training: where nobody has loaded it, nothing is in parts.
    """
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of which a rank has a part; a collective where it is in parts."""
    return tensor.full_tensor() if in_parts(tensor) else tensor


def laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor, where `like` is in parts and has its shape."""
    if not in_parts(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


class Detached(nn.Module):
    """(logits, state as data): DDP wraps it, which takes what an output depends on for trained."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        logits, after = self.model(ids, state=state)
        return logits, None if state is None else tree.detach(after)


class Engine:
    """Runs a model so that the backward pass averages gradients over ranks."""

    def __init__(self, model: nn.Module, ranks: Ranks, by_hand: bool = False) -> None:
        """by_hand: the caller averages (a CUDA graph holds one rank's work alone)."""
        self.run = model
        self.sharded = any(in_parts(p) for p in model.parameters())
        self._wraps = ranks.size > 1 and not self.sharded and not by_hand

    def ready(self, ids: torch.Tensor, state: Any) -> nn.Module:
        """What to call with these ids and this state; at the first call DDP looks at what it is."""
        if self._wraps:
            self._wraps = False
            self.run = _ddp(Detached(self.run), ids, state)
        return self.run

    @contextmanager
    def averages(self, now: bool) -> Iterator[None]:
        """Within: whether a backward pass averages, or leaves that to a later one."""
        if self.sharded:
            self.run.set_requires_gradient_sync(now)  # type: ignore[operator]
        wrapped = isinstance(self.run, nn.parallel.DistributedDataParallel)
        with self.run.no_sync() if wrapped and not now else nullcontext():  # type: ignore[operator]
            yield


def _ddp(run: nn.Module, ids: torch.Tensor, state: Any) -> nn.Module:
    """DDP around `run`, told whether some parameters get no gradient: it would wait for them."""
    with torch.random.fork_rng([ids.device] if ids.is_cuda else []):
        logits, _ = run(ids, state)
    reached, seen, todo = set(), set(), [logits.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))
            todo += [before for before, _ in node.next_functions]
    unused = any(p.requires_grad and id(p) not in reached for p in run.parameters())
    return nn.parallel.DistributedDataParallel(run, find_unused_parameters=unused)
