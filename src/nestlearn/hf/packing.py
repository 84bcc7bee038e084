"""What a batch says beside its tokens: which are padding, and where a row's next text begins."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.hope import HopeLM
from .cache import Rows, chosen, read

_PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def real_tokens(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """Which of the tokens [B, T] are no padding, as bool [B, T]."""
    if mask.ndim != 2 or len(mask) != shape[0] or mask.shape[1] < shape[1]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} for ids {shape}: give "
            "[batch, tokens], of these tokens or of all so far"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"attention_mask holds {float(mask.amax())}: give 1 for a token and 0 for padding; "
            "texts that are packed in one row are told apart by position_ids that begin anew at 0"
        )
    return mask[:, mask.shape[1] - shape[1] :] != 0


def beginnings(positions: Tensor, shape: tuple[int, int], real: Tensor | None) -> Tensor | None:
    """Where inside a row positions [B or 1, T] begin anew at 0, as bool [B, T]; None: nowhere.

    The first token of a call goes on from what the cache has read, whatever its position is.
    Raises ValueError for positions that jump: a memory counts its own tokens.
    """
    batch, length = shape
    if positions.ndim == 1:
        positions = positions.unsqueeze(0)
    if positions.ndim != 2 or positions.shape[1] != length or len(positions) not in (1, batch):
        raise ValueError(
            f"position_ids has shape {tuple(positions.shape)} for ids {shape}: give one position "
            "for each token"
        )
    positions = positions.expand(batch, length)
    if length == 1:
        return None
    real = torch.ones_like(positions, dtype=torch.bool) if real is None else real
    columns = torch.arange(length, device=real.device).expand(batch, length)
    latest = columns.masked_fill(~real, -1).cummax(1).values
    latest = F.pad(latest[:, :-1], (1, 0), value=-1)  # the last token before each one; -1: none
    before = positions.gather(1, latest.clamp(min=0))
    breaks = real & (latest >= 0) & (positions != before + 1)
    jumps = breaks & (positions != 0)
    if jumps.any():
        row, column = (int(i) for i in jumps.nonzero()[0])
        raise ValueError(
            f"position_ids go from {int(before[row, column])} to {int(positions[row, column])} in "
            f"row {row}: a memory counts its tokens itself, so positions go on by 1, or begin anew "
            "at 0 for the next text of the row"
        )
    return breaks if breaks.any() else None


def packed(positions: Tensor | None, more: dict[str, Any]) -> Tensor | None:
    """The positions, or those that trainers' other words for packed texts come to.

    more: cu_seq_lens_q (where texts end, in one row), seq_idx [B, T] (each token's text), and what
    repeats them for kernels. Raises TypeError for anything else.
    """
    unknown = sorted(more.keys() - _PACKED)
    if unknown:
        raise TypeError(f"forward takes no {unknown}")
    ends, texts = more.get("cu_seq_lens_q"), more.get("seq_idx")
    if positions is not None:
        return positions
    if texts is None:
        if ends is None:
            return None
        places = torch.arange(int(ends[-1]), device=ends.device)
        texts = torch.searchsorted(ends, places, right=True).unsqueeze(0)
    places = torch.arange(texts.shape[1], device=texts.device).expand_as(texts)
    begins = F.pad(texts.diff(dim=1) != 0, (1, 0), value=True)
    return places - places.masked_fill(~begins, 0).cummax(1).values


def needed(real: Tensor | None, use_cache: bool) -> Tensor | None:
    """The mask, or None where the batch may be read as it is.

    A causal model's outputs do not know of padding that follows them, only its memories do: so
    training on right padding costs one pass, not one for each length.
    """
    if real is None or real.all() or not (use_cache or (real[:, 1:] & ~real[:, :-1]).any()):
        return None
    return real


@torch.compiler.disable(recursive=False)
def read_packed(
    model: HopeLM,
    x: Tensor,
    groups: list[Rows],
    real: Tensor | None,
    begins: Tensor,
    use_cache: bool,
    output: str,
) -> tuple[tuple[Tensor, ...], list[Rows]]:
    """`cache.read` of rows of several texts: each reads as it does alone, from a new memory.

    begins [B, T]: the first token of each text but the first, which goes on from its row's state.
    """
    real = torch.ones_like(begins) if real is None else real
    rows, columns = real.nonzero(as_tuple=True)
    names = rows * (real.shape[1] + 1) + begins.long().cumsum(1)[rows, columns]
    names, text, sizes = names.unique(return_inverse=True, return_counts=True)
    place = torch.arange(len(rows), device=x.device) - (sizes.cumsum(0) - sizes)[text]
    texts = x.new_zeros(len(names), int(sizes.max()), *x.shape[2:])
    texts = texts.index_put((text, place), x[rows, columns])
    tokens = real.new_zeros(texts.shape[:2]).index_put((text, place), begins.new_ones(len(rows)))

    owners = (names // (real.shape[1] + 1)).tolist()
    last = {row: i for i, row in enumerate(owners)}
    first = {row: i for i, row in reversed([*enumerate(owners)])}
    idle = {row: row for row in range(len(real)) if row not in first}
    new = Rows(sorted({*range(len(owners))} - {*first.values()}), None)
    begun = [*(chosen(group, first) for group in groups), new]
    if all(group.state is None for group in begun):
        begun = [Rows([*range(len(owners))], None)]
    said, after = read(model, texts, begun, needed(tokens, use_cache), output)

    out = tuple(
        y.new_zeros(*real.shape, y.shape[-1]).index_put((rows, columns), y[text, place])
        for y in said
    )
    ends = {i: row for row, i in last.items()}
    kept = [chosen(g, ends) for g in after] + [chosen(g, idle) for g in groups]
    return out, [group for group in kept if group.rows]
