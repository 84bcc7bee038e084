"""One layer on a CUDA card, forward and backward: python -m bench.gpu --help

In bfloat16 (autocast; memories in float32, products as TF32), the same number of tokens at every
length. Ours runs from Python and as one CUDA graph.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, nn

from nestlearn import SelfModifyingTitans
from nestlearn.disk import atomic_write
from nestlearn.layers import gated_deltanet


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


CONTESTANTS: dict[str, tuple[Callable[[int, int], nn.Module], bool]] = {  # layer, as a graph
    "attention": (Attention, False),
    "flash-linear-attention": (FlashLinearAttention, False),
    "SelfModifyingTitans, graph": (SelfModifyingTitans, True),
    "SelfModifyingTitans": (SelfModifyingTitans, False),
    "gated DeltaNet, graph": (gated_deltanet, True),
}


def main(
    out: Annotated[Path, typer.Option(help="For gpu.json.")] = Path("bench/results"),
    dim: Annotated[int, typer.Option(help="Width.")] = 768,
    heads: Annotated[int, typer.Option(help="Heads.")] = 12,
    tokens: Annotated[int, typer.Option(help="Of a step, batch × length.")] = 131_072,
    lengths: Annotated[str, typer.Option(help="Of a sample.")] = "2048,8192,16384,65536,131072",
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps; the median counts.")] = 5,
) -> None:
    """Tokens/s and peak memory of a training step of one layer."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA card here: `python -m bench` measures on the CPU")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    console, records = Console(), []
    for length in (int(n) for n in lengths.split(",")):
        for name, (build, graph) in CONTESTANTS.items():
            record: dict[str, Any] = {
                "contestant": name, "T": length, "batch": max(1, tokens // length), "width": dim,
                "heads": heads, "device": torch.cuda.get_device_name(), "torch": torch.__version__,
            }  # fmt: skip
            try:
                torch.manual_seed(0)
                record |= _measure(
                    build(dim, heads).cuda(), record["batch"], length, graph, repeats
                )
                console.print(
                    f"T {length:7,} {name:28} {record['tokens_per_second']:12,.0f} tokens/s "
                    f"{record['peak_gib']:6.1f} GiB"
                )
            except (ImportError, torch.cuda.OutOfMemoryError, RuntimeError) as error:
                record["error"] = " ".join(str(error).split())[:300]
                console.print(f"T {length:7,} {name:28} {record['error'][:80]}")
            records.append(record)
            out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(records, indent=1)
            atomic_write(out / "gpu.json", lambda path, text=text: path.write_text(text))


def _measure(
    layer: nn.Module, dim: int, batch: int, length: int, graph: bool, repeats: int
) -> dict[str, float]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    x = torch.randn(batch, length, dim, device="cuda", requires_grad=True)
    dy = torch.randn(batch, length, dim, device="cuda")

    def step() -> None:
        for leaf in (x, *layer.parameters()):
            leaf.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(dy.to(y.dtype))

    run = _as_graph(step) if graph else step
    run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return {
        "seconds": statistics.median(times),
        "seconds_low": min(times),
        "seconds_high": max(times),
        "tokens_per_second": batch * length / statistics.median(times),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def _as_graph(step: Callable[[], None]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


if __name__ == "__main__":
    typer.run(main)
