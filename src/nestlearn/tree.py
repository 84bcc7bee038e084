"""The nodes of a state tree: what they are, how they are named, and a walk over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

Leaf = torch.Tensor | int | float | bool | str | None

CONTAINERS = frozenset({"namedtuple", "tuple", "list", "dict"})
_SCALARS: dict[type, str] = {t: t.__name__ for t in (bool, int, float, str)} | {type(None): "none"}


def kind_of(node: Any, path: str) -> str:
    if isinstance(node, torch.Tensor):
        return "tensor"
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return "namedtuple"
    if type(node) in (tuple, list):
        return type(node).__name__
    if type(node) is dict:
        for key in node:
            if not isinstance(key, str) or not key:
                raise ValueError(
                    f"{shown(path)}: the dict key {key!r} is not a non-empty str; "
                    "a state tree's dicts have str keys, so that paths can name their leaves"
                )
        return "dict"
    if type(node) in _SCALARS:
        return _SCALARS[type(node)]
    raise ValueError(
        f"{shown(path)}: a {type(node).__name__} is no part of a state tree; use NamedTuples, "
        "tuples, lists and dicts of tensors, ints, floats, bools, str or None"
    )


def children(node: Any, kind: str) -> list[tuple[str, Any]]:
    if kind == "namedtuple":
        return list(zip(node._fields, node))
    if kind == "dict":
        return list(node.items())
    return [(str(i), child) for i, child in enumerate(node)]


def rebuild(node: Any, kind: str, children: list[Any]) -> Any:
    if kind == "dict":
        return dict(zip(node, children))
    return type(node)(*children) if kind == "namedtuple" else type(node)(children)


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def shown(path: str) -> str:
    return path or "the root of the tree"


def walk(node: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    kind = kind_of(node, path)
    yield path, kind, node
    if kind in CONTAINERS:
        for name, child in children(node, kind):
            yield from walk(child, join(path, name))


def mapped(fn: Callable[..., Any], path: str, node: Any, rest: tuple[Any, ...]) -> Any:
    """Apply `fn(path, leaf, *rest_leaves)` to the tensors; the other leaves come from `node`."""
    kind = kind_of(node, path)
    for other in rest:
        _check_same_node(path, kind, node, other)
    if kind == "tensor":
        return fn(path, node, *rest)
    if kind not in CONTAINERS:
        return node
    others = [dict(children(other, kind)) for other in rest]
    parts = [
        mapped(fn, join(path, name), child, tuple(other[name] for other in others))
        for name, child in children(node, kind)
    ]
    return rebuild(node, kind, parts)


def _check_same_node(path: str, kind: str, node: Any, other: Any) -> None:
    summaries = [summary(kind_of(n, path), described(kind_of(n, path), n)) for n in (node, other)]
    if kind_of(other, path) != kind or (kind in CONTAINERS and summaries[0] != summaries[1]):
        raise ValueError(
            f"{shown(path)}: {summaries[0]} in one tree and {summaries[1]} in another; "
            "the trees must have the same structure"
        )


def described(kind: str, node: Any) -> Any:
    """What the file keeps of a node: names of children, a tensor's dtype and shape, a value."""
    if kind in CONTAINERS:
        return [name for name, _ in children(node, kind)]
    if kind == "tensor":
        return {"dtype": str(node.dtype).removeprefix("torch."), "shape": list(node.shape)}
    return node.hex() if kind == "float" else node  # hex: exact, and inf and nan are legal JSON


def summary(kind: str, detail: Any) -> str:
    if kind in ("namedtuple", "dict"):
        names = detail if kind == "namedtuple" else sorted(detail)
        return f"a {kind} of ({', '.join(names)})"
    if kind in CONTAINERS:
        return f"a {kind} of {len(detail)}"
    if kind == "tensor":
        shape = ["batch", *map(str, detail["shape"][1:])] if detail["shape"] else []
        return f"a {detail['dtype']} tensor [{', '.join(shape)}]"
    return f"a leaf of type {kind}"
