"""Hope (section 8.3): self-modifying Titans followed by a continuum memory, as a language model.

The same skeleton carries the baselines: `mixer="attention", channel="mlp"` is a Transformer++,
`mixer="attention", channel="cms"` is Hope-Attention.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..disk import atomic_write
from ..layers import (
    Attention,
    ContinuumMemory,
    Level,
    SelfModifyingTitans,
    gated_deltanet,
    linear_attention,
    static_titans,
)
from ..layers.mixers import compile_steps, traced

FORMAT = "nestlearn-hope-1"
MIXERS = ("hope", "attention", "titans", "deltanet", "linear")
SIZES = {  # dim, layers, heads
    "tiny": (128, 3, 4),
    "small": (256, 6, 4),
    "medium": (512, 12, 8),
    "large": (768, 12, 12),
}


@dataclass(frozen=True)
class HopeConfig:
    """All that defines a model; `HopeConfig.size("tiny")` derives it from one dial.

    mixer: "hope" (self-modifying Titans), "attention", "titans", "deltanet" or "linear".
    channel: "cms" or "mlp" (SwiGLU). mlp_hidden: width of the SwiGLU. levels: of the CMS, fast to
    slow. conv: taps of the short convolution (0: none). rotary: positions of the attention (False:
    none). The other fields are the options of the same name of `nestlearn.SelfModifyingTitans` and
    `nestlearn.ContinuumMemory`.
    """

    vocab_size: int = 256
    dim: int = 128
    layers: int = 3
    heads: int = 4
    mixer: str = "hope"
    channel: str = "cms"
    chunk: int = 64
    projection_chunk: int | None = None
    hidden: int | None = None
    depth: int = 1
    dgd: float = True
    weight_decay: bool = True
    objective: str = "dot"
    momentum: bool = False
    eta_max: float = 1.0
    read: str = "token"
    bound: tuple[float, float] | None = (0.25, 1.0)
    half_life: int | None = 2048
    adapt: tuple[str, ...] = ("k", "v", "eta", "alpha")
    conv: int = 4
    rotary: bool = True
    levels: tuple[Level, ...] = (Level(chunk=4), Level(chunk=16), Level())
    variant: str = "independent"
    meta_gradient: str = "full"
    mlp_hidden: int | None = None
    truncate: int | None = None
    remat: bool = False

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer={self.mixer!r}: use one of {MIXERS}")
        if self.mlp_hidden is not None and self.mlp_hidden < 1:
            raise ValueError(f"mlp_hidden={self.mlp_hidden}: give a width of 1 or more")
        if self.channel not in ("cms", "mlp"):
            raise ValueError(f"channel={self.channel!r}: use 'cms' or 'mlp'")
        for name in ("vocab_size", "dim", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")

    @classmethod
    def size(cls, name: str, **changes: Any) -> HopeConfig:
        """The configuration of that size ("tiny", "small", "medium", "large"), with changes."""
        if name not in SIZES:
            raise ValueError(f"size {name!r} is unknown: use one of {sorted(SIZES)}")
        dim, layers, heads = SIZES[name]
        return cls(**{"dim": dim, "layers": layers, "heads": heads, **changes})

    def with_half_life(self, tokens: int | None) -> HopeConfig:
        """The same model with memories and levels that fade to their start by half in so long."""
        levels = tuple(replace(level, half_life=tokens) for level in self.levels)
        return replace(self, half_life=tokens, levels=levels)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HopeConfig:
        """The inverse of `to_dict`; ValueError names a field that this version does not know."""
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)} in the model's configuration")
        data = {"half_life": None, **data}  # before there was a default, nothing faded
        if "levels" in data:
            # before there was a choice, both matrices of a level learned
            data["levels"] = tuple(Level(**{"learns": "all", **_tuples(x)}) for x in data["levels"])
        return cls(**_tuples(data))


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that a configuration holds."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}


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

    def forward(self, x: Tensor, state: tuple[Any, Any]) -> tuple[Tensor, tuple[Any, Any]]:
        mixed, mixer = self.mixer(self.norm(x), state[0])
        y, channel = self.channel(x + mixed, state[1])
        return y, (mixer, channel)


def _mixer(c: HopeConfig) -> nn.Module:
    if c.mixer == "attention":
        return Attention(c.dim, c.heads, conv=c.conv, gate=c.conv > 0, rotary=c.rotary)
    common: dict[str, Any] = {"conv": c.conv, "truncate": c.truncate, "remat": c.remat}
    if c.mixer == "hope":
        return SelfModifyingTitans(
            c.dim, c.heads, c.chunk, projection_chunk=c.projection_chunk, hidden=c.hidden,
            depth=c.depth, objective=c.objective, dgd=c.dgd, weight_decay=c.weight_decay,
            momentum=c.momentum, eta_max=c.eta_max, read=c.read, bound=c.bound,
            half_life=c.half_life, adapt=c.adapt,
            **common,
        )  # fmt: skip
    if c.mixer == "titans":
        return static_titans(c.dim, c.heads, chunk=c.chunk, hidden=c.hidden, **common)
    build = gated_deltanet if c.mixer == "deltanet" else linear_attention
    return build(c.dim, c.heads, chunk=c.chunk, eta_max=c.eta_max, **common)


def _channel(c: HopeConfig) -> nn.Module:
    if c.channel == "mlp":
        return SwiGLU(c.dim, 8 * c.dim // 3 if c.mlp_hidden is None else c.mlp_hidden)
    return ContinuumMemory(
        c.dim, c.levels, c.variant, meta_gradient=c.meta_gradient,
        truncate=c.truncate, remat=c.remat,
    )  # fmt: skip


class HopeLM(nn.Module):
    """A language model of Hope blocks: ids [B, T] -> (logits [B, T, vocab_size], state)."""

    def __init__(self, config: HopeConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(HopeBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=1.0)

    def init_state(self, batch: int) -> HopeState:
        """The state before the first token; also the template to load a saved state into."""
        return HopeState(tuple(block.init_state(batch) for block in self._chain()))

    def compile(self, **options: Any) -> None:
        """Compile the memories' layers, in place: see `nestlearn.layers.mixers.Stepping`."""
        compile_steps(self, **options)

    def _chain(self) -> list[HopeBlock]:
        return [block for block in self.blocks if isinstance(block, HopeBlock)]

    def forward(self, ids: Tensor, state: HopeState | None = None) -> tuple[Tensor, HopeState]:
        self._check_ids(ids)
        state = self.init_state(ids.shape[0]) if state is None else state
        if not isinstance(state, HopeState) or len(state.blocks) != len(self.blocks):
            raise ValueError(
                f"state is of another model: give a HopeState of {len(self.blocks)} blocks, as "
                "an earlier call returned it"
            )
        x, states = self.embed(ids), []
        for block, before in zip(self._chain(), state.blocks, strict=True):
            x, after = block(x, before)
            states.append(after)
        return self.head(self.norm(x)), HopeState(tuple(states))

    def _check_ids(self, ids: Tensor) -> None:
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
        generator: torch.Generator | None = None,
        state: HopeState | None = None,
    ) -> Tensor:
        """Continue ids [B, T]: [B, T + max_new_tokens]. temperature 0 takes the likeliest token.

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
        longer, new = [ids], ids
        for _ in range(max_new_tokens):
            logits, state = self(new, state)
            new = _choose(logits[:, -1].float(), temperature, top_k, generator)
            longer.append(new)
        return torch.cat(longer, 1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into the folder, each whole or not at all.

        Parameters that are one (a tied head) are written under each of their names, and are one
        again when loaded.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # A copy of its own: safetensors refuses tensors that share storage.
        weights = {
            k: v.detach().clone(memory_format=torch.contiguous_format)
            for k, v in self.state_dict().items()
        }
        ties = {"ties": json.dumps(_ties(self))}
        text = json.dumps({"format": FORMAT, **self.config.to_dict()}, indent=2)
        atomic_write(folder / "model.safetensors", lambda path: save_file(weights, path, ties))
        atomic_write(
            folder / "config.json", lambda path: path.write_text(text + "\n", encoding="utf-8")
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, half_life: int | None = None) -> HopeLM:
        """The model that `save_pretrained` wrote.

        half_life: let its memories fade to their start by half in so many tokens; for streams much
        longer than those that it was trained on (see `docs/results.md`).

        Raises FileNotFoundError if there is none, ValueError if a file is damaged or does not fit.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is missing: give a folder that save_pretrained wrote"
                )
        again = "save the model again, or take it from a checkpoint"
        try:
            data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if data.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            config = HopeConfig.from_dict(data)
            model = cls(config if half_life is None else config.with_half_life(half_life))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / 'config.json'} is damaged ({error}): {again}") from error
        try:
            weights = load_file(folder / "model.safetensors")
            model.load_state_dict(weights)
            model.to(next(iter(weights.values())).dtype)
            with safe_open(folder / "model.safetensors", "pt") as file:
                ties = json.loads((file.metadata() or {}).get("ties", "{}"))
            for name, first in ties.items():
                owner, _, own = name.rpartition(".")
                setattr(model.get_submodule(owner), own, model.get_parameter(first))
        except (SafetensorError, RuntimeError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{folder / 'model.safetensors'} is damaged or of another model ({reason}): {again}"
            ) from error
        return model

    def parameter_count(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.parameters())


def _ties(model: nn.Module) -> dict[str, str]:
    """Of parameters with several names each further one, and the first."""
    first: dict[nn.Parameter, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            found[name] = first[parameter]
    return found


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
