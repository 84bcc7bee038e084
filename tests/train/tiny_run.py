"""The small run that the tests of this folder stop, damage and resume."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nestlearn.train import Corpus, TrainConfig, train

CONFIG = TrainConfig(
    steps=12, batch=2, length=8, warmup=2, eval_every=4, eval_windows=2, checkpoint_every=4
)


class Tiny(nn.Module):
    """Embedding, dropout (so that random state counts), a matrix, tied weights."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, width)
        self.drop = nn.Dropout(0.2)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, state=None):
        x = self.drop(self.embed(ids))
        return self.head(torch.tanh(self.mix(x))), state

    def save_pretrained(self, folder):
        Path(folder).mkdir(exist_ok=True)
        tensors = {name: t.clone() for name, t in self.state_dict().items()}
        save_file(tensors, Path(folder) / "model.safetensors")


def corpus(seed: int = 0) -> Corpus:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 32, (500,), generator=g, dtype=torch.uint8)
    return Corpus(tokens[:400], tokens[400:], 32, train_bytes=400, val_bytes=100)


def run(out, config=CONFIG, model=None, picture=False, **kwargs):
    """The model and the log. picture: draw the losses, too, which takes longer than the run."""
    model = model or Tiny()
    with pytest.MonkeyPatch.context() as patch:
        if not picture:
            patch.setattr("nestlearn.train.run.loss_curves", lambda *_: None)
        log = train(model, kwargs.pop("data", corpus()), config, out, progress=False, **kwargs)
    return model, log


def stop_after(step):
    """An on_step that interrupts the run as Ctrl-C does."""

    def on_step(record):
        if record["step"] == step:
            raise KeyboardInterrupt

    return on_step


def crash_after(step):
    def on_step(record):
        if record["step"] == step:
            raise RuntimeError("crash")

    return on_step


def crashed(out, step, config=CONFIG):
    with pytest.raises(RuntimeError, match="crash"):
        run(out, config, on_step=crash_after(step))


def assert_same_weights(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def without_time(log):
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in log]
