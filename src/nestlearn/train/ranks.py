"""The processes that train one model together (ranks), and how one of them speaks for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from nestlearn import state as tree

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process' number among `size`; the group is torch.distributed's default one."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """The group that this process has joined; alone, if none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """This rank's share of `count` rows, which `size` divides."""
        own = count // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def first_says(self, work: Callable[[], T]) -> T:
        """What `work` returns, or raises, on rank 0: there alone it runs, here it is the same."""
        if self.size == 1:
            return work()
        said: list[Any] = [None, None]
        if self.first:
            try:
                said[0] = work()
            except Exception as error:
                error.rank = 0  # type: ignore[attr-defined]  # whose it is, wherever it is shown
                said[1] = error
        dist.broadcast_object_list(said)
        if said[1] is not None:
            raise said[1]
        return said[0]

    def gather(self, value: float) -> list[float]:
        """Every rank's value."""
        if self.size == 1:
            return [value]
        device = "cpu" if "gloo" in str(dist.get_backend_config()) else "cuda"
        own = torch.tensor(value, dtype=torch.float64, device=device)
        values = own.new_empty(self.size)
        dist.all_gather(list(values.unbind()), own)
        return values.tolist()

    def concat(self, state: Any) -> Any:
        """On rank 0 the rows of all ranks' states, on the CPU, in the order of ranks."""
        if self.size == 1 or state is None:
            return state
        parts: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(tree.to(tree.detach(state), "cpu"), parts)
        return state if parts is None else tree.concat(parts)

    def average(self, model: nn.Module) -> None:
        """Let every gradient be the mean over ranks, by one message for each dtype."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for dtype in dict.fromkeys(g.dtype for g in gradients):
            some = [g for g in gradients if g.dtype == dtype]
            flat = torch.cat([g.flatten() for g in some])
            dist.all_reduce(flat)
            means = (flat / self.size).split([g.numel() for g in some])
            for gradient, mean in zip(some, means):
                gradient.copy_(mean.view_as(gradient))


ALONE = Ranks()
