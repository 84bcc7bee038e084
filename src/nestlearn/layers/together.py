"""Equal modules, such as the blocks of a model, that run as one: each is some of the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .. import state as tree


def together(modules: Sequence[Any], *args: Sequence[Any]) -> list[Any]:
    """What each of some equal modules makes of its own arguments, their memories' chunks as those
    of one module of more samples, where that can be: `together` of their class says how.
    """
    own = getattr(type(modules[0]), "together", None)
    if own is None or len(modules) == 1:
        return [module(*given) for module, *given in zip(modules, *args, strict=True)]
    return own(modules, *args)


_CALL: ContextVar[dict[Any, Any] | None] = ContextVar("what the parts of a call share")


@contextmanager
def one_call() -> Iterator[None]:
    """Calls in here are parts of one: what they make of parameters alone is made once."""
    token = _CALL.set({})
    try:
        yield
    finally:
        _CALL.reset(token)


def once(key: Any, make: Callable[[], Any]) -> Any:
    """make(), or what it gave in this call (`one_call`)."""
    made = _CALL.get(None)
    if made is None:
        return make()
    if key not in made:
        made[key] = make()
    return made[key]


def joined(trees: Sequence[Any]) -> Any:
    """Trees of tensors as one, of all their samples. A tensor that stands twice is joined once."""
    found: dict[tuple[int, ...], Tensor] = {}

    def of(*parts: Tensor) -> Tensor:
        key = tuple(map(id, parts))
        if key not in found:
            found[key] = torch.cat(parts)
        return found[key]

    return tree.tree_map(of, *trees)


def parted(whole: Any, rows: Sequence[int]) -> list[Any]:
    """What `joined` made, as it was: trees of so many samples."""
    parts = {id(x): x.split(list(rows)) for _, x in tree.leaves(whole) if isinstance(x, Tensor)}
    return [tree.tree_map(lambda x, i=i: parts[id(x)][i], whole) for i in range(len(rows))]
