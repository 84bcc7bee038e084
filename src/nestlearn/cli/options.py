"""The options of the longest commands, by name: what they take and what `--help` says of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from nestlearn.names import check_source

Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:1 ...")]

# ------------------------------------------------------------------------------------ train

_place = partial(Option, rich_help_panel="Data and place")
_model = partial(Option, rich_help_panel="Model")
_training = partial(Option, rich_help_panel="Training")

TrainingText = Annotated[
    list[Path],
    _place(help="A text file or a folder of them (.gz too); repeat the option for more."),
]
RunFolder = Annotated[
    Path, _place(help="The run's folder: log, loss.png, checkpoints/ and the finished model/.")
]
Resume = Annotated[
    bool,
    _place(
        "--resume", help="Go on from the newest whole checkpoint in --out: the same command again."
    ),
]
TokenizerFile = Annotated[
    Path | None, _place(help="A tokenizer.json; without it every byte is a token.")
]
Size = Annotated[str, _model(help="tiny, small, ...: width and depth.")]
MixerName = Annotated[
    Literal["hope", "attention", "titans", "deltanet", "linear"],
    _model(help="What mixes tokens along time."),
]
ChannelName = Annotated[
    Literal["cms", "mlp"], _model(help="What follows it: a continuum memory (cms) or a plain MLP.")
]
Steps = Annotated[int, _training(help="Optimizer steps.")]
Batch = Annotated[int, _training(help="Windows per step.")]
Length = Annotated[int, _training(help="Tokens per window.")]
Windows = Annotated[
    int,
    _training(
        help=(
            "Windows that one stream of text goes on for, with its memory carried from step "
            "to step; 1: every window starts anew. For texts much longer than a window."
        )
    ),
]
WindowsFrom = Annotated[
    int,
    _training(help="Steps in which every window starts anew all the same, before --stream begins."),
]
Rate = Annotated[float, _training(help="The peak learning rate.")]
Seed = Annotated[int, _training(help="Of weights, batches and split.")]
DtypeName = Annotated[Literal["float32", "bfloat16"], _training(help="bfloat16 is autocast.")]
AnyDevice = Annotated[str, _training(help="auto, cpu, cuda, cuda:1, mps")]
Accumulate = Annotated[
    int, _training(min=1, help="Parts that a step's batch is read in, for want of memory.")
]
Remat = Annotated[
    bool,
    _training("--remat", help="Compute memories again in the backward pass: less memory, slower."),
]
Parallel = Annotated[
    Literal["auto", "ddp", "fsdp"],
    _training(
        help="Under torchrun: every process holds the whole model (ddp) or a part of it (fsdp); "
        "auto: ddp, unless that would fill half of a card. --batch is that of all together."
    ),
]
CheckpointEvery = Annotated[int, _training(min=1, help="Steps between two checkpoints.")]
Profile = Annotated[
    bool, _training("--profile", help="Trace three steps into profile/ in the run's folder.")
]

# ------------------------------------------------------------------------ stack and learn

Pretrained = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="A Hugging Face model, by its name or folder; a .gguf file (it needs the package "
        "gguf); or a llama2.c checkpoint (.bin).",
        callback=check_source,
    ),
]
StackFolder = Annotated[Path, Option(help="The new folder for the stacked model.")]
Chunks = Annotated[
    list[int] | None,
    Option(min=1, help="Tokens between two updates of a level; once for each level."),
]
Rates = Annotated[
    list[float] | None,
    Option(min=0.0, help="Step size: one for all levels, or one for each (default: 0.05)."),
]
RuleName = Annotated[Literal["gd", "momentum", "dgd"], Option(help="How the levels step.")]
VariantName = Annotated[
    Literal["sequential", "nested", "independent"],
    Option(
        help="What a slower level's end brings: it takes over what the faster one learned; "
        "the faster one starts again; nothing."
    ),
]
Spread = Annotated[
    Literal["block", "depth"],
    Option(help="All levels in every block, or the blocks shared out among them."),
]
Layers = Annotated[
    list[int] | None, Option(help="Only this block; repeat for more (default: all).")
]
Rank = Annotated[
    int | None,
    Option(
        min=0,
        help="Rank of what is learned; 0: full. Default: full below 50 million parameters, "
        "then 4. A full memory is up to three times as large as the MLPs; one of rank 4, "
        "with its context, takes at most 20 MB for 135 million parameters.",
    ),
]
Window = Annotated[
    int | None,
    Option(
        min=2,
        help="Tokens read at once. Default: at most 1,024; from 50 million parameters on 448, "
        "and their keys and values are kept in bfloat16.",
    ),
]
OldTokenizer = Annotated[Path | None, Option(help="tokenizer.bin of a llama2.c checkpoint.")]
Tokens = Annotated[int | None, Option(min=2, help="Read so many tokens of the text only.")]
Keep = Annotated[
    list[Path] | None,
    Option(help="Texts to measure forgetting on (default: the model's own samples)."),
]
Tolerance = Annotated[
    float | None, Option(min=0.0, help="Take back what makes --keep worse by more than this share.")
]
Drift = Annotated[
    float | None, Option(help="Largest size of a level, as a share of the pretrained weights.")
]
AnchorStrength = Annotated[
    float,
    Option(
        min=0.0,
        help="Hold the model to its own samples, so strongly (try 4): "
        "it forgets far less, and reads about three times slower.",
    ),
]
Study = Annotated[
    bool,
    Option(
        "--study",
        help="Then study the text, as `nestlearn study` does, which needs no reading first.",
    ),
]
Questions = Annotated[
    int | None, Option(min=1, help="In a study: how many it asks itself, at most (default: 24).")
]

# ------------------------------------------------------------------------------------ serve

_who = partial(Option, rich_help_panel="Who and where")
_limit = partial(Option, rich_help_panel="Limits", min=1)

ServingDevice = Annotated[str, _who(help="auto, cpu, cuda ...")]
Served = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="A stacked model's folder, a Hope's (or a run's), or a plain Hugging Face model, "
        "on which the levels of `nestlearn stack` are put. Default: the package's own Hope.",
        callback=check_source,
    ),
]
Memories = Annotated[
    Path | None,
    _who(help="For memories (default: memories in MODEL, else here; with --tokens users)."),
]
Host = Annotated[str, _who(help="Where to listen; others than this machine need --tokens.")]
Port = Annotated[int, _who(min=0, max=65535, help="0: any that is free.")]
TokensFile = Annotated[
    Path | None,
    _who(help="A file of lines `user token` (or `user sha256:HEX`): each has own memories."),
]
PromptTokens = Annotated[int, _limit(help="Of a prompt with its answer.")]
TextTokens = Annotated[int, _limit(help="Tokens of a text to learn.")]
BodySize = Annotated[int, _limit(help="Kilobytes of a request.")]
UploadSize = Annotated[int, _limit(help="Megabytes of a memory's file.")]
Requests = Annotated[int, _limit(help="A minute, of one user.")]
Beside = Annotated[int, _limit(help="Answers that are made in turns; of one user, half of them.")]
Learners = Annotated[int, _limit(help="Texts that are learned at once.")]
MemoryCount = Annotated[int, _limit(help="Of one user.")]
Points = Annotated[int, _limit(help="Earlier states that a memory keeps.")]
Seconds = Annotated[int, _limit(help="Of any request.")]
