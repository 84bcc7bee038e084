"""Figure 11, small: a vision transformer under AdamW, Muon and M3.

    pip install -e ".[vision]"
    nestlearn reproduce fig11                                # scikit-learn's digits
    nestlearn reproduce fig11 --data ~/data --only CIFAR10   # any torchvision set there

The paper trains on ImageNet-21k; this is a ViT of 4 blocks and width 64 on 1,437 images of 8 × 8,
or on a torchvision data set that is on this disk (nothing is downloaded). Same steps, batches,
schedule and start for all; each optimizer takes the best of five learning rates, by its mean
training loss of the last tenth over two seeds, and then runs five others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn import optim
from nestlearn.recipes.cells import Cell, Tell, commit
from nestlearn.recipes.tuned import compare, settings, table, write
from nestlearn.train.plots import COLOURS, new_figure, write_figure

GRIDS = {  # one step of about √10 apart, the same number for each
    "AdamW": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "Muon": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "M3": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
COLUMNS = {
    "training loss": ("train_loss", 4),
    "test loss": ("test_loss", 4),
    "test accuracy (%)": ("accuracy", 2),
}
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
        plain = [p for p in model.parameters() if p.ndim < 2 or getattr(p, "no_decay", False)]
        ids = {id(p) for p in plain}
        rest = [p for p in model.parameters() if id(p) not in ids]
        groups: list[dict[str, Any]] = [{"params": rest}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=DECAY)
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
            raise ValueError(
                'the digits come with scikit-learn: pip install "nestlearn[vision]"'
            ) from error
        digits = load_digits()
        images, classes = torch.tensor(digits.images).float()[:, None], torch.tensor(digits.target)
        test = torch.arange(len(images)) % 5 == 2
        parts = (images[~test], classes[~test], images[test], classes[test])
    else:
        parts = _torchvision(Path(data), name)
    train, train_y, test_x, test_y = parts
    mean, deviation = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    return (train - mean) / deviation, train_y.long(), (test_x - mean) / deviation, test_y.long()


def _torchvision(folder: Path, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    try:
        from torchvision import datasets
        from torchvision.transforms.functional import pil_to_tensor
    except ImportError as error:
        raise ValueError(
            "a torchvision data set needs torchvision: pip install torchvision"
        ) from error
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
    return found[0], found[1], found[2], found[3]


def train(cell: Cell, tell: Tell) -> dict[str, Any]:
    """One training: {"log": mean loss of each 20 steps, "train_loss", "test_loss", "accuracy"}."""
    torch.manual_seed(cell["seed"])
    device = torch.device(cell["device"])
    x, y, test_x, test_y = (t.to(device) for t in load(cell["data"], cell["set"]))
    model = ViT(x.shape[1], x.shape[2], int(y.max()) + 1, cell["dim"], cell["depth"]).to(device)
    optimizer = build(cell["model"], model, cell["lr"])
    steps, every = cell["steps"], 20
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: _rate(t, steps))
    order = torch.Generator().manual_seed(cell["seed"])
    losses: list[Tensor] = []
    for step in range(steps):
        chosen = torch.randint(len(x), (cell["batch"],), generator=order).to(device)
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % every == 0:
            tell(step / steps, f"loss {float(loss.detach()):.3f}")
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part) for part in test_x.split(500)])
    curve = torch.stack(losses)
    accuracy = 100 * float((logits.argmax(-1) == test_y).float().mean())
    return {
        "log": [float(part.mean()) for part in curve.split(every)],
        "train_loss": float(curve[-max(1, steps // 10) :].mean()),
        "test_loss": float(F.cross_entropy(logits, test_y)),
        "accuracy": accuracy,
        "headline": f"training loss {float(curve[-1]):.4f}, test accuracy {accuracy:.1f} %",
        "value": accuracy,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _rate(step: int, steps: int) -> float:
    """Linear warmup over a twentieth, then cosine to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def reproduce(
    out: Path,
    *,
    quick: bool = False,
    data: str | None = None,
    only: Sequence[str] = (),
    seeds: int = 5,
    steps: int | None = None,
    workers: int | None = None,
    device: str = "cpu",
) -> str:
    """Tune, compare and return the table, also in out/table.md; figure and cells beside it.

    quick: 40 steps, two learning rates, two seeds. data: a folder; only: the name of the
    torchvision data set there (default: CIFAR10). seeds: trainings after the tuning.
    """
    if len(only) > 1 or (only and data is None):
        raise ValueError(f"only={list(only)}: name one torchvision data set, and its folder (data)")
    name = only[0] if only else "CIFAR10"
    load(data, name)  # says here, and once, what is missing
    out.mkdir(parents=True, exist_ok=True)
    usual, dim, depth, batch = (40, 32, 2, 64) if quick else (600, 64, 4, 128)
    steps = usual if steps is None else steps
    grids = {n: lrs[1:3] if quick else lrs for n, lrs in GRIDS.items()}

    def cell(model: str, lr: float, seed: int) -> Cell:
        return {
            "task": "digits" if data is None else name, "model": model, "lr": lr, "seed": seed,
            "steps": steps, "dim": dim, "depth": depth, "batch": batch, "data": data, "set": name,
            "device": device, "optimizer": settings(build(model, ViT(1, 8, 10, 16, 1), lr)),
        }  # fmt: skip

    tune, chosen = ((100,), range(2)) if quick else ((100, 101), range(seeds))
    records = compare(
        grids, cell, train, out, score="train_loss", tune_seeds=tune, seeds=chosen, workers=workers
    )
    results = {"figure": 11, "quick": quick, "steps": steps, "records": records, "commit": commit()}
    draw(records, steps, out / "fig11.png")
    return write(out, results, table(records, COLUMNS))


def draw(records: list[dict[str, Any]], steps: int, path: Path) -> None:
    """Training loss by step, mean and range over seeds."""
    figure, (axes,) = new_figure("Optimizer step", "Training loss")
    for colour, record in zip(COLOURS, records):
        curves = torch.tensor([r["log"] for r in record["results"]])
        at = [steps * (i + 0.5) / curves.shape[1] for i in range(curves.shape[1])]
        label = f"{record['name']}, lr {record['lr']:g}"
        axes.semilogy(at, curves.mean(0), color=colour, lw=1.8, label=label)
        axes.fill_between(at, curves.amin(0), curves.amax(0), color=colour, alpha=0.2, lw=0)
    axes.legend(frameon=False, fontsize=10)
    write_figure(figure, path)
