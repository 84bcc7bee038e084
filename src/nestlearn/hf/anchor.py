"""What holds a model that learns to what it was: its own samples, and what it thought of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .deltas import Deltas
from .door import evaluating
from .lending import Weights, lend


@dataclass(frozen=True, eq=False)
class Anchor:
    """Distillation while learning: every gradient has strength · ∇ KL(base ‖ now) added to it.

    The divergence is between the next-token distributions of the pretrained model and of the one
    that learns, the mean over `rows` texts that are taken in turn. At equal learning it forgets
    much less than a smaller step size does (`nestlearn reproduce frontier`); a write costs the
    reading of `rows` texts more, twice forward and once back.

    samples [N, L]: token ids of texts that are to stay understood; `Anchor.sampled` draws them from
    the model itself. Raises ValueError for another shape or type, and for what is not positive.
    """

    samples: Tensor
    strength: float = 4.0
    rows: int = 4

    def __post_init__(self) -> None:
        if (
            self.samples.ndim != 2
            or self.samples.dtype != torch.long
            or min(self.samples.shape) < 1
        ):
            raise ValueError(
                f"samples is {self.samples.dtype} {list(self.samples.shape)}: pass int64 ids [N, L]"
            )
        if not 0 < self.strength < float("inf") or self.rows < 1:
            raise ValueError(f"strength={self.strength}, rows={self.rows}: give positive numbers")

    @classmethod
    def sampled(
        cls, model: Deltas, count: int = 48, length: int = 128, *, strength: float = 4.0,
        rows: int = 4, seed: int = 0,
    ) -> Anchor:  # fmt: skip
        """Texts [count, length] that the base model says by itself, at temperature 1."""
        config, device = model.base.config.get_text_config(), model.lr[0].device
        first = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
        first = first[0] if isinstance(first, list) else first or 0
        asked = torch.full((count, 1), first, device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            drawn = model.generate(
                asked, attention_mask=torch.ones_like(asked),  # none of it is padding
                do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=first,
                max_new_tokens=length - 1, min_new_tokens=length - 1,
            )  # fmt: skip
        return cls(drawn, strength, rows)

    def divergence(self, model: Deltas, weights: Weights, turn: int, batch: int) -> Tensor:
        """strength · KL [batch] in nats a token, under the weights of `batch` memories."""
        return self.apart(model, weights, self.texts(turn).to(model.lr[0].device), batch)

    def texts(self, turn: int) -> Tensor:
        """Those whose turn it is [rows, L]."""
        chosen = (self.rows * turn + torch.arange(self.rows)) % len(self.samples)
        return self.samples[chosen.to(self.samples.device)]

    def apart(self, model: Deltas, weights: Weights, texts: Tensor, batch: int) -> Tensor:
        """The divergence on these texts [N, L]."""
        # a block of `using` around it is not the base model
        with torch.no_grad(), evaluating(model.base), lend({}):
            target = model.base(input_ids=texts).logits.log_softmax(-1)
        with evaluating(model.base), lend(weights):
            now = model.base(input_ids=texts.repeat(batch, 1)).logits.log_softmax(-1)
        apart = F.kl_div(now, target.repeat(batch, 1, 1), log_target=True, reduction="none")
        return self.strength * apart.sum(-1).view(batch, -1).mean(1)
