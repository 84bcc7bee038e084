"""On a CUDA card, forward and backward of a layer or a model: python -m bench.gpu --help

In bfloat16 (autocast; memories in float32, products as TF32), the same number of tokens at every
length. Ours is replayed as one CUDA graph, as `train` does; "compiled" after `compile()`. A row in
segments goes on from its own detached state: one graph of a segment, replayed over the length.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, nn

from nestlearn import HopeConfig, HopeLM, Level, SelfModifyingTitans, options, state
from nestlearn.disk import atomic_write
from nestlearn.experiments.models import with_parameters
from nestlearn.layers import gated_deltanet
from nestlearn.options import Continuum, SwiGLU, Titans

VOCABULARY = 256
WARM = 1024  # tokens of the passes before the one that is captured: one run of 16 chunks
Step = Callable[[], None]


class Attention(nn.Module):
    """Causal attention between its two projections, by torch's fastest kernel."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(o.transpose(1, 2).reshape(B, T, D))


class FlashLinearAttention(nn.Module):
    """Gated DeltaNet by flash-linear-attention's kernel (pip install flash-linear-attention)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        self.rule, self.heads = chunk_gated_delta_rule, heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.gates = nn.Linear(dim, 2 * heads)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (a.contiguous() for a in self.qkv(x).view(B, T, 3, self.heads, -1).unbind(2))
        decay, beta = self.gates(x).view(B, T, 2, self.heads).unbind(2)
        o, _ = self.rule(
            q, k, v, F.logsigmoid(decay.float() + 5), beta.sigmoid(), use_qk_l2norm_in_kernel=True
        )
        return self.out(o.reshape(B, T, D))


def model(dim: int, heads: int, **changes: Any) -> HopeLM:
    """A language model over bytes of 12 blocks, with the parameters of the plain Hope."""
    hope = HopeConfig.size("large", dim=dim, heads=heads, vocab_size=VOCABULARY)
    config = replace(hope, **changes)
    if isinstance(config.channel, SwiGLU):
        with torch.device("meta"):
            config = with_parameters(config, HopeLM(hope).parameter_count())
    return HopeLM(config)


def side_by_side(dim: int, heads: int) -> HopeLM:
    """A plain Hope whose blocks read parts of a long sample side by side."""
    lm = model(dim, heads)
    lm.side_by_side = True
    return lm


class Row(NamedTuple):
    """graph: replayed as one. compiled: after compile(). longest: left out beyond that length.

    segment: tokens after which the outer gradient is cut, of a model.
    """

    build: Callable[[int, int], nn.Module]
    graph: bool = True
    compiled: bool = False
    longest: float = float("inf")
    segment: int | None = None


MLPS = Titans(depth=2, half_life=None)  # memories with a hidden layer, as in earlier tables
TITANS = partial(SelfModifyingTitans, options=MLPS)
TORCH = partial(TITANS, backend="torch")
LAYERS = {
    "attention": Row(Attention, graph=False),
    "flash-linear-attention, gated DeltaNet": Row(FlashLinearAttention, graph=False),
    "SelfModifyingTitans of matrices": Row(SelfModifyingTitans),
    "SelfModifyingTitans, compiled": Row(TITANS, compiled=True),
    "SelfModifyingTitans": Row(TITANS),
    "SelfModifyingTitans, recomputed": Row(partial(TITANS, remat=True), longest=65536),
    "SelfModifyingTitans, torch's products, compiled": Row(TORCH, compiled=True, longest=65536),
    "SelfModifyingTitans, from Python": Row(TITANS, graph=False, longest=16384),
    "gated DeltaNet": Row(gated_deltanet, longest=16384),
    "gated DeltaNet, compiled": Row(gated_deltanet, compiled=True, longest=16384),
}
SLOW = Continuum((Level(chunk=128), Level(chunk=512), Level()))
STATIC = partial(model, channel=SwiGLU())
MODELS = {
    "Transformer": Row(partial(STATIC, mixer=options.Attention()), graph=False),
    "Hope, static MLP": Row(STATIC),
    "Hope, static MLP, compiled": Row(STATIC, compiled=True),
    "Hope, static MLP, recomputed": Row(partial(STATIC, remat=True), longest=16384),
    "Hope, static MLP, segments": Row(STATIC, segment=2048),
    "Hope, static MLP, segments, compiled": Row(STATIC, compiled=True, segment=2048),
    "Hope, segments of 16,384, compiled": Row(model, compiled=True, segment=16384),
    "Hope, the same, side by side, segments": Row(side_by_side, compiled=True, segment=32768),
    "Hope, side by side, segments of 65,536": Row(side_by_side, compiled=True, segment=65536),
    "Hope": Row(model),
    "Hope, compiled": Row(model, compiled=True),
    "Hope, recomputed": Row(partial(model, remat=True)),
    "Hope, levels 128 and 512, recomputed": Row(partial(model, channel=SLOW, remat=True)),
}


def main(
    out: Annotated[Path, typer.Option(help="For gpu.json or gpu-model.json.")] = Path(
        "bench/results"
    ),
    whole: Annotated[bool, typer.Option("--model", help="A model of 12 blocks, no layer.")] = False,
    dim: Annotated[int, typer.Option(help="Width.")] = 768,
    heads: Annotated[int, typer.Option(help="Heads.")] = 12,
    tokens: Annotated[int, typer.Option(help="Of a step, batch × length.")] = 131_072,
    lengths: Annotated[str, typer.Option(help="Of a sample.")] = "2048,16384,65536,131072",
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps; the median counts.")] = 5,
    limit: Annotated[float, typer.Option(help="Seconds for the timed steps of one row.")] = 10.0,
    only: Annotated[str, typer.Option(help="Rows whose name contains this.")] = "",
) -> None:
    """Tokens/s and peak memory of a training step of one layer, or of a model."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA card here: `python -m bench` measures on the CPU")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    console, records = Console(width=150), []
    rows = {name: row for name, row in (MODELS if whole else LAYERS).items() if only in name}
    for length in (int(n) for n in lengths.split(",")):
        for name, row in rows.items():
            if length > row.longest:
                continue
            record: dict[str, Any] = {
                "contestant": name, "T": length, "batch": max(1, tokens // length), "width": dim,
                "heads": heads, "device": torch.cuda.get_device_name(), "torch": torch.__version__,
            }  # fmt: skip
            try:
                record |= _measure(row, record["batch"], length, dim, heads, repeats, limit)
                shown = (
                    f"{record['tokens_per_second']:12,.0f} tokens/s {record['peak_gib']:6.1f} GiB  "
                    f"prepared in {record['prepare']:.0f} s"
                )
            except (ImportError, RuntimeError) as error:  # out of memory, too
                record["error"] = " ".join(str(error).split())[:300]
                shown = record["error"][:90]
            console.print(f"T {length:7,} {name:48} {shown}", highlight=False)
            records.append(record)
            out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(records, indent=1) + "\n"
            file = out / f"gpu{'-model' if whole else ''}.json"
            atomic_write(file, partial(Path.write_text, data=text))


def timed(run: Callable[[], object], repeats: int, limit: float = float("inf")) -> list[float]:
    """Seconds of each call on the card: `repeats` of them, or until together they pass `limit`."""
    times: list[float] = []
    while not times or (len(times) < repeats and sum(times) < limit):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times


def _measure(
    row: Row, batch: int, length: int, dim: int, heads: int, repeats: int, limit: float
) -> dict[str, float]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    began = time.perf_counter()
    module = row.build(dim, heads).cuda()
    if row.compiled:
        module.compile()
    # compiled code may be made again for another length, which a capture does not survive
    whole = row.segment or length if row.compiled else WARM
    short = _step(module, batch, min(length, whole), dim)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what is made at the first call is made outside the graph
        for _ in range(2):
            short()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    segment = min(row.segment or length, length)
    step = (_segment if row.segment else _step)(module, batch, segment, dim)
    run = _repeated(_as_graph(step) if row.graph else step, length // segment)
    run()
    torch.cuda.synchronize()
    prepare = time.perf_counter() - began
    times = timed(run, repeats, limit)
    seconds = statistics.median(times)
    return {
        "seconds": seconds,
        "seconds_low": min(times),
        "seconds_high": max(times),
        "repeats": len(times),
        "tokens_per_second": batch * length / seconds,
        "prepare": prepare,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "parameters": sum(p.numel() for p in module.parameters()),
    }


def _step(module: nn.Module, batch: int, length: int, dim: int) -> Step:
    """Forward and backward, of a layer with a random gradient, of a model with its loss."""
    whole = isinstance(module, HopeLM)
    given = torch.randint(VOCABULARY, (batch, length), device="cuda")
    x, dy = given, given
    if not whole:
        x, dy = (torch.randn(batch, length, dim, device="cuda") for _ in range(2))
        x.requires_grad_()

    def step() -> None:
        module.zero_grad()
        x.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        if whole:
            F.cross_entropy(y.float().flatten(0, 1), x.flatten()).backward()
        else:
            y.backward(dy.to(y.dtype))

    return step


def _segment(module: nn.Module, batch: int, length: int, _dim: int) -> Step:
    """Forward and backward of a model on the tokens after those of the call before."""
    given = torch.randint(VOCABULARY, (batch, length), device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        before = state.tree_map(torch.clone, module(given)[1])
    for p in module.parameters():
        p.grad = torch.zeros_like(p)  # a graph adds to what is there when it is made

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            y, after = module(given, before)
        F.cross_entropy(y.float().flatten(0, 1), given.flatten()).backward()
        state.tree_map(lambda old, new: old.copy_(new.detach()), before, after)

    step()  # what a state that goes on compiles is compiled here, outside the graph
    return step


def _repeated(step: Step, times: int) -> Step:
    def run() -> None:
        for _ in range(times):
            step()

    return run


def _as_graph(step: Step) -> Step:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


if __name__ == "__main__":
    typer.run(main)
