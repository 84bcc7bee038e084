"""A step captured as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Captured:
    """Forward and backward pass for one shape of input, captured once and replayed as one graph.

    A memory's chunk is some hundred small kernels, which take longer to launch from Python than to
    run. run(*inputs) -> loss, with fresh gradients in `.grad`: this graph's own, which a replay
    puts back. first: what is run, twice, before the capture (default: run).
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[..., Tensor],
        *inputs: Tensor,
        first: Callable[..., object] | None = None,
    ) -> None:
        self.inputs = [x.clone() for x in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made at the first call is made outside the graph
            for _ in range(2):
                (first or run)(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = run(*self.inputs)
        self.gradients = [(p, p.grad) for p in model.parameters()]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the loss of these inputs."""
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.loss
