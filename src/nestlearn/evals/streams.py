"""Bits per byte of a text read as a stream: each token is scored before anything learns from it.

A model enters as a `Predictor`: log-probabilities of the tokens that follow, window by window.
`Calibrated`, `Cached` and `Nearest` are predictors around another one, which learn from each token
once it is scored; `Dynamic` moves a model's weights. A predictor's state is data, as a layer's: a
call changes no state that it was given, and however a stream is cut into calls, it says the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Own = dict[str, Any]  # what a predictor that learns has at hand: tensors and numbers
Tell = Callable[[int, int], None]


class Said(NamedTuple):
    """logp [T, V]: log-probabilities of the token after each of T. hidden [T, D]: the vectors that
    they were said from, None of a model that shows none.
    """

    logp: Tensor
    hidden: Tensor | None = None


class Predictor(Protocol):
    """Says what follows in a stream. step: how many tokens a call takes best."""

    @property
    def step(self) -> int: ...

    def say(self, ids: Tensor, state: Any = None) -> tuple[Said, Any]:
        """ids int64 [T], which follow those of the call that returned the state (None: they begin
        the stream); row t depends on ids[: t + 1] and on those before alone.
        """
        ...


class Reader(Protocol):
    """Reads a stream: −log p in nats of each of its tokens, said before it learns from them."""

    @property
    def step(self) -> int: ...

    def read(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """ids int64 [T], as of `Predictor.say` -> nats [T], state"""
        ...


class Text(NamedTuple):
    """ids int64 [N]: a text's tokens. sizes [N]: the bytes of text that each stands for."""

    ids: Tensor
    sizes: Tensor


# ------------------------------------------------------------------------------------ measures


@torch.no_grad()
def nats(reader: Reader, ids: Tensor, tell: Tell | None = None) -> Tensor:
    """−log p of every token of a stream, float64 [N] on the CPU; tell(tokens read, of how many).

    ValueError for no tokens, and where a number is not finite, naming the first such token.
    """
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"a stream of tokens {list(ids.shape)}: give a text that is not empty")
    parts, state, read = [], None, 0
    for window in ids.split(reader.step):
        found, state = reader.read(window, state)
        found = found.double().cpu()
        if bad := (~found.isfinite()).nonzero().flatten().tolist():
            raise ValueError(
                f"token {read + bad[0]} of the stream has −log p = {float(found[bad[0]])}: the "
                "model's logits are not finite there (with a rate: try a smaller one)"
            )
        parts.append(found)
        read += len(window)
        if tell is not None:
            tell(read, len(ids))
    return torch.cat(parts)


def bits_per_byte(found: Tensor, sizes: Tensor) -> float:
    """Σ nats [N] / ln 2 over the bytes [N] of their text; ValueError where the two do not fit."""
    size = int(sizes.sum())
    if found.shape != sizes.shape or size < 1:
        raise ValueError(
            f"{list(found.shape)} losses for {list(sizes.shape)} tokens of {size} bytes: give the "
            "bytes of each token, one at least in all"
        )
    return float(found.double().sum()) / math.log(2) / size


def tenths(found: Tensor, sizes: Tensor) -> list[float]:
    """Bits per byte in each tenth of a stream's tokens; of parts without a byte none is given."""
    parts = zip(found.tensor_split(10), sizes.tensor_split(10))
    return [bits_per_byte(part, size) for part, size in parts if int(size.sum())]


@dataclass(frozen=True)
class Scored:
    """A predictor as a reader. begin: the token before the stream's first, which is not scored."""

    of: Predictor
    begin: int

    @property
    def step(self) -> int:
        return self.of.step

    def read(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        last, before = (ids.new_tensor([self.begin]), None) if state is None else state
        said, before = self.of.say(torch.cat([last, ids[:-1]]), before)
        return -said.logp.gather(1, ids[:, None])[:, 0], (ids[-1:], before)


# -------------------------------------------------------------------------------------- models


def _logp(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide / temperature).log_softmax(-1)


@dataclass(frozen=True, kw_only=True)
class _InWindows:
    """Reads windows of `length` tokens, which begin at multiples of `stride` = length − again; each
    but the first reads up to `again` tokens before it once more, unscored. ValueError unless
    0 ≤ again < length. together: how many windows are read side by side.
    """

    together = 1

    length: int
    again: int = 0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.again < self.length:
            raise ValueError(f"again={self.again} of length={self.length}: give 0 to length - 1")

    @property
    def stride(self) -> int:
        return self.length - self.again

    @property
    def step(self) -> int:
        return self.stride * self.together

    def say(self, ids: Tensor, state: Any = None) -> tuple[Said, Any]:
        position, window, own = (0, ids[:0], None) if state is None else state
        parts, vectors = [], []
        while len(ids):
            if position and position % self.stride == 0:
                own = self._end(window, ids[:1], own)
                window = window[max(0, len(window) - self.again) :]
            whole = position % self.stride == 0 and len(window) == self.again
            many = min(self.together, len(ids) // self.stride) if whole else 1
            n = many * self.stride if many > 1 else self.stride - position % self.stride
            fresh, ids = ids[:n], ids[n:]
            window = torch.cat([window, fresh])
            each = window.unfold(0, self.length, self.stride) if many > 1 else window[None]
            logits, hidden = self._read(each, own)
            new = len(fresh) // len(each)
            parts.append(_logp(logits[:, -new:].flatten(0, 1), self.temperature))
            vectors += [] if hidden is None else [hidden[:, -new:].flatten(0, 1)]
            position, window = position + len(fresh), each[-1]
        said = Said(torch.cat(parts), torch.cat(vectors) if vectors else None)
        return said, (position, window, own)

    def _read(self, windows: Tensor, own: Any) -> tuple[Tensor, Tensor | None]:
        """Logits [B, T, V] and hidden vectors of windows [B, T]."""
        raise NotImplementedError

    def _end(self, window: Tensor, following: Tensor, own: Any) -> Any:
        """What a window [T] leaves behind, once the token after it is known."""


@dataclass(frozen=True, kw_only=True)
class Windows(_InWindows):
    """A model as it is, in windows of its trained length. model(ids [B, T]) -> (logits [B, T, V],
    hidden [B, T, D] or None).
    """

    model: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    together: int = 1

    def _read(self, windows: Tensor, own: Any) -> tuple[Tensor, Tensor | None]:
        return self.model(windows)


@dataclass(frozen=True, kw_only=True)
class Dynamic(_InWindows):
    """Dynamic evaluation (Krause et al. 2018) by SGD: after each window all weights take a step of
    `rate` down its mean loss. The module's own stay as they are: those that moved are in the state.

    module: ids [1, T] -> logits [1, T, V], in evaluation mode; its trainable parameters move.
    """

    module: nn.Module
    rate: float = 1e-2

    def _read(self, windows: Tensor, own: Any) -> tuple[Tensor, Tensor | None]:
        return torch.func.functional_call(self.module, own or {}, (windows,)), None

    def _end(self, window: Tensor, following: Tensor, own: Any) -> Any:
        if own is None:
            own = {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            moving = {name: weight.detach().requires_grad_() for name, weight in own.items()}
            logits = self._read(window[None], moving)[0][0, -self.stride :]
            target = torch.cat([window, following])[-self.stride :]
            loss = F.nll_loss(_logp(logits, self.temperature), target)
            found = torch.autograd.grad(loss, list(moving.values()), allow_unused=True)
        pairs = zip(own.items(), found)
        return {name: w if g is None else w - self.rate * g for (name, w), g in pairs}


@dataclass(frozen=True)
class Carried:
    """A model whose state is carried from call to call. model(ids [1, T], state) -> (logits,
    hidden or None, state), as of `Windows`.
    """

    model: Callable[[Tensor, Any], tuple[Tensor, Tensor | None, Any]]
    step: int = 1024
    temperature: float = 1.0

    def say(self, ids: Tensor, state: Any = None) -> tuple[Said, Any]:
        logits, hidden, state = self.model(ids[None], state)
        hidden = None if hidden is None else hidden[0]
        return Said(_logp(logits[0], self.temperature), hidden), state


# ------------------------------------------------------------------- predictors around another


@dataclass(frozen=True)
class _Online:
    """Learns from each token once it is known, which is when the token after it is asked for."""

    of: Predictor

    @property
    def step(self) -> int:
        return self.of.step

    def say(self, ids: Tensor, state: Any = None) -> tuple[Said, Any]:
        before, own = (None, None) if state is None else state
        said, before = self.of.say(ids, before)
        hidden = said.logp if said.hidden is None else said.hidden
        own = self._begin(said.logp, hidden) if own is None else _copy(own)
        rows = []
        for token, logp, vector in zip(ids.tolist(), said.logp, hidden):
            if "row" in own:  # the stream's first token was not predicted
                self._learn(own, token)
            own["row"] = self._row(own, logp, vector)
            rows.append(own["row"])
        return Said(torch.stack(rows), said.hidden), (before, own)

    def _begin(self, logp: Tensor, hidden: Tensor) -> Own:
        """Before the first token; logp [T, V] and hidden [T, D] give shapes."""
        raise NotImplementedError

    def _row(self, own: Own, logp: Tensor, hidden: Tensor) -> Tensor:
        """Its own log-probabilities [V] of the next token."""
        raise NotImplementedError

    def _learn(self, own: Own, token: int) -> None:
        """The token that the last row was about; own["row"] is that row."""
        raise NotImplementedError


def _copy(own: Own) -> Own:
    return {key: x.clone() if isinstance(x, Tensor) else x for key, x in own.items()}


@dataclass(frozen=True)
class Calibrated(_Online):
    """q = softmax(eˢ log p + b): s and b [V] take a step of `rate` down −log q of each token.

    With e = q − onehot(token): ∂/∂b = e, ∂/∂s = eˢ ⟨e, log p⟩. Both begin at 0, where q = p.
    """

    rate: float = 1e-2

    def _begin(self, logp: Tensor, hidden: Tensor) -> Own:
        return {"s": logp.new_zeros(()), "b": torch.zeros_like(logp[0])}

    def _row(self, own: Own, logp: Tensor, hidden: Tensor) -> Tensor:
        own["logp"] = logp
        return (own["s"].exp() * logp + own["b"]).log_softmax(-1)

    def _learn(self, own: Own, token: int) -> None:
        error = own["row"].exp()
        error[token] -= 1
        own["s"] = own["s"] - self.rate * own["s"].exp() * (error @ own["logp"])
        own["b"] -= self.rate * error


@dataclass(frozen=True)
class _Mixed(_Online):
    """(1 − λ) p + λ p′, with p′ from what was read. λ = σ(a) learns: a takes a step of `rate` up
    log p of each token, ∂/∂a = λ p′ / ((1 − λ) p + λ p′) − λ. It begins at `share`.
    """

    size: int = 2000
    rate: float = 0.1
    share: float = 0.05

    def _begin(self, logp: Tensor, hidden: Tensor) -> Own:
        a = math.log(self.share / (1 - self.share))
        tokens = torch.zeros(self.size, dtype=torch.long, device=logp.device)
        return {"a": logp.new_tensor(a), "n": 0, "tokens": tokens, "p": None}

    def _row(self, own: Own, logp: Tensor, hidden: Tensor) -> Tensor:
        own["p"] = self._remembered(own, logp, hidden) if own["n"] else None
        if own["p"] is None:
            return logp
        here, there = F.logsigmoid(-own["a"]), F.logsigmoid(own["a"])
        return torch.logaddexp(here + logp, there + own["p"].log())

    def _learn(self, own: Own, token: int) -> None:
        if own["p"] is not None:
            weight = own["a"].sigmoid()
            share = weight * own["p"][token] / own["row"][token].exp()
            own["a"] = own["a"] + self.rate * (share - weight)
        self._keep(own, token, own["n"] % self.size)
        own["tokens"][own["n"] % self.size] = token
        own["n"] += 1

    def _remembered(self, own: Own, logp: Tensor, hidden: Tensor) -> Tensor:
        """p′ [V]"""
        raise NotImplementedError

    def _keep(self, own: Own, token: int, place: int) -> None:
        """Keep a token in the place of the one that was read `size` tokens ago, if any."""
        raise NotImplementedError


@dataclass(frozen=True)
class Cached(_Mixed):
    """p′: how often each token stands among the last `size` ones (a unigram cache)."""

    def _begin(self, logp: Tensor, hidden: Tensor) -> Own:
        return super()._begin(logp, hidden) | {"counts": torch.zeros_like(logp[0])}

    def _remembered(self, own: Own, logp: Tensor, hidden: Tensor) -> Tensor:
        return own["counts"] / min(own["n"], self.size)

    def _keep(self, own: Own, token: int, place: int) -> None:
        if own["n"] >= self.size:
            own["counts"][own["tokens"][place]] -= 1
        own["counts"][token] += 1


@dataclass(frozen=True)
class Nearest(_Mixed):
    """p′ ∝ Σᵢ exp(sharpness · cos(h, hᵢ)) onehot(xᵢ₊₁) over the last `size` places i (a kernel over
    hidden vectors; Grave et al. 2017). Where the model shows none, h is its log-probabilities.
    """

    sharpness: float = 20.0

    def _begin(self, logp: Tensor, hidden: Tensor) -> Own:
        keys = hidden.new_zeros(self.size, hidden.shape[-1], dtype=logp.dtype)
        return super()._begin(logp, hidden) | {"keys": keys}

    def _row(self, own: Own, logp: Tensor, hidden: Tensor) -> Tensor:
        own["key"] = F.normalize(hidden.to(logp), dim=0)
        return super()._row(own, logp, hidden)

    def _remembered(self, own: Own, logp: Tensor, hidden: Tensor) -> Tensor:
        n = min(own["n"], self.size)
        weights = (self.sharpness * (own["keys"][:n] @ own["key"])).softmax(0)
        return torch.zeros_like(logp).index_add_(0, own["tokens"][:n], weights)

    def _keep(self, own: Own, token: int, place: int) -> None:
        own["keys"][place] = own["key"]
