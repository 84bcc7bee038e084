"""Figure 11, small: a vision transformer under AdamW, Muon and M3.

    nestlearn reproduce fig11 --data ~/data --only CIFAR10   # any torchvision set there

The paper trains on ImageNet-21k; this is a ViT of 4 blocks and width 64 on scikit-learn's digits
(pip install "nestlearn[vision]"), 1,437 images of 8 × 8, or on a torchvision data set that is on
this disk (nothing is downloaded). Same steps, batches, schedule and start for all; each optimizer
takes the best of five learning rates, by its mean training loss of the last tenth over two seeds,
and then runs five others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn import optim
from nestlearn.experiments.experiment import Cell, Experiment, Options, Record, Tell, cells
from nestlearn.experiments.figures import Along, Panel, curves, lines
from nestlearn.experiments.tables import RATE, SEEDS, detail, mean, metric, model
from nestlearn.train import TrainConfig
from nestlearn.train.optimize import adamw, schedule

# one step of about √10 apart, the same number for each
GRIDS = dict.fromkeys(("AdamW", "Muon", "M3"), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
DECAY = 0.05


class Attention(nn.Module):
    """Softmax attention with query, key and value in one matrix."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, learned positions, blocks, the mean over positions: [B, C, S, S] -> [B, classes]."""

    def __init__(self, channels: int, size: int, classes: int, dim: int, depth: int) -> None:
        super().__init__()
        patch = max(2, size // 8)
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, dim))
        self.position.no_decay = True  # type: ignore[attr-defined]
        self.blocks = nn.Sequential(*(Block(dim, max(1, dim // 16)) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def build(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The contestant, with the same groups and decay for all."""
    if name == "AdamW":
        config = TrainConfig(lr=lr, weight_decay=DECAY, betas=(0.9, 0.95))
        return adamw(model, config, next(model.parameters()).device)
    kind = {"Muon": optim.Muon, "M3": optim.M3}[name]
    return kind(optim.groups(model, split={"qkv": 3}), lr, weight_decay=DECAY)


def load(data: str | None, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images float32 [N, C, S, S] in units of the training set's spread; classes.

    data None: scikit-learn's digits, every fifth image (from the third on) for the test. Else the
    torchvision data set `name` in the folder `data`. ValueError where a package or the set is not
    there.
    """
    if data is None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            told = 'the digits come with scikit-learn: pip install "nestlearn[vision]"'
            raise ValueError(told) from error
        digits = load_digits()
        images, classes = torch.tensor(digits.images).float()[:, None], torch.tensor(digits.target)
        test = torch.arange(len(images)) % 5 == 2
        parts: tuple[Tensor, ...] = (images[~test], classes[~test], images[test], classes[test])
    else:
        parts = _torchvision(Path(data), name)
    train, train_y, test_x, test_y = parts
    mean, deviation = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    return (train - mean) / deviation, train_y.long(), (test_x - mean) / deviation, test_y.long()


def _torchvision(folder: Path, name: str) -> tuple[Tensor, ...]:
    try:
        from torchvision import datasets
        from torchvision.transforms.functional import pil_to_tensor
    except ImportError as error:
        told = "a torchvision data set needs torchvision: pip install torchvision"
        raise ValueError(told) from error
    if not hasattr(datasets, name):
        raise ValueError(f"--set {name}: torchvision.datasets has no such data set")
    found: list[Tensor] = []
    for training in (True, False):
        try:
            pairs = getattr(datasets, name)(str(folder), train=training, download=False)
        except RuntimeError as error:
            raise ValueError(f"{folder} holds no {name}: download it there first") from error
        images = torch.stack([pil_to_tensor(image).float() for image, _ in pairs])
        found += [images, torch.tensor([y for _, y in pairs])]
    return tuple(found)


def grid(asked: Options) -> list[Cell]:
    """Every optimizer. only: the name of the torchvision data set in `data`."""
    if len(asked.only) > 1 or (asked.only and asked.data is None):
        what = "name one torchvision data set, and its folder (data)"
        raise ValueError(f"only={list(asked.only)}: {what}")
    name = asked.only[0] if asked.only else "CIFAR10"
    load(asked.data, name)  # says here, and once, what is missing
    usual, dim, depth, batch = asked.pick((40, 32, 2, 64), (600, 64, 4, 128))
    task = "digits" if asked.data is None else name
    return cells(
        replace(asked, only=()), [task], GRIDS, steps=asked.steps or usual, dim=dim, depth=depth,
        batch=batch, folder=asked.data, set=name,
    )  # fmt: skip


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """One training; "log": the mean loss of each 20 steps."""
    torch.manual_seed(cell["seed"])
    device = torch.device(cell["device"])
    x, y, test_x, test_y = (t.to(device) for t in load(cell["folder"], cell["set"]))
    model = ViT(x.shape[1], x.shape[2], int(y.max()) + 1, cell["dim"], cell["depth"]).to(device)
    optimizer = build(cell["model"], model, cell["lr"])
    steps, every = cell["steps"], 20
    warmup = max(1, steps // 20)
    order = torch.Generator().manual_seed(cell["seed"])
    losses: list[Tensor] = []
    for step in range(steps):
        share = schedule(step, steps, warmup, final=0.1, lands=False)
        for group in optimizer.param_groups:
            group["lr"] = share * cell["lr"]
        chosen = torch.randint(len(x), (cell["batch"],), generator=order).to(device)
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % every == 0:
            tell(step / steps, f"loss {float(loss.detach()):.3f}")
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part) for part in test_x.split(500)])
    curve = torch.stack(losses)
    accuracy = 100 * float((logits.argmax(-1) == test_y).float().mean())
    test_loss = float(F.cross_entropy(logits, test_y))
    train_loss = float(curve[-max(1, steps // 10) :].mean())
    return {
        "value": -train_loss, "scores": {"test loss": test_loss, "test accuracy (%)": accuracy},
        "log": [float(part.mean()) for part in curve.split(every)], "train_loss": train_loss,
        "headline": f"training loss {float(curve[-1]):.4f}, test accuracy {accuracy:.1f} %",
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def figure(records: Sequence[Record], path: Path) -> None:
    def along(r: Record) -> Along:
        log = r.detail["log"]
        return [r.steps * (i + 0.5) / len(log) for i in range(len(log))], log

    def label(r: Record) -> str:
        return f"{r.model}, lr {r.config['lr']:g}"

    drawn = lines((r for r in records if r.detail), along, label)
    curves([Panel("", "Optimizer step", "Training loss", drawn)], path, log="y")


COLUMNS = [
    model("optimizer"), RATE, SEEDS, mean("training loss", detail("train_loss"), digits=4),
    mean("test loss", metric("test loss"), digits=4),
    mean("test accuracy (%)", metric("test accuracy (%)"), digits=2),
]  # fmt: skip

EXPERIMENT = Experiment(
    name="fig11", shows="a vision transformer under AdamW, Muon and M3", price=("~2 hours", "–"),
    takes=("data", "only", "seeds", "steps", "workers", "device"), device="cpu",
    grid=grid, work=work,
    rates=lambda cell: GRIDS[cell["model"]], quick_rates=(1, 3),
    chooses="the training loss of the last tenth", search=(100, 101), seeds=5, quick_seeds=2,
    columns=COLUMNS, figure=figure,
)  # fmt: skip
