"""State trees: what a streaming model carries from chunk to chunk, as plain data.

A state tree is any nesting of NamedTuples, tuples, lists and dicts (str keys) whose leaves are
tensors, ints, floats, bools, str or None. Every function here is pure: it returns a new tree.
A leaf is named by its dotted path, e.g. `layers.0.memory.W`. Every tensor with at least one
axis has the batch first; what is not per sample belongs in an int, float, bool or str leaf.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from nestlearn.disk import atomic_write

Leaf = torch.Tensor | int | float | bool | str | None
Rows = torch.Tensor | Sequence[int] | slice
T = TypeVar("T")

_FORMAT = "nestlearn-state"
_VERSION = "1"
_CONTAINERS = frozenset({"namedtuple", "tuple", "list", "dict"})
_SCALARS: dict[type, str] = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    type(None): "none",
}


def _kind(node: Any, path: str) -> str:
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
                    f"{_show(path)}: the dict key {key!r} is not a non-empty str; "
                    "a state tree's dicts have str keys, so that paths can name their leaves"
                )
        return "dict"
    if type(node) in _SCALARS:
        return _SCALARS[type(node)]
    raise ValueError(
        f"{_show(path)}: a {type(node).__name__} is no part of a state tree; use NamedTuples, "
        "tuples, lists and dicts of tensors, ints, floats, bools, str or None"
    )


def _children(node: Any, kind: str) -> list[tuple[str, Any]]:
    if kind == "namedtuple":
        return list(zip(node._fields, node))
    if kind == "dict":
        return list(node.items())
    return [(str(i), child) for i, child in enumerate(node)]


def _rebuild(node: Any, kind: str, children: list[Any]) -> Any:
    if kind == "dict":
        return dict(zip(node, children))
    return type(node)(*children) if kind == "namedtuple" else type(node)(children)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _show(path: str) -> str:
    return path or "the root of the tree"


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    kind = _kind(node, path)
    yield path, kind, node
    if kind in _CONTAINERS:
        for name, child in _children(node, kind):
            yield from _walk(child, _join(path, name))


def _map(fn: Callable[..., Any], path: str, node: Any, rest: tuple[Any, ...]) -> Any:
    """Apply `fn(path, leaf, *rest_leaves)` to the tensors; the other leaves come from `node`."""
    kind = _kind(node, path)
    for other in rest:
        _check_same_node(path, kind, node, other)
    if kind == "tensor":
        return fn(path, node, *rest)
    if kind not in _CONTAINERS:
        return node
    others = [dict(_children(other, kind)) for other in rest]
    mapped = [
        _map(fn, _join(path, name), child, tuple(other[name] for other in others))
        for name, child in _children(node, kind)
    ]
    return _rebuild(node, kind, mapped)


def _check_same_node(path: str, kind: str, node: Any, other: Any) -> None:
    summaries = [_summary(_kind(n, path), _describe(_kind(n, path), n)) for n in (node, other)]
    if _kind(other, path) != kind or (kind in _CONTAINERS and summaries[0] != summaries[1]):
        raise ValueError(
            f"{_show(path)}: {summaries[0]} in one tree and {summaries[1]} in another; "
            "the trees must have the same structure"
        )


def tree_map(fn: Callable[..., torch.Tensor], tree: T, *rest: T) -> T:
    """Return `tree` with `fn(tensor, *tensors_of_rest)` in the place of every tensor.

    Leaves that are not tensors are taken from `tree`. ValueError, naming the path, where the
    structures of `rest` differ from `tree`.
    """
    return _map(lambda _, *tensors: fn(*tensors), "", tree, rest)


def leaves(tree: Any) -> list[tuple[str, Leaf]]:
    """Return every leaf with its dotted path, in the order of the tree (the root's path is "")."""
    return [(path, node) for path, kind, node in _walk(tree) if kind not in _CONTAINERS]


def detach(tree: T) -> T:
    """Return the tree cut off from the autograd graph; the tensors share their storage."""
    return tree_map(torch.Tensor.detach, tree)


def trainable(tree: T) -> T:
    """The tree with copies of the tensors that were made under `torch.inference_mode`: outside it
    autograd can save the copies for a backward pass.
    """
    if torch.is_inference_mode_enabled():
        return tree
    return tree_map(lambda t: t.clone() if t.is_inference() else t, tree)


def to(tree: T, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> T:
    """Return the tree on `device`, its floating-point tensors cast to `dtype`."""
    return tree_map(
        lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None), tree
    )


def batch_size(tree: Any) -> int | None:
    """Return the leading axis that all tensors share, None for a tree without tensors.

    ValueError, naming the path, for a tensor without a batch axis or with another size.
    """
    size: int | None = None
    first = ""
    for path, leaf in leaves(tree):
        if not isinstance(leaf, torch.Tensor):
            continue
        if leaf.ndim == 0:
            raise ValueError(
                f"{_show(path)}: a tensor of shape () has no batch axis; give it one, or keep a "
                "value that all samples share as an int or float"
            )
        if size is None:
            size, first = leaf.shape[0], path
        elif leaf.shape[0] != size:
            raise ValueError(
                f"{_show(path)}: the batch axis is {leaf.shape[0]}, but {size} at {_show(first)}; "
                "every tensor of a state has the batch first"
            )
    return size


def select(tree: T, rows: Rows) -> T:
    """Return the samples `rows` of the batch; rows may be reordered and repeated.

    rows: LongTensor [N], a list of ints, or a slice; 0 <= row < B. The result's batch is N.
    ValueError for a row out of bounds (negative ones too), a mask, or a single int.
    """
    size = batch_size(tree)
    if size is None:
        return tree
    index = _row_index(rows, size)
    return tree_map(lambda t: t.index_select(0, index.to(t.device)), tree)


def _row_index(rows: Rows, size: int) -> torch.Tensor:
    if isinstance(rows, slice):
        return torch.tensor(list(range(*rows.indices(size))), dtype=torch.long)
    if isinstance(rows, torch.Tensor):
        if rows.dtype != torch.long or rows.ndim != 1:
            raise ValueError(
                f"rows is a {rows.dtype} tensor of shape {tuple(rows.shape)}; pass a LongTensor "
                "[N] of row numbers (for a mask: mask.nonzero()[:, 0])"
            )
        index = rows
    else:
        if not isinstance(rows, list | tuple) or any(type(row) is not int for row in rows):
            raise ValueError(
                f"rows={rows!r}: pass a list of ints, a LongTensor or a slice, e.g. rows=[0]"
            )
        index = torch.tensor(rows, dtype=torch.long)
    bad = index[(index < 0) | (index >= size)].tolist()
    if bad:
        raise ValueError(f"rows {bad} are out of bounds: the state has rows 0 to {size - 1}")
    return index


def concat(trees: Sequence[T]) -> T:
    """Return the trees joined along the batch axis, in the order given.

    ValueError, naming the path and the values, where the trees differ in structure, in a leaf
    that is not a tensor, or in a tensor's dtype, device or trailing axes.
    """
    if not trees:
        raise ValueError("concat was given no trees; pass at least one")
    first, *rest = trees
    for tree in trees:
        batch_size(tree)
    joined = _map(_concat_leaf, "", first, tuple(rest))
    for other in rest:  # the structures agree by now, and leaves() follows the keys of `first`
        found = dict(leaves(other))
        for path, leaf in leaves(first):
            if not isinstance(leaf, torch.Tensor) and repr(leaf) != repr(found[path]):
                raise ValueError(
                    f"{_show(path)}: {leaf!r} in one state and {found[path]!r} in another; only "
                    "states that agree in all but their tensors can be joined into one batch"
                )
    return joined


def _concat_leaf(path: str, *tensors: torch.Tensor) -> torch.Tensor:
    for name in ("dtype", "device"):
        values = [getattr(t, name) for t in tensors]
        if any(value != values[0] for value in values):
            raise ValueError(f"{_show(path)}: different {name}s {values}; use to() first")
    shapes = [tuple(t.shape) for t in tensors]
    if any(shape[1:] != shapes[0][1:] for shape in shapes):
        raise ValueError(
            f"{_show(path)}: the shapes {shapes} differ beyond the batch axis; only states of "
            "one configuration can be joined"
        )
    return torch.cat(tensors)


def nbytes(tree: Any) -> int:
    """Return the bytes of all tensors; storage that two leaves share counts twice."""
    return sum(t.numel() * t.element_size() for _, t in leaves(tree) if isinstance(t, torch.Tensor))


def save(tree: Any, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write the tree to ONE safetensors file, whole or not at all (`atomic_write`).

    metadata: any str to str notes, given back by `read_metadata`. The tensors are named
    `state.<path>`; structure, other leaves and a sha256 per tensor stand in the file's header.
    ValueError for a dtype that safetensors lacks or a path that occurs twice; OSError when the
    disk refuses.
    """
    nodes: dict[str, list[Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for node_path, kind, node in _walk(tree):
        if node_path in nodes:
            raise ValueError(f"{node_path}: two leaves have this path; rename the dotted dict key")
        detail = _describe(kind, node)
        if kind == "tensor":
            stored = _storable(node_path, node)
            detail["sha256"] = _digest(stored)
            tensors[_join("state", node_path)] = stored
        nodes[node_path] = [kind, detail]
    notes = metadata or {}
    if any(not isinstance(text, str) for pair in notes.items() for text in pair):
        raise ValueError(f"metadata={notes!r}: keys and values must be str; json.dumps the others")
    texts = {"tree": json.dumps(nodes), "metadata": json.dumps(notes)}
    header = {"format": _FORMAT, "version": _VERSION, **texts}
    content = to_safetensors(tensors, {**header, "sha256": _header_digest(header)})
    atomic_write(path, lambda temp: temp.write_bytes(content))


def load(path: str | Path, like: T, device: torch.device | str | None = None) -> T:
    """Return the tree saved at `path`, bit for bit, in the structure (NamedTuple types) of `like`.

    like: a tree of the same configuration; its values are not used. Paths, kinds, dtypes and
    shapes must agree, apart from the leading batch axis. device: default the CPU.
    ValueError naming file and path where they do not, or where the file is damaged (truncated,
    altered, no safetensors); FileNotFoundError.
    """
    path = Path(path)
    with _opened(path) as (file, header):
        nodes = json.loads(header["tree"])
        _check_structure(path, nodes, like)
        digests = {_join("state", p): d["sha256"] for p, (k, d) in nodes.items() if k == "tensor"}
        if set(file.keys()) != digests.keys():
            raise _damaged(path, "its tensors are not those that its header lists")
        tensors: dict[str, torch.Tensor] = {}
        for name, digest in digests.items():
            tensor = file.get_tensor(name).clone()  # a later change of the file stays outside
            if _digest(tensor) != digest:
                raise _damaged(path, f"the content of {name} has changed")
            tensors[name] = tensor.to(device) if device is not None else tensor
        return _fill(like, "", nodes, tensors)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the notes given to `save`, from the header alone; errors as in `load`."""
    with _opened(Path(path)) as (_, header):
        return json.loads(header["metadata"])


def _describe(kind: str, node: Any) -> Any:
    """What the file keeps of a node: names of children, a tensor's dtype and shape, a value."""
    if kind in _CONTAINERS:
        return [name for name, _ in _children(node, kind)]
    if kind == "tensor":
        return {"dtype": str(node.dtype).removeprefix("torch."), "shape": list(node.shape)}
    return node.hex() if kind == "float" else node  # hex: exact, and inf and nan are legal JSON


def _storable(path: str, tensor: torch.Tensor) -> torch.Tensor:
    try:
        to_safetensors({"probe": torch.empty(0, dtype=tensor.dtype)})
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{_show(path)}: safetensors cannot hold {tensor.dtype}; cast it first "
            "(complex: torch.view_as_real)"
        ) from error
    tensor = tensor.detach().resolve_conj().resolve_neg().to("cpu")
    # A copy of its own: safetensors refuses tensors that share storage.
    return tensor.clone(memory_format=torch.contiguous_format)


def _digest(tensor: torch.Tensor) -> str:
    content = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    content.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def _header_digest(header: dict[str, str]) -> str:
    keys = ("format", "version", "tree", "metadata")
    return hashlib.sha256(json.dumps([header[key] for key in keys]).encode()).hexdigest()


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is damaged or no nestlearn state: {what}; restore it from a copy")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    if not path.is_file():
        raise FileNotFoundError(f"no state file at {path}")
    try:
        handle = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise _damaged(path, f"not a whole safetensors file ({error})") from error
    with handle as file:
        header = file.metadata() or {}
        if header.get("format") != _FORMAT:
            raise _damaged(path, f"its header lacks format={_FORMAT!r}")
        if header.get("version") != _VERSION:
            raise ValueError(
                f"{path} has version {header.get('version')!r} of the state format, this nestlearn "
                f"reads {_VERSION!r}; load it with the nestlearn that wrote it"
            )
        if not {"tree", "metadata", "sha256"} <= header.keys():
            raise _damaged(path, "its header is incomplete")
        if _header_digest(header) != header["sha256"]:
            raise _damaged(path, "its header has changed")
        yield file, header


def _check_structure(path: Path, nodes: dict[str, list[Any]], like: Any) -> None:
    wanted = {p: (kind, _describe(kind, node)) for p, kind, node in _walk(like)}
    for node_path in [*wanted, *(p for p in nodes if p not in wanted)]:
        expected = _summary(*wanted[node_path]) if node_path in wanted else "nothing"
        found = _summary(*nodes[node_path]) if node_path in nodes else "nothing"
        if expected != found:
            raise ValueError(
                f"{path}: at {_show(node_path)} expected {expected}, found {found}; "
                "build `like` with the configuration that the state was saved under"
            )


def _summary(kind: str, detail: Any) -> str:
    if kind in ("namedtuple", "dict"):
        names = detail if kind == "namedtuple" else sorted(detail)
        return f"a {kind} of ({', '.join(names)})"
    if kind in _CONTAINERS:
        return f"a {kind} of {len(detail)}"
    if kind == "tensor":
        shape = ["batch", *map(str, detail["shape"][1:])] if detail["shape"] else []
        return f"a {detail['dtype']} tensor [{', '.join(shape)}]"
    return f"a leaf of type {kind}"


def _fill(like: Any, path: str, nodes: dict[str, list[Any]], tensors: dict[str, Any]) -> Any:
    kind, detail = nodes[path]
    if kind == "tensor":
        return tensors[_join("state", path)]
    if kind not in _CONTAINERS:
        return float.fromhex(detail) if kind == "float" else detail
    filled = [
        _fill(child, _join(path, name), nodes, tensors) for name, child in _children(like, kind)
    ]
    return _rebuild(like, kind, filled)
