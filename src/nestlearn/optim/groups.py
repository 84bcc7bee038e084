"""Which parameters are matrices to orthogonalise, and which are left to the auxiliary rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .base import check_model

HEADS = ("head", "lm_head", "classifier", "output_head")
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
SHORT = 8  # a matrix with a shorter side is a bundle of vectors: gates, short convolutions


def groups(
    model: nn.Module,
    *,
    heads: Sequence[str] = HEADS,
    split: Mapping[str, int | Sequence[int]] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups of a model for `Muon`, `AdaMuon` and `M3`; for other optimizers too.

    Auxiliary, for AdamW: vectors and scalars, embeddings (and what is tied to them), output heads
    (a module whose last name is in `heads`), matrices with a side shorter than 8, and what has
    `no_decay = True`. Matrices: everything else; convolution kernels count as [out, in · k · k],
    other parameters of three axes or more as a stack of matrices. split: {part of a name: parts}
    for fused matrices, e.g. {"qkv": 3}; nn.MultiheadAttention's is known. Vectors, scalars and
    `no_decay` get no weight decay. options: for every group, e.g. lr. Frozen parameters are left
    out. ValueError if nothing is left, or a `split` names nothing.
    """
    check_model(model, "groups")
    split = {"in_proj_weight": 3, **(split or {})}
    shy = {id(m.weight) for m in model.modules() if isinstance(m, _EMBEDDINGS)}
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, _CONVOLUTIONS)}
    found: dict[tuple, dict[str, Any]] = {}
    used = {"in_proj_weight"}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        plain = p.ndim < 2 or getattr(p, "no_decay", False)
        stacked = p.ndim > 2 and id(p) not in kernels
        sides = p.shape[-2:] if stacked else (p.shape[:1].numel(), p.shape[1:].numel())
        is_head = bool(set(name.split(".")[-2:-1]) & set(heads))
        aside = plain or is_head or id(p) in shy or min(sides) < SHORT
        parts = next((n for part, n in split.items() if part in name), 1)
        used |= {part for part in split if part in name}
        group: dict[str, Any] = {**options, "rule": "auxiliary" if aside else "matrix"}
        if not aside:
            split_to = parts if isinstance(parts, int) else tuple(parts)
            group |= {"stacked": stacked, "split": split_to}
        if plain:
            group["weight_decay"] = 0.0
        key = (aside, stacked and not aside, str(parts) if not aside else "", plain)
        found.setdefault(key, {"params": [], **group})["params"].append(p)
    if missing := sorted(split.keys() - used):
        raise ValueError(f"split names {missing}: no trainable parameter has that in its name")
    if not found:
        raise ValueError("the model has no trainable parameters; set requires_grad on some")
    return list(found.values())
