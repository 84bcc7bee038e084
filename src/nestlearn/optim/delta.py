"""Delta gradient descent (eqs. 56, 57): a descent that sees each layer's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .base import ChainOptimizer, Checks, Choices, Group, Steps, check_model, given
from .chain import At, Transform, Updates, chain, stateless
from .sharded import own_part, whole_of
from .transforms import momentum as momentum_memory

Solve = Literal["exact", "trace"]
LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)


class Tap:
    """What one layer has read since the last update: Σ x xᵀ and the number of inputs x.

    A hook on the layer's output counts its inputs in the backward pass, once for each time that a
    gradient comes back: evaluation, frozen parts and the second forward pass of activation
    checkpointing add nothing. Micro-batches add up. The sum is float32 at least, [groups, K, K]
    (an embedding's, whose inputs are unit vectors, is the counts [V]). With `keep` the pairs
    (x, ∂L/∂y) themselves are kept too.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.keep = module, False
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.clear()
        self.handle = module.register_forward_hook(self._watch)

    def clear(self) -> None:
        self.sum: Tensor | None = None
        self.count, self.used = 0, False
        self.pairs.clear()

    @torch.compiler.disable
    def _watch(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if torch.is_grad_enabled() and y.requires_grad:
            x = args[0].detach()
            y.register_hook(lambda grad: self._count(x, grad))

    @torch.no_grad()
    def _count(self, x: Tensor, grad: Tensor) -> None:
        if self.used:  # the first backward pass after an update
            self.clear()
        for rows in inputs(self.module, x):
            if isinstance(self.module, nn.Embedding):
                counts = torch.bincount(rows, minlength=self.module.num_embeddings)
                new = counts.to(torch.promote_types(grad.dtype, torch.float32))
                self.count += rows.numel()
            else:
                rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
                new = rows.mT @ rows
                self.count += rows.shape[-2]
            self.sum = new if self.sum is None else self.sum.add_(new)
        if self.keep:
            self.pairs.append((x, grad.detach()))


def mean_square(seen: list[Tap]) -> Tensor | None:
    """C, the mean of x xᵀ over the inputs of all taps and processes; None if none were seen."""
    sums = [tap.sum for tap in seen if tap.sum is not None]
    if not sums:
        return None
    total = torch.stack(sums).sum(0)
    count = torch.tensor(sum(tap.count for tap in seen), dtype=total.dtype, device=total.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        dist.all_reduce(count)
    return total / count.clamp(min=1)  # of an empty batch: zero


def inputs(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The vectors that the layer's matrix is applied to: [groups, N, K], in parts.

    Of a linear layer its inputs, of a convolution the patches under its kernel at each place, of
    an embedding the token ids [N].
    """
    if isinstance(module, nn.Embedding):
        yield x.reshape(-1)
    elif isinstance(module, nn.Conv2d):
        for image in x if x.ndim == 4 else (x,):  # one image at a time: patches are k² as large
            padded, padding = _padded(module, image[None])
            patches = F.unfold(padded, module.kernel_size, module.dilation, padding, module.stride)
            yield patches.reshape(module.groups, -1, patches.shape[-1]).mT
    else:
        yield x.reshape(1, x.shape[:-1].numel(), x.shape[-1])  # also of no inputs, of no width


def _padded(module: nn.Conv2d, x: Tensor) -> tuple[Tensor, Any]:
    if module.padding_mode != "zeros":
        return F.pad(x, module._reversed_padding_repeated_twice, module.padding_mode), 0
    if isinstance(module.padding, str):  # "same" may be uneven
        return F.pad(x, module._reversed_padding_repeated_twice), 0
    return x, module.padding


class DGD(ChainOptimizer):
    """Delta gradient descent (eq. 57): W ← W (I − η′ x xᵀ) − η′ δ xᵀ, η′ = η / (1 + η ‖x‖²).

    One input at a time it is the proximal step on ½‖W x − u‖² with the self-generated target
    u = −δ, δ = ∂L/∂(W x). For the inputs of a batch, or of several accumulated ones, that step is
    W ← (W − η G) (I + η ρ C)⁻¹ with G = p.grad and C the mean of x xᵀ over every input since the
    last update. It takes the loss for a *mean*: scale micro-batches by 1/n as always.

    model: the module whose layers it watches; all its trainable parameters are optimised.
    nn.Linear, nn.Conv2d (its patches are the inputs) and nn.Embedding (x is one-hot, C the token
    frequencies) follow eq. 57. **Every other parameter takes plain gradient descent, W ← W − η g**:
    biases, gains, bare nn.Parameters, weights tied between two kinds of layers, and layers whose
    forward is not called, as inside nn.MultiheadAttention; `plain` names those known beforehand.

    lr: η. forget: ρ, the share of the retention term; 1 is eq. 57, 0 plain descent. The term draws
    W x towards zero where no δ holds it: the fixed point is δ = −ρ W x, not δ = 0; for training a
    network to a low loss give a small one, e.g. 1e-3. momentum: of the step, 0 for none. solve:
    "exact" factorises a [K, K] matrix for each layer and step, K its inputs' width; "trace" is
    eq. 57 with ‖x‖² replaced by its mean, cheaper, and exact for one input; steps get shorter.
    Call `zero_grad` of the optimizer: it forgets what was read. Processes of a running
    torch.distributed group are taken for data-parallel, and share their C.

    Not for tensor parallelism, nor for layers so wide that K³ per step is too much ("trace"), nor
    in float32 for inputs of a size of 1000 and more, beside which the I of I + η C has few digits.
    """

    checks: ClassVar[Checks] = {
        "forget": (lambda x: 0 <= x < float("inf"), "a share of 0 or more; 1 is eq. 57")
    }
    choices: ClassVar[Choices] = {"solve": get_args(Solve)}
    steps: ClassVar[Steps] = {"watched": "W ← W (I − η′ x xᵀ) − η′ δ xᵀ", "plain": "W ← W − lr g"}

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        *,
        forget: float = 1.0,
        momentum: float = 0.0,
        solve: Solve = "exact",
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        options = given(locals(), "model")
        check_model(model, type(self).__name__)
        self.taps = taps(model)
        owners = {id(tap.module.weight) for tap in self.taps}
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.plain = [name for name, p in named if id(p) not in owners]
        super().__init__([p for _, p in named], **options)

    def chain(self, group: Group, rule: str) -> Transform:
        """Eq. 57 for the layers that are watched, plain descent for the rest; then momentum."""
        step = stateless(lambda u, at: self._steps(u, at, group))
        return chain(step, momentum_memory(group["momentum"])) if group["momentum"] else step

    def step_of(self, p: Tensor, group: Group) -> str:
        """The rule that writes a parameter, for `levels`."""
        watched = any(tap.module.weight is p for tap in self.taps)
        return self.steps["watched" if watched else "plain"]

    def _steps(self, u: Updates, at: At, group: Group) -> Updates:
        seen: dict[int, list[Tap]] = {}
        for tap in self.taps:
            seen.setdefault(id(tap.module.weight), []).append(tap)
        found = []
        for g, slot in zip(u, at.slots):
            C = mean_square(seen.get(id(slot.source), []))
            if C is not None and group["forget"]:
                w, whole = (whole_of(t, slot.source).to(g.dtype) for t in (slot.value, g))
                C = C.to(g.dtype) * group["forget"]
                g = own_part(delta_step(w, whole, C, at.lr, group["solve"]), slot.source)
            found.append(g)
        return found

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; what was read counts for it and for no later one."""
        loss = super().step(closure)
        for tap in self.taps:
            tap.used = True
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and the inputs that they came from."""
        super().zero_grad(set_to_none)
        for tap in self.taps:
            tap.clear()

    def detach(self) -> None:
        """Take the hooks off the model, which then trains as before."""
        for tap in self.taps:
            tap.handle.remove()


def taps(model: nn.Module) -> list[Tap]:
    """A tap on every layer that eq. 57 is defined for, and whose weight serves no other kind.

    A weight that is computed at each access (a parametrization) is none of the optimizer's.
    """
    kinds: dict[int, set[type]] = {}
    layers = [m for m in model.modules() if isinstance(m, LAYERS) and "weight" in m._parameters]
    layers = [m for m in layers if m.weight.requires_grad]
    for m in layers:
        kinds.setdefault(id(m.weight), set()).add(next(k for k in LAYERS if isinstance(m, k)))
    return [Tap(m) for m in layers if len(kinds[id(m.weight)]) == 1]


def delta_step(w: Tensor, g: Tensor, C: Tensor, lr: float, solve: str = "exact") -> Tensor:
    """u with W − lr u = (W − lr G)(I + lr C)⁻¹, that is u = (W C + G)(I + lr C)⁻¹.

    C: [groups, K, K] for weights [out, ...] of K inputs for each group, or [V] for an embedding
    [V, D]. solve="trace": u = (W C + G) / (1 + lr tr C).
    """
    if C.ndim == 1:
        frequency = C[:, None]
        return (w * frequency + g) / (1 + lr * (frequency if solve == "exact" else C.sum()))
    K = C.shape[-1]
    wide = (C.shape[0], -1, K)
    force = w.reshape(wide) @ C + g.reshape(wide)
    if solve == "trace":
        trace = C.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        return (force / (1 + lr * trace)).reshape(w.shape)
    eye = torch.eye(K, dtype=C.dtype, device=C.device)
    factor, _ = torch.linalg.cholesky_ex(eye + lr * C)  # of inputs that are not finite: NaN
    return torch.cholesky_solve(force.mT, factor).mT.reshape(w.shape)
