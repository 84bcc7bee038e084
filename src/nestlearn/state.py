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
from nestlearn.tree import (
    CONTAINERS,
    Leaf,
    children,
    described,
    join,
    mapped,
    rebuild,
    shown,
    summary,
    walk,
)

Rows = torch.Tensor | Sequence[int] | slice
T = TypeVar("T")

_FORMAT = "nestlearn-state"
_VERSION = "1"


def tree_map(fn: Callable[..., torch.Tensor], tree: T, *rest: T) -> T:
    """Return `tree` with `fn(tensor, *tensors_of_rest)` in the place of every tensor.

    Leaves that are not tensors are taken from `tree`. ValueError, naming the path, where the
    structures of `rest` differ from `tree`.
    """
    return mapped(lambda _, *tensors: fn(*tensors), "", tree, rest)


def leaves(tree: Any) -> list[tuple[str, Leaf]]:
    """Return every leaf with its dotted path, in the order of the tree (the root's path is "")."""
    return [(path, node) for path, kind, node in walk(tree) if kind not in CONTAINERS]


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
                f"{shown(path)}: a tensor of shape () has no batch axis; give it one, or keep a "
                "value that all samples share as an int or float"
            )
        if size is None:
            size, first = leaf.shape[0], path
        elif leaf.shape[0] != size:
            raise ValueError(
                f"{shown(path)}: the batch axis is {leaf.shape[0]}, but {size} at {shown(first)}; "
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
    elif isinstance(rows, list | tuple) and all(type(row) is int for row in rows):
        index = torch.tensor(rows, dtype=torch.long)
    else:
        raise ValueError(
            f"rows={rows!r}: pass a list of ints, a LongTensor or a slice, e.g. rows=[0]"
        )
    if bad := index[(index < 0) | (index >= size)].tolist():
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
    joined = mapped(_concat_leaf, "", first, tuple(rest))
    for other in rest:  # the structures agree by now, and leaves() follows the keys of `first`
        found = dict(leaves(other))
        for path, leaf in leaves(first):
            if not isinstance(leaf, torch.Tensor) and repr(leaf) != repr(found[path]):
                raise ValueError(
                    f"{shown(path)}: {leaf!r} in one state and {found[path]!r} in another; only "
                    "states that agree in all but their tensors can be joined into one batch"
                )
    return joined


def _concat_leaf(path: str, *tensors: torch.Tensor) -> torch.Tensor:
    for name in ("dtype", "device"):
        values = [getattr(t, name) for t in tensors]
        if any(value != values[0] for value in values):
            raise ValueError(f"{shown(path)}: different {name}s {values}; use to() first")
    shapes = [tuple(t.shape) for t in tensors]
    if any(shape[1:] != shapes[0][1:] for shape in shapes):
        raise ValueError(
            f"{shown(path)}: the shapes {shapes} differ beyond the batch axis; only states of "
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
    for node_path, kind, node in walk(tree):
        if node_path in nodes:
            raise ValueError(f"{node_path}: two leaves have this path; rename the dotted dict key")
        detail = described(kind, node)
        if kind == "tensor":
            stored = _storable(node_path, node)
            detail["sha256"] = _digest(stored)
            tensors[join("state", node_path)] = stored
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
        digests = {join("state", p): d["sha256"] for p, (k, d) in nodes.items() if k == "tensor"}
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


def _storable(path: str, tensor: torch.Tensor) -> torch.Tensor:
    try:
        to_safetensors({"probe": torch.empty(0, dtype=tensor.dtype)})
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{shown(path)}: safetensors cannot hold {tensor.dtype}; cast it first "
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
    wanted = {p: (kind, described(kind, node)) for p, kind, node in walk(like)}
    for node_path in [*wanted, *(p for p in nodes if p not in wanted)]:
        expected = summary(*wanted[node_path]) if node_path in wanted else "nothing"
        found = summary(*nodes[node_path]) if node_path in nodes else "nothing"
        if expected != found:
            raise ValueError(
                f"{path}: at {shown(node_path)} expected {expected}, found {found}; "
                "build `like` with the configuration that the state was saved under"
            )


def _fill(like: Any, path: str, nodes: dict[str, list[Any]], tensors: dict[str, Any]) -> Any:
    kind, detail = nodes[path]
    if kind == "tensor":
        return tensors[join("state", path)]
    if kind not in CONTAINERS:
        return float.fromhex(detail) if kind == "float" else detail
    filled = [
        _fill(child, join(path, name), nodes, tensors) for name, child in children(like, kind)
    ]
    return rebuild(like, kind, filled)
