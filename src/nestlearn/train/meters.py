"""What a run costs: tokens/s, the share of the device's peak, memory, time left; and a trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from nestlearn.train.config import TrainConfig
from nestlearn.train.losses import evaluating
from nestlearn.train.ranks import Ranks

# Dense matrix products in 10¹² a second, by the vendor: bfloat16, tf32, float32.
PEAKS = {
    "A100": (312.0, 156.0, 19.5),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100": (989.0, 495.0, 67.0),
    "H200": (989.0, 495.0, 67.0),
    "L40S": (362.0, 183.0, 91.6),
}


def device_peak(name: str, dtype: str) -> float | None:
    """FLOPs a second of the device of this name; None where it is not in the table."""
    found = next((peaks for key, peaks in PEAKS.items() if key in name), None)
    if found is None:
        return None
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return 1e12 * found[0 if dtype == "bfloat16" else 1 if tf32 else 2]


class _Counter(TorchDispatchMode):
    """Sums the FLOPs of matrix products and attention, by torch's formulas. Not by FlopCounterMode,
    which hooks on to modules, and in torch 2.11 fails on those that differentiate inside.
    """

    flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.flops += sdpa_flop_count(*(x.shape for x in args[:3]))  # not in torch's registry
        elif formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


@torch.no_grad()
def flops_per_token(model: nn.Module, length: int) -> float:
    """FLOPs of a training step for each token: three times the matrix products of a forward pass.

    Counted in one window where the model stands. A kernel of our own counts nothing, so a model
    that is to run by such on a card is counted before it goes there.
    """
    device = next(model.parameters()).device
    counter = _Counter()
    with evaluating(model), counter:
        model(torch.zeros(1, length, dtype=torch.int64, device=device), state=None)
    return 3 * counter.flops / length


def peak_memory(device: torch.device) -> float | None:
    """The most bytes that this process has held on the device; None where nobody knows."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


class Meters:
    """Counts a run's steps, and says what they cost since it was last asked."""

    def __init__(
        self, model: nn.Module, config: TrainConfig, device: torch.device, ranks: Ranks
    ) -> None:
        self._config, self._device, self._ranks = config, device, ranks
        self._steps, self._seconds, self._last = 0, 0.0, 0
        self._profiler: Any = None
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = device_peak(name, config.dtype)
        self._most: float | None = None  # tokens a second at the peak of all devices
        if peak and ranks.first:
            self._most = peak * ranks.size / flops_per_token(model, config.length)

    def step(self, record: dict[str, Any]) -> None:
        """Count a step by its record."""
        self._steps += 1
        self._seconds += self._config.batch * self._config.length / record["tokens_per_second"]
        self._last = record["step"]
        if self._profiler:
            self._profiler.step()

    def report(self) -> str:
        """One line on the steps since the last report."""
        each = self._seconds / self._steps
        rate = self._config.batch * self._config.length / each
        self._steps, self._seconds = 0, 0.0
        several = f" of {self._ranks.size} processes" if self._ranks.size > 1 else ""
        parts = [f"{rate:,.0f} tokens/s{several}"]
        if self._most:
            parts.append(f"{100 * rate / self._most:.1f} % of the peak")
        if memory := peak_memory(self._device):
            parts.append(f"{memory / 1e9:.1f} GB")
        left = round(each * (self._config.steps - self._last))
        parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        return ", ".join(parts)

    @contextmanager
    def traced(self, out: Path | str | None) -> Iterator[None]:
        """Within, a few steps are traced if the run is to be, into out/profile/rank-N.json."""
        if not self._config.profile or out is None:
            yield
            return
        from torch.profiler import profile, schedule

        file = Path(out, "profile", f"rank-{self._ranks.rank}.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        write = lambda trace: trace.export_chrome_trace(str(file))  # noqa: E731
        plan = schedule(wait=1, warmup=1, active=3, repeat=1)
        with profile(schedule=plan, on_trace_ready=write, record_shapes=True) as self._profiler:
            yield
