"""The commands `nestlearn train` and `nestlearn export`: typed signatures over training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from nestlearn.cli import options, processes
from nestlearn.cli.commands import say as _say

if TYPE_CHECKING:
    from nestlearn.train import Corpus


def train(
    data: options.TrainingText,
    out: options.RunFolder,
    resume: options.Resume = False,
    tokenizer: options.TokenizerFile = None,
    size: options.Size = "tiny",
    mixer: options.MixerName = "hope",
    channel: options.ChannelName = "cms",
    steps: options.Steps = 500,
    batch: options.Batch = 8,
    length: options.Length = 256,
    stream: options.Windows = 1,
    stream_from: options.WindowsFrom = 0,
    lr: options.Rate = 3e-3,
    seed: options.Seed = 0,
    dtype: options.DtypeName = "float32",
    device: options.AnyDevice = "auto",
    parallel: options.Parallel = "auto",
    accumulate: options.Accumulate = 1,
    remat: options.Remat = False,
    checkpoint_every: options.CheckpointEvery = 100,
    profile: options.Profile = False,
) -> None:
    """Train a model on text.

    The run can be stopped at any moment (Ctrl-C, a crash, kill -9): the same command with
    [bold]--resume[/bold] goes on bit for bit from the newest checkpoint.

    Example:  nestlearn train --data my_texts/ --out runs/first --size tiny --steps 500

    On many devices:  torchrun --nproc-per-node 8 -m nestlearn train ...
    """
    from nestlearn.train import TrainConfig, load_text
    from nestlearn.train import train as run

    config = TrainConfig(
        steps=steps, batch=batch, length=length, stream=stream, stream_from=stream_from, lr=lr,
        warmup=min(TrainConfig.warmup, max(steps, 0) // 10), seed=seed, dtype=dtype, device=device,
        parallel=parallel, accumulate=accumulate, checkpoint_every=checkpoint_every,
        profile=profile,
    )  # fmt: skip
    with processes.joined(device) as ranks:
        if processes.restarted():  # perhaps before anything was written
            resume = ranks.first_says((out / "config.json").is_file)
        say = _say if ranks.first else lambda *_: None
        corpus = load_text(data, tokenizer=tokenizer, seed=seed)
        model = _new_model(corpus, seed, size, mixer=mixer, channel=channel, remat=remat)
        _introduce(corpus, model, say)
        try:
            _conclude(run(model, corpus, config, out, resume=resume), out, say)
        except KeyboardInterrupt as stop:
            say(str(stop) or "stopped", "yellow")
            raise typer.Exit(130) from None


def _conclude(log: list[dict[str, Any]], out: Path, say: Callable[..., None]) -> None:
    last = next((record for record in reversed(log) if "val_loss" in record), None)
    if last:
        bits = last["val_bits_per_byte"]
        say(f"Validation loss {last['val_loss']:.3f} nats per token, {bits:.3f} bits per byte.")
    say(f'The model is in {out / "model"}. Try: nestlearn generate {out} --prompt "..."', "green")


def _new_model(corpus: Corpus, seed: int, size: str, **parts: Any) -> Any:
    import torch

    from nestlearn.models.hope import HopeConfig, HopeLM

    torch.manual_seed(seed)
    return HopeLM(HopeConfig.size(size, vocab_size=corpus.vocab_size, **parts))


def _introduce(corpus: Corpus, model: Any, say: Callable[..., None]) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    why = "".join(f"; {each}" for each in corpus.no_text[:3])
    skipped = f" ({corpus.skipped} skipped: hidden or no UTF-8 text{why})" if corpus.skipped else ""
    say(
        f"Text files: {corpus.files}{skipped}; {corpus.train.numel():,} tokens to train on, "
        f"{corpus.val.numel():,} to validate; {parameters:,} parameters."
    )


def export(
    folder: Annotated[Path, Argument(metavar="RUN", help="A run's folder, finished or not.")],
    out: Annotated[Path, Option(help="The model's new folder.")],
    tokenizer: options.TokenizerFile = None,
) -> None:
    """Write the model of a run's newest whole checkpoint, one file of weights, for use.

    Example:  nestlearn export runs/first --out models/first
    """
    from nestlearn.models.hope import HopeConfig, HopeLM
    from nestlearn.train.data import ByteTokenizer, SubwordTokenizer
    from nestlearn.train.folder import RunFolder, weights

    path, meta, _ = RunFolder(folder, {}).newest()
    if path is None:
        raise ValueError(f"{folder} holds no checkpoint yet; train on, or give another folder")
    coder = SubwordTokenizer(tokenizer) if tokenizer else ByteTokenizer()
    trained = meta["corpus"]["tokenizer"] or coder.name
    if coder.name != trained:
        raise ValueError(
            f"{folder} was trained with {trained}, not {coder.name}; give that file by --tokenizer"
        )
    if out.exists():
        raise ValueError(f"{out} is there already; choose another folder")
    model = HopeLM(HopeConfig.from_dict(meta["model"]))
    model.load_state_dict(weights(path))
    model.save_pretrained(out)
    coder.save(out)
    _say(f"{out} is the model of step {meta['step']:,}.", "green")
