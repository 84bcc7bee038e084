"""How a trained Hope does on a stream hundreds of times longer than its training windows.

    nestlearn reproduce stream --data runs/all/hope-seed0

reads the validation text of the standard library as one stream, once for each half-life of the
memories; shows the loss of each tenth of it beside that of a model that starts anew every 1,024
tokens. --data is the finished run's folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nestlearn.experiments.experiment import Cell, Experiment, Options, Tell, cells
from nestlearn.experiments.language import corpus_of
from nestlearn.experiments.provenance import fingerprint
from nestlearn.experiments.tables import detail, mean, metric, model
from nestlearn.models.hope import HopeLM

FRESH = 1024
SETTINGS: dict[str, tuple[int | None, int | None]] = {  # half-life, tokens after which it restarts
    **{f"half-life {h or 'none'}": (h, None) for h in (None, 4096, 2048, 1024, 512, 256)},
    f"starts anew every {FRESH}": (None, FRESH),
}


@torch.no_grad()
def stream_loss(model: HopeLM, ids: torch.Tensor, restart: int | None = None) -> torch.Tensor:
    """Nats per token along ids [N + 1]; the state starts anew every `restart` tokens, if given."""
    state, losses = None, []
    for a in range(0, len(ids) - 1, FRESH):
        if restart is not None and a % restart == 0:
            state = None
        x, y = ids[a : a + FRESH], ids[a + 1 : a + FRESH + 1]
        logits, state = model(x[: len(y)].unsqueeze(0), state)
        losses.append(F.cross_entropy(logits[0].float(), y, reduction="none"))
    return torch.cat(losses)


def grid(asked: Options) -> list[Cell]:
    weights = Path(asked.data or "") / "model" / "model.safetensors"
    if asked.data is None or not weights.is_file():
        raise ValueError(f"--data {asked.data}: give the folder of a finished run")
    return cells(
        asked, [Path(asked.data).name], SETTINGS, ("task", "memory"), folder=asked.data,
        weights=fingerprint([weights]), tokens=asked.pick(5000, 100_000),
    )  # fmt: skip


def work(cell: Cell, tell: Tell) -> dict[str, Any]:
    half_life, restart = SETTINGS[cell["model"]]
    model = HopeLM.from_pretrained(Path(cell["folder"]) / "model", half_life=half_life).eval()
    losses = stream_loss(model, corpus_of(()).val[: cell["tokens"] + 1].long(), restart)
    loss = float(losses.mean())
    tenths = [float(part.mean()) for part in losses.chunk(10)]
    return {"scores": {"nats per byte": loss}, "tenths": tenths, "headline": f"{loss:.3f}"}


COLUMNS = [
    model("memories"), *(mean(str(i + 1), detail("tenths", i)) for i in range(10)),
    mean("all", metric("nats per byte")),
]  # fmt: skip

EXPERIMENT = Experiment(
    name="stream", shows="a trained Hope on a stream 400 times longer than its training windows",
    price=("~20 minutes", "–"),
    takes=("models", "data", "workers"), device="cpu",
    grid=grid, work=work,
    seeds=1,
    columns=COLUMNS,
    sources=("experiments/language.py",),
)  # fmt: skip
