"""Parameters that live in parts on several processes (DTensor, as FSDP2 makes them).

Element-wise mathematics needs a process' own part only; what reads whole matrices gathers them.
A plain tensor passes through all of it untouched.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def local(t: Tensor) -> Tensor:
    """This process' part; it shares the storage."""
    return t.to_local() if isinstance(t, DTensor) else t


def gradient_of(p: Tensor) -> Tensor:
    """This process' part of p.grad, laid out as p is."""
    g = p.grad
    assert g is not None
    if not isinstance(p, DTensor):
        return g
    if not isinstance(g, DTensor):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is sharded but its gradient is not: let the "
            "backward pass of the sharded model make it"
        )
    if tuple(g.placements) != tuple(p.placements):
        g = g.redistribute(p.device_mesh, p.placements)
    return g.to_local()


def like(part: Tensor, p: Tensor) -> Tensor:
    """A process' part as a tensor that is laid out as p is."""
    if not isinstance(p, DTensor):
        return part
    return DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def whole_of(part: Tensor, p: Tensor) -> Tensor:
    """The whole of which `part` is this process' part; a collective where p is sharded."""
    whole = like(part, p)
    return whole.full_tensor() if isinstance(whole, DTensor) else whole


def own_part(whole: Tensor, p: Tensor) -> Tensor:
    """This process' part of what every process computed alike; no communication."""
    if not isinstance(p, DTensor):
        return whole
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()


def reduced(part: Tensor, p: Tensor) -> Tensor:
    """The sum over the parts of p of a number that each process has for its own."""
    if isinstance(p, DTensor):
        for axis, placement in enumerate(p.placements):
            if not isinstance(placement, Replicate):
                dist.all_reduce(part, group=p.device_mesh.get_group(axis))
    return part


def greatest(part: Tensor, p: Tensor) -> Tensor:
    """The greatest magnitude in the whole, a tensor without axes."""
    peak = part.abs().max() if part.numel() else part.new_zeros(())
    if isinstance(p, DTensor):
        for axis in range(p.device_mesh.ndim):
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=p.device_mesh.get_group(axis))
    return peak
