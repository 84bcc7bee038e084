"""Hope (section 8.3): self-modifying Titans followed by a continuum memory, as a language model.

The same skeleton carries the baselines: `mixer=Attention(), channel=SwiGLU()` is a Transformer++,
`mixer=Attention()` alone Hope-Attention.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import options
from ..disk import atomic_write
from ..layers import (
    Attention,
    ContinuumMemory,
    SelfModifyingTitans,
    gated_deltanet,
    linear_attention,
    static_titans,
)
from ..layers.streaming import Stepping, compile_steps, traced
from ..layers.together import together
from ..names import weights_folder
from .card import write_card
from .config import (
    FORMAT,
    TYPE,
    WEIGHTS,
    HopeConfig,
    NoHope,
    saved_config,
    weight_files,
)
from .wavefront import fits, wavefront

OUTPUTS = ("logits", "hidden", "layers")


class HopeState(NamedTuple):
    """One (mixer, channel) pair of states for each block."""

    blocks: tuple[tuple[Any, Any], ...]


class SwiGLU(nn.Module):
    """x + W_o (silu(W_g n) ⊙ W_i n), n the normalised input: the channel mixer without memory."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.into = nn.Linear(dim, hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)

    def init_state(self, batch: int) -> None:
        """An MLP keeps nothing."""

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        n = self.norm(x)
        return x + self.out(F.silu(self.gate(n)) * self.into(n)), None


class HopeBlock(nn.Module):
    """x + mixer(norm(x)), then the channel mixer, which carries its own norm and skip."""

    def __init__(self, config: HopeConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.mixer: Any = _mixer(config)
        self.channel: Any = _channel(config)

    def init_state(self, batch: int) -> tuple[Any, Any]:
        """The (mixer, channel) states before the first token."""
        return self.mixer.init_state(batch), self.channel.init_state(batch)

    def forward(
        self, x: Tensor, state: tuple[Any, Any] | None = None
    ) -> tuple[Tensor, tuple[Any, Any]]:
        # the first state is made by whom it is of: a sharded model has its weights at hand there
        before = (None, None) if state is None else state
        mixed, mixer = self.mixer(self.norm(x), before[0])
        y, channel = self.channel(x + mixed, before[1])
        return y, (mixer, channel)

    @staticmethod
    def together(
        blocks: Sequence[HopeBlock], xs: Sequence[Tensor], states: Sequence[Any]
    ) -> list[tuple[Tensor, tuple[Any, Any]]]:
        """`nestlearn.layers.together.together`, xs [B, T, dim] of one length."""
        read = [block.norm(x) for block, x in zip(blocks, xs)]
        befores = list(zip(*((None, None) if s is None else s for s in states)))
        mixed, mixers = zip(*together([block.mixer for block in blocks], read, befores[0]))
        between = [x + y for x, y in zip(xs, mixed)]
        ys, channels = zip(*together([block.channel for block in blocks], between, befores[1]))
        return list(zip(ys, zip(mixers, channels)))


_MEMORIES: dict[type, Callable[..., nn.Module]] = {
    options.Titans: SelfModifyingTitans,
    options.StaticTitans: static_titans,
    options.DeltaNet: gated_deltanet,
    options.Linear: linear_attention,
}


def _mixer(c: HopeConfig) -> nn.Module:
    own = c.mixer
    if isinstance(own, options.Attention):
        return Attention(
            c.dim, c.heads, conv=own.conv, gate=own.conv > 0, rotary=own.rotary,
            window=own.window, sinks=own.sinks,
        )  # fmt: skip
    return _MEMORIES[type(own)](c.dim, c.heads, own, truncate=c.truncate, remat=c.remat)


def _channel(c: HopeConfig) -> nn.Module:
    own = c.channel
    if isinstance(own, options.SwiGLU):
        return SwiGLU(c.dim, 8 * c.dim // 3 if own.hidden is None else own.hidden)
    return ContinuumMemory(
        c.dim, own.levels, own.variant, meta_gradient=own.meta_gradient,
        truncate=c.truncate, remat=c.remat,
    )  # fmt: skip


class HopeLM(nn.Module):
    """A language model of Hope blocks: ids [B, T] -> (logits [B, T, vocab_size], state).

    embeds [B, T, dim]: what `embed` would say, in place of ids (None). output: "logits"; "hidden",
    the [B, T, dim] that the head reads; or "layers", the stream before each block and then that.
    side_by_side: on a card blocks read parts of a few long samples side by side (`wavefront`).
    """

    side_by_side = False

    def __init__(self, config: HopeConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(HopeBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.head: nn.Module = nn.Linear(config.dim, config.vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=1.0)

    def init_state(self, batch: int) -> HopeState:
        """The state before the first token; also the template to load a saved state into."""
        return HopeState(tuple(block.init_state(batch) for block in self._chain()))

    def compile(self, **options: Any) -> None:
        """Compile the memories' layers, in place: see `nestlearn.layers.streaming.Stepping`."""
        compile_steps(self, **options)

    def _chain(self) -> list[HopeBlock]:
        return [block for block in self.blocks if isinstance(block, HopeBlock)]

    def forward(
        self,
        ids: Tensor | None,
        state: HopeState | None = None,
        *,
        embeds: Tensor | None = None,
        output: str = "logits",
    ) -> tuple[Any, HopeState]:
        if (ids is None) == (embeds is None):
            raise ValueError("give ids or embeds, one of the two")
        if output not in OUTPUTS:
            raise ValueError(f"output={output!r}: use one of {OUTPUTS}")
        if state is not None and not (
            isinstance(state, HopeState) and len(state.blocks) == len(self.blocks)
        ):
            raise ValueError(
                f"state is of another model: give a HopeState of {len(self.blocks)} blocks, as "
                "an earlier call returned it"
            )
        if ids is not None:
            self._check_ids(ids)
        x = self.embed(ids) if embeds is None else embeds
        if isinstance(x.shape[1], torch.SymInt) and any(
            isinstance(m, Stepping) for m in self.modules()
        ):
            return self._at_free_length(x, state, output)
        befores = [None] * len(self.blocks) if state is None else state.blocks
        layers: list[Tensor] = []
        asked = self.side_by_side and output != "layers"
        if asked and fits(self.blocks, x, self.config.heads):
            x, states = wavefront(self.blocks, x, befores)
        else:
            states = []
            for block, before in zip(self.blocks, befores, strict=True):
                layers += [x] if output == "layers" else []
                x, after = block(x, before)
                states.append(after)
        x = self.norm(x)
        said = {"hidden": x, "layers": (*layers, x)}
        return (said[output] if output in said else self.head(x)), HopeState(tuple(states))

    def _at_free_length(self, x: Tensor, state: HopeState | None, output: str) -> tuple[Any, Any]:
        """For torch.export: a loop over chunks has no free number of them, so x is filled up to the
        greatest length. Causality keeps that out of the answers; it would be in the memories, so
        there is no state.
        """
        length: Any = x.shape[1]
        most = length.node.shape_env.bound_sympy(length.node.expr).upper
        if state is not None or not most.is_Integer:
            raise ValueError(
                "export at a free number of tokens takes no state and needs a greatest length: "
                'give torch.export.Dim("tokens", max=...), or a fixed length'
            )
        filled = F.pad(x, (0, 0, 0, int(most) - length))
        said, _ = self(None, embeds=filled, output=output)
        if isinstance(said, tuple):
            return tuple(y[:, :length] for y in said), None
        return said[:, :length], None

    def _check_ids(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor):
            raise ValueError(
                f"ids is a {type(ids).__name__}: give a tensor of token ids [batch, tokens], of a "
                "text for a model of bytes torch.tensor([list(text.encode())])"
            )
        if ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(f"ids has shape {tuple(ids.shape)}: give [batch ≥ 1, tokens ≥ 1]")
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"ids has dtype {ids.dtype}: give int64 token ids")
        if traced():
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary of "
                f"{self.config.vocab_size}: use the tokenizer that the model was trained with"
            )

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
        state: HopeState | None = None,
    ) -> Tensor:
        """Continue ids [B, T]: [B, T + max_new_tokens]. temperature 0 takes the likeliest token.

        eos_token_id: the call ends as soon as every row has said it, so what comes back may be
        shorter; what a row says after it is of no meaning.

        The prompt is read in one pass of chunks, after `state` if given; each new token then costs
        one step of the state, however long the text is.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens}: give 0 or more")
        if not temperature >= 0:
            raise ValueError(f"temperature={temperature}: give 0 (greedy) or more")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k}: give 1 or more, or None")
        self._check_ids(ids)
        if eos_token_id is not None and not 0 <= eos_token_id < self.config.vocab_size:
            most = self.config.vocab_size - 1
            raise ValueError(f"eos_token_id={eos_token_id}: give one of 0 to {most}, or None")
        longer, new, ended = [ids], ids, torch.zeros_like(ids[:, :1], dtype=torch.bool)
        for _ in range(max_new_tokens):
            logits, state = self(new, state)
            new = _choose(logits[:, -1].float(), temperature, top_k, generator)
            longer.append(new)
            if eos_token_id is not None:
                ended |= new == eos_token_id
                if ended.all():
                    break
        return torch.cat(longer, 1)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding, `lm.head.weight = lm.embed.weight`."""
        return getattr(self.head, "weight", None) is self.embed.weight

    def save_pretrained(self, folder: str | Path, *, trained: str = "") -> None:
        """Write config.json, model.safetensors and a model card, README.md, into the folder, each
        whole or not at all. A README.md that is there stays. trained: what the card says of how.

        `nestlearn.hf.HopeForCausalLM` reads them, too.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        seen: set[int] = set()  # a file holds each name's own copy of what several names share
        weights = {}
        for name, weight in self.state_dict().items():
            shared = weight.data_ptr() in seen
            seen.add(weight.data_ptr())
            weights[name] = weight.clone() if shared else weight.contiguous()
        said = {"format": "pt", **({"tied": "head"} if self.tied else {})}
        text = json.dumps({"format": FORMAT, "model_type": TYPE, **self.config.to_dict()}, indent=2)
        atomic_write(folder / WEIGHTS, lambda path: save_file(weights, path, said))
        atomic_write(
            folder / "config.json", lambda path: path.write_text(text + "\n", encoding="utf-8")
        )
        write_card(folder, self.config, self.parameter_count(), trained)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, half_life: int | None = None) -> HopeLM:
        """The model that `save_pretrained` wrote, or that of `nestlearn.hf.HopeForCausalLM`; or by
        the name "nestlearn/tiny" a small one of bytes that the package brings, trained on books.

        half_life: let its memories fade to their start by half in so many tokens; for streams much
        longer than those that it was trained on (see `docs/results/streams.md`).

        Raises FileNotFoundError if there is none, ValueError if a file is damaged or does not fit.
        """
        folder = weights_folder(folder)
        files = weight_files(folder)
        again = "save the model again, or take it from a checkpoint"
        try:
            config = saved_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
            model = cls(config)
        except NoHope as error:
            raise ValueError(f"{folder} holds {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / 'config.json'} is damaged ({error}): {again}") from error
        if half_life is not None:
            model = cls(config.with_half_life(half_life))
        try:
            weights: dict[str, Tensor] = {}
            tied = False
            for file in files:
                with safe_open(file, "pt") as tensors:
                    tied |= "tied" in (tensors.metadata() or {})
                    # transformers' own model calls this one "model"
                    for name in tensors.keys():  # noqa: SIM118 (no dict)
                        weights[name.removeprefix("model.")] = tensors.get_tensor(name)
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(weights.get(name, parameter).dtype)
            model.load_state_dict(weights)
        except (SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{folder / WEIGHTS} is damaged or of another model ({reason}): {again}"
            ) from error
        if tied:
            model.head.weight = model.embed.weight
        return model

    def parameter_count(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.parameters())


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """One token for each row of logits [B, V]: [B, 1]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    logits = logits - logits.amax(-1, keepdim=True)  # a tiny temperature must not overflow
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
