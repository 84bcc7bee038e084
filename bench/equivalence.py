"""No speed without equality: what is timed must first compute what the definition says.

The same builders that are timed, at a small shape in float64: in chunks and token by token, in one
pass and in pieces; and compiled against not compiled, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn import state as tree
from nestlearn.scan import Writer

from .contestants import Contestant, Shape, compile_chunks

SMALL = Shape(width=16, heads=2, chunk=4)
B, T = 2, 21  # five chunks and a piece of one
EXACT = 1e-9  # in float64
SINGLE = 1e-4  # in float32, of the largest value of what is compared

Results = dict[str, Tensor]


def check_equivalence(entrants: Sequence[Contestant]) -> list[str]:
    """Compare each of our contestants with its definition; the failures, one line each."""
    failures = []
    for c in entrants:
        if not c.ours:
            continue
        checks: list[tuple[str, Callable[[Contestant], None]]] = (
            [("compiled ≠ not compiled", _compiled)]
            if c.compiled
            else [("chunks ≠ token by token", _chunks), ("pieces ≠ one pass", _pieces)]
        )
        for name, check in checks:
            try:
                check(c)
            except Exception as error:  # whatever it is: nothing is measured
                text = " ".join(str(error).split()) or type(error).__name__
                failures.append(f"{c.name}: {name}: {text[:300]}")
    if any(c.compiled for c in entrants):
        torch._dynamo.reset()  # what was compiled here is of another shape
    return failures


def _chunks(c: Contestant) -> None:
    """Chunk form ≡ naive form: outputs, final state, gradients of input and parameters."""
    layer, x = _layer(c, torch.float64)
    naive = deepcopy(layer)
    if _use_naive(naive):  # attention has no writer, so no other form
        _compare(results(c, layer, x), results(c, naive, x), EXACT)


def _pieces(c: Contestant) -> None:
    """One pass ≡ pieces that end inside chunks: outputs and final state."""
    layer, x = _layer(c, torch.float64)
    with torch.no_grad():
        y, state = c.step(layer, x, None)
        parts, carried = [], None
        for piece in x.split([5, 1, 9, T - 15], 1):
            part, carried = c.step(layer, piece, carried)
            parts.append(part)
    _compare({"y": torch.cat(parts, 1), **_leaves(carried)}, {"y": y, **_leaves(state)}, EXACT)


def _compiled(c: Contestant) -> None:
    """Compiled ≡ not compiled: as `_chunks`, and without a graph."""
    eager, x = _layer(replace(c, compiled=False), torch.float32)
    layer = deepcopy(eager)
    compile_chunks(layer)
    _compare(results(c, layer, x), results(c, eager, x), SINGLE)
    with torch.no_grad():
        _compare({"y": c.step(layer, x, None)[0]}, {"y": c.step(eager, x, None)[0]}, SINGLE)


def _layer(c: Contestant, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A small layer whose steps are made large, so that an error in a write is seen; its input."""
    layer = c.make(SMALL).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name, p in layer.named_parameters():
        if name.endswith("eta.bias"):
            nn.init.zeros_(p)
        if name.endswith(("gate", "meta_lr")) and p.ndim < 2:
            nn.init.normal_(p, 0.3, 0.1, generator=generator)
    return layer, torch.randn(B, T, SMALL.width, dtype=dtype, generator=generator)


def _use_naive(layer: nn.Module) -> bool:
    """Give every writer in the layer the token-by-token form; whether there is one."""
    found = False
    for module in layer.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Writer):
                setattr(module, name, replace(value, backend="naive"))
                found = True
    return found


def results(c: Contestant, layer: nn.Module, x: Tensor) -> Results:
    """Output, final state, and the gradients of a sum over both."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y, state = c.step(layer, x, None)
    found = {"y": y, **_leaves(state)}
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=x.dtype)
    for value in found.values():
        if value.requires_grad:
            loss = loss + (value * torch.randn(value.shape, generator=generator)).sum()
    loss.backward()
    found["gradient of x"] = _gradient(x)
    found |= {f"gradient of {n}": _gradient(p) for n, p in layer.named_parameters()}
    return {n: value.detach() for n, value in found.items()}


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def _leaves(state: Any) -> Results:
    found = {f"state.{path}": leaf for path, leaf in tree.leaves(state)}
    return {n: v if isinstance(v, Tensor) else torch.tensor(v) for n, v in found.items()
            if v is not None}  # fmt: skip


def _compare(found: Results, expected: Results, tolerance: float) -> None:
    if found.keys() != expected.keys():
        raise AssertionError(f"{sorted(found.keys() ^ expected.keys())} only in one of them")
    for name, right in expected.items():
        largest = float(right.abs().max()) if right.numel() else 0.0
        try:
            torch.testing.assert_close(
                found[name], right, rtol=0.0, atol=tolerance * max(1.0, largest)
            )
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
