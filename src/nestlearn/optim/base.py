"""The one torch optimizer of this room: it runs a chain for each parameter group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from .chain import At, Layout, Memory, Slot, State, Transform, Updates
from .sharded import gradient_of, like, local

Check = tuple[Callable[[Any], bool], str]
Checks = dict[str, Check]
Choices = dict[str, tuple[Any, ...]]
Steps = dict[str, str]
Group = dict[str, Any]


def _share(x: Any) -> bool:
    return 0 <= x < 1


CHECKS: Checks = {
    "lr": (lambda x: 0 <= float(x) < math.inf, "a learning rate of 0 or more"),
    "weight_decay": (lambda x: 0 <= x < math.inf, "0 or more, e.g. 0.1"),
    "momentum": (_share, "a share of the past from 0 to below 1, e.g. 0.9"),
    "delta": (lambda x: 0 <= x < 2, "a number from 0 to below 2, e.g. 0.5"),
    "betas": (
        lambda x: len(x) == 2 and all(0 <= b < 1 for b in x),
        "two numbers from 0 to below 1, e.g. (0.9, 0.95)",
    ),
    "eps": (lambda x: 0 <= x < math.inf, "a small number of 0 or more, e.g. 1e-8"),
    "alpha": (lambda x: 0 <= x < math.inf, "a weight of 0 or more, e.g. 0.25"),
    "slow": (_share, "a share of the past from 0 to below 1, e.g. 0.9"),
    "period": (lambda x: isinstance(x, int) and x >= 1, "an integer of 1 step or more, e.g. 20"),
    "ns_steps": (lambda x: isinstance(x, int) and 1 <= x < 100, "1 to 99 steps, e.g. 5"),
    "ns_coefficients": (lambda x: len(x) == 3, "three numbers (a, b, c)"),
    "rule": (lambda x: x in (None, "matrix", "auxiliary"), "matrix, auxiliary or None (by shape)"),
    "split": (
        lambda x: all(isinstance(n, int) and n >= 1 for n in ([x] if isinstance(x, int) else x)),
        "a number of equal parts, e.g. 3, or the rows of each part",
    ),
}  # fmt: skip


def given(here: dict[str, Any], *but: str) -> dict[str, Any]:
    """Of a constructor's `locals()` its arguments, but for some: so it states an option once."""
    return {k: v for k, v in here.items() if k not in ("self", "__class__", *but)}


class ChainOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that runs a chain of transforms: W ← (1 − lr λ) W − lr u.

    A subclass says by `chain(group, rule)` which transform a group runs, reading the group's
    options at every step (schedulers may write them), and by `checks` and CHECKS which values they
    may have. Options of every group: lr, weight_decay (decoupled), maximize, rule ("matrix" or
    "auxiliary"; None: a matrix from two axes on), stacked and split (`Layout`).

    The state is flat tensors by parameter, `step` among them, so that a state_dict resumes bit for
    bit, the phase of slow memories included. p.grad is read and never changed; a parameter
    without a gradient, or without values, is left as it is, its step too. Of half-precision
    parameters the state is float32. Sharded parameters (FSDP2, DTensor) are stepped in place; a
    rule that reads whole matrices gathers them, and each process computes it for itself.
    """

    checks: ClassVar[Checks] = {}
    choices: ClassVar[Choices] = {}
    row_rules = False  # whether vectors run the matrix rule, as one row
    # for `levels`
    steps: ClassVar[Steps] = {"matrix": "W ← W − lr u", "auxiliary": "W ← W − lr m̂ / (√v̂ + ε)"}

    def __init__(self, params: ParamsT, **options: Any) -> None:
        plain = {"weight_decay": 0.0, "maximize": False, "rule": None, "stacked": False, "split": 1}
        super().__init__(params, {**plain, **options})

    def chain(self, group: Group, rule: str) -> Transform:
        """The transform that a group runs, for its parameters of that rule."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; ValueError names an option's bad value, or a parameter that cannot be."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except ValueError:
            del self.param_groups[-1]
            raise

    def _check(self, group: Group) -> None:
        for name, (ok, remedy) in {**CHECKS, **self.checks}.items():
            if name in group and not _passes(ok, group[name]):
                raise ValueError(f"{name}={group[name]!r}: choose {remedy}")
        for name, allowed in self.choices.items():
            if group[name] not in allowed:
                raise ValueError(f"{name}={group[name]!r}: use one of {allowed}")
        for p in group["params"]:
            if p.is_complex():
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is complex: give "
                    "torch.view_as_real(parameter)"
                )
            if p.layout != torch.strided:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is sparse: give parameter.to_dense()"
                )
            self._layout(p, group)

    def _rule(self, p: Tensor, group: Group) -> str:
        if group["rule"] is not None:
            return group["rule"]
        return "matrix" if p.ndim >= 2 or self.row_rules else "auxiliary"

    def _layout(self, p: Tensor, group: Group) -> Layout:
        """ValueError where `split` does not add up to the rows."""
        split, stacked = group["split"], group["stacked"]
        if split == 1 or p.ndim < 2:
            return Layout(stacked)
        rows = p.shape[-2] if stacked else p.shape[0]
        parts = (rows // split,) * split if isinstance(split, int) else tuple(split)
        if sum(parts) != rows:
            raise ValueError(
                f"split={split!r} does not fit a parameter of shape {tuple(p.shape)}: its {rows} "
                "rows must be shared out completely"
            )
        return Layout(stacked, parts)

    # ---------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due = [[p for p in g["params"] if _has_gradient(p)] for g in self.param_groups]
        for group, moving in zip(self.param_groups, due):
            by_rule: dict[str, list[Tensor]] = {}
            for p in moving:
                by_rule.setdefault(self._rule(p, group), []).append(p)
            for rule, params in by_rule.items():
                for portion in _portions(params):
                    self._advance(group, self.chain(group, rule), portion)
        return loss

    def _advance(self, group: Group, chain: Transform, params: list[Tensor]) -> None:
        slots, states = zip(*(self._slot(p, group, chain) for p in params))
        gradients = _gradients(slots, group["maximize"])
        lr = float(group["lr"])
        values = [s.value for s in slots]
        at = At(slots, tuple(gradients), lr)
        u = chain.update(gradients, list(states), at)
        if group["weight_decay"]:
            torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
        torch._foreach_add_(values, u, alpha=-1 if chain.sized else -lr)
        for p in params:
            self.state[p]["step"] += 1

    def _slot(self, p: Tensor, group: Group, chain: Transform) -> tuple[Slot, State]:
        """The parameter as the chain sees it, and its state, made at the first step."""
        state = self.state[p]
        layout = self._layout(p, group)
        if not state:
            state |= self._start(p, group, chain)
        own = {name: local(t) for name, t in state.items() if name != "step"}
        return Slot(local(p), p.shape, int(state["step"]), p, layout), own

    def _start(self, p: Tensor, group: Group, chain: Transform) -> State:
        """The state of a parameter before its first step."""
        slot = Slot(local(p), p.shape, 0, p, self._layout(p, group))
        made = chain.init(slot)
        state = {k: like(t, p) if t.shape == slot.value.shape else t for k, t in made.items()}
        return {**state, "step": torch.tensor(0.0)}

    # --------------------------------------------------------------------------------- state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state: its tensors are copied and keep their types (torch shares and casts).

        An option that the saved groups do not have stays as it is here. ValueError, before
        anything is changed, names a bad value, or what a parameter's state lacks.
        """
        state_dict = self._complete(state_dict)
        super().load_state_dict(state_dict)
        numbers = [n for g in state_dict["param_groups"] for n in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        for number, p in zip(numbers, params):
            for name, value in state_dict["state"].get(number, {}).items():
                value = torch.as_tensor(value).detach().clone()
                self.state[p][name] = value if name == "step" else value.to(p.device)

    def _complete(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The same with all options, brought to today's form; only what can go on."""
        groups = [dict(g) for g in state_dict["param_groups"]]
        sizes = ([len(g["params"]) for g in some] for some in (groups, self.param_groups))
        if len({tuple(size) for size in sizes}) > 1:
            return state_dict  # torch refuses it, and says why
        states = {number: dict(state) for number, state in state_dict["state"].items()}
        for saved, group in zip(groups, self.param_groups):
            own = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            kept = {n: p for n, p in zip(saved["params"], group["params"]) if states.get(n)}
            self.upgrade(saved, [states[n] for n in kept])
            saved.update({**own, **saved})
            self._check({**saved, "params": group["params"]})
            for number, p in kept.items():
                chain = self.chain(saved, self._rule(p, saved))
                _fits(states[number], self._start(p, saved, chain), p)
        return {**state_dict, "state": states, "param_groups": groups}

    @staticmethod
    def upgrade(group: Group, states: list[State]) -> None:
        """Bring a group's options and states that an older version saved to today's form."""

    def memories(self) -> list[tuple[Memory, int]]:
        """What the optimizer remembers (eq. 6), and of how many parameters: for `levels`."""
        found: dict[Memory, int] = {}
        for group in self.param_groups:
            for p in group["params"]:
                for memory in self.chain(group, self._rule(p, group)).memories:
                    found[memory] = found.get(memory, 0) + p.numel()
        return list(found.items())

    def step_of(self, p: Tensor, group: Group) -> str:
        """The rule that writes a parameter, for `levels`."""
        return self.steps.get(self._rule(p, group), self.steps["matrix"])


def _portions(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in turns, whose updates are all that is in memory at a time.

    On a CPU they stay in its caches; an accelerator wants many matrices at once.
    """
    portion: list[Tensor] = []
    size = 0
    for p in params:
        limit = 2**20 if p.device.type == "cpu" else 2**26
        if portion and size + p.numel() > limit:
            yield portion
            portion, size = [], 0
        portion.append(p)
        size += p.numel()
    yield portion


def _passes(ok: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(ok(value))
    except (TypeError, ValueError):
        return False


def _has_gradient(p: Tensor) -> bool:
    """Whether there is anything to step; ValueError for a gradient that cannot be read."""
    if p.grad is None or not p.numel():
        return False
    if p.grad.layout != torch.strided:
        raise ValueError(
            f"the gradient of a parameter of shape {tuple(p.shape)} is sparse: build the "
            "embedding with sparse=False, or give that parameter to torch.optim.SparseAdam"
        )
    return True


def _fits(saved: State, start: State, p: Tensor) -> None:
    """ValueError where a saved state is not one that these options go on from."""
    what = f"the saved state of a parameter of shape {tuple(p.shape)}"
    remedy = "load it into the optimizer, and the model, that saved it"
    if missing := sorted(start.keys() - saved.keys()):
        raise ValueError(f"{what} has no {', '.join(missing)}, but {sorted(saved)}: {remedy}")
    for name, t in start.items():
        found = tuple(torch.as_tensor(saved[name]).shape)
        if found != tuple(t.shape):
            raise ValueError(f"{what} has {name} of shape {found}, not {tuple(t.shape)}: {remedy}")


def _gradients(slots: Iterable[Slot], maximize: bool) -> Updates:
    """The gradients as first updates: of the state's type, downhill; p.grad stays as it is."""
    found = []
    for slot in slots:
        g = gradient_of(slot.source)
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        found.append(g.neg() if maximize else g)
    return found


def check_model(model: object, who: str) -> None:
    """TypeError unless it is a module: some optimizers look at layers, not at parameters alone."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who} takes the model itself, not {type(model).__name__}: {who}(model)")
