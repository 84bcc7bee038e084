"""The commands `nestlearn stack`, `learn` and `chat`: typed signatures over the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from nestlearn.cli import options
from nestlearn.cli.commands import say
from nestlearn.cli.stacked import encode, open_session, place, pretrained, words_of
from nestlearn.names import check_stack

Dir = Annotated[Path, Argument(metavar="DIR", help="A stacked model's folder.")]
Stacked = Annotated[
    Path, Argument(metavar="DIR", help="A stacked model's folder.", callback=check_stack)
]
MemoryName = Annotated[str, Option(help="The memory's name; it is made if it is not there.")]
Data = Annotated[
    list[Path],
    Option(help="A text file (.gz too) or a folder of them; repeat the option for more."),
]


class _NewByDefault(TyperGroup):
    """`nestlearn stack MODEL ...` is `nestlearn stack new MODEL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["new", *args]
        return super().parse_args(ctx, args)


stack = typer.Typer(
    cls=_NewByDefault,
    no_args_is_help=True,
    help="Let a pretrained model's MLPs go on learning from what it reads.\n\n"
    "Example:  nestlearn stack gpt2 --out stacked/ --chunk 64 --chunk 512 --lr 0.05",
)


@stack.command("new")
def stack_new(
    model: options.Pretrained,
    out: options.StackFolder,
    chunk: options.Chunks = None,
    lr: options.Rates = None,
    rule: options.RuleName = "gd",
    variant: options.VariantName = "sequential",
    spread: options.Spread = "block",
    layer: options.Layers = None,
    rank: options.Rank = None,
    window: options.Window = None,
    tokenizer: options.OldTokenizer = None,
) -> None:
    """Make a stacked model of a pretrained one (the default command: `new` may be left out).

    Example:  nestlearn stack gpt2 --out stacked/ --chunk 64 --chunk 512 --lr 0.05
    """
    from nestlearn import DeltaLevel, stack_levels
    from nestlearn.hf.folder import save_stack

    chunks = chunk or [64, 512]
    if lr and len(lr) not in (1, len(chunks)):
        raise ValueError(f"{len(lr)} step sizes for {len(chunks)} levels: give one, or as many")
    if out.exists():
        raise ValueError(f"{out} is there already: choose another folder")
    base, words = pretrained(model, tokenizer)
    rates = lr or [DeltaLevel.lr]
    rates = rates * len(chunks) if len(rates) == 1 else rates
    stacked = stack_levels(
        base,
        [DeltaLevel(c, lr=rate, rule=rule) for c, rate in zip(chunks, rates)],
        layers=layer,
        spread=spread,
        variant=variant,
        rank="auto" if rank is None else rank or None,
        window=window or "auto",
    )
    save_stack(stacked, out, words)
    limit = stacked.memory_limit()
    context = limit.pop("context") / 1e6
    learned, low = sum(limit.values()) / 1e6, stacked.config.rank
    say(
        f"{len(stacked.blocks)} blocks, {len(chunks)} levels; a memory takes {learned:,.1f} MB at "
        f"most ({'full weights' if low is None else f'rank {low}'}), and {context:,.1f} MB for "
        f"the context, once it has read {stacked.window:,} tokens."
    )
    say(f"Next:  nestlearn learn {out} --data my_text.txt --memory mine", "green")


@stack.command("train")
def stack_train(
    folder: Stacked,
    data: Data,
    keep: Annotated[
        list[Path] | None, Option(help="Texts that are not to be forgotten meanwhile.")
    ] = None,
    steps: Annotated[int, Option(min=1, help="Optimizer steps.")] = 50,
    batch: Annotated[int, Option(min=1, help="Streams side by side.")] = 4,
    length: Annotated[int, Option(min=2, help="Tokens of each stream.")] = 512,
    reach: Annotated[
        int | None, Option(min=1, help="Tokens that the outer gradient reaches back.")
    ] = None,
    start_values: Annotated[
        bool, Option("--start-values", help="Train where the levels start, too.")
    ] = False,
    first_order: Annotated[
        bool, Option("--first-order", help="Not through the inner gradients: cheaper.")
    ] = False,
    seed: Annotated[int, Option(help="Of the windows.")] = 0,
) -> None:
    """Train how the levels learn: their step sizes and, by choice, their start values.

    Each step reads windows of the text with new memories, and moves the step sizes against the
    loss on the way (and on --keep). Memories from before do not fit new start values.

    Example:  nestlearn stack train stacked/ --data books/ --keep own_kind.txt --steps 100
    """
    import torch

    from nestlearn.hf.folder import load_stack, save_rates
    from nestlearn.hf.meta import MetaConfig, train_stack

    model = load_stack(folder)
    words = words_of(folder)
    config = MetaConfig(
        steps=steps,
        batch=batch,
        length=length,
        reach=reach or length,
        start_lr=1e-3 if start_values else None,
        graph="first-order" if first_order else "full",
        seed=seed,
    )
    kept = torch.tensor(encode(words, keep)) if keep else None

    def tell(step: int, learning: float, keeping: float) -> None:
        beside = f", on the text to keep {keeping:.4f}" if keep else ""
        say(f"step {step}/{steps}: loss while learning {learning:.4f}{beside}")

    train_stack(model, torch.tensor(encode(words, data)), config, keep=kept, say=tell)
    save_rates(model, folder)
    for i, rate in enumerate(model.lr):
        say(f"level {i}: step sizes {float(rate.min()):.2g} to {float(rate.max()):.2g}", "green")


def learn(
    folder: Stacked,
    data: Data,
    memory: MemoryName,
    tokens: options.Tokens = None,
    keep: options.Keep = None,
    tolerance: options.Tolerance = None,
    drift: options.Drift = None,
    anchor: options.AnchorStrength = 0.0,
    study: options.Study = False,
    questions: options.Questions = None,
    device: options.Device = "auto",
) -> None:
    """Read a text, learn from it, and remember it under a name.

    Shows the loss on the text before and after, what that cost elsewhere, the time, and the
    memory's size. Ctrl-C stops and saves. The same command reads the text again and goes on with a
    study that was stopped.

    Example:  nestlearn learn stacked/ --data diary.txt --memory mine
    """
    from nestlearn.cli.reading import introduction, read_and_learn, study_text
    from nestlearn.hf.anchor import Anchor
    from nestlearn.learn import StudyConfig
    from nestlearn.learn.store import check_place

    if questions and not study:
        raise ValueError(f"--questions {questions} are asked in a study: add --study")
    session = open_session(folder, memory, device, drift=drift)
    check_place(place(folder, memory))
    say(introduction(session, memory))
    if anchor:
        length = min(128, session.model.window - 1)
        session.anchor = Anchor.sampled(session.model, length=length, strength=anchor, seed=1)
    ids = encode(session.tokenizer, data)[:tokens]
    kept = encode(session.tokenizer, keep) if keep else None
    source = ", ".join(path.name for path in data)
    begin = session.memory.position
    stopped, seconds = read_and_learn(session, ids, kept, tolerance, source)
    session.save()
    if study and not stopped:
        text = session.tokenizer.decode(ids, skip_special_tokens=True)
        config = StudyConfig(questions or StudyConfig.questions)
        stopped = study_text(session, text, config, source).stopped
    held, now = sum(session.bytes.values()) / 1e6, session.memory.position - begin
    say(
        f"Saved {session.path} ({held:,.1f} MB): {now:,} tokens learned in {seconds:,.1f} "
        f"seconds, {session.memory.position:,} in all.",
        "green",
    )
    if stopped:
        raise typer.Exit(130)


def study(
    folder: Stacked,
    data: Data,
    memory: MemoryName,
    questions: options.Questions = None,
    device: options.Device = "auto",
) -> None:
    """Learn what a text says, and remember it under a name.

    The model asks itself questions about the text, answers them with the text before it, and learns
    to answer without: minutes for a page on two cores, for models that follow instructions. The
    text is not read (that is `nestlearn learn`). Ctrl-C stops and saves; the same command goes on
    with a study that was stopped.

    Example:  nestlearn study stacked/ --data diary.txt --memory mine
    """
    from nestlearn.cli.reading import introduction, study_text
    from nestlearn.learn import StudyConfig
    from nestlearn.learn.store import check_place

    session = open_session(folder, memory, device)
    check_place(place(folder, memory))
    say(introduction(session, memory))
    text = session.tokenizer.decode(encode(session.tokenizer, data), skip_special_tokens=True)
    config = StudyConfig(questions or StudyConfig.questions)
    studied = study_text(session, text, config, ", ".join(path.name for path in data))
    say(f"Saved {session.path} ({sum(session.bytes.values()) / 1e6:,.1f} MB).", "green")
    if studied.stopped:
        raise typer.Exit(130)


def chat(
    folder: Stacked,
    memory: MemoryName,
    learn: Annotated[
        Literal["user", "assistant", "both", "nothing"] | None,
        Option(help="Whose words are learned from (default: user)."),
    ] = None,
    read_only: Annotated[
        bool, Option("--read-only", help="Learn and save nothing; the memory must be there.")
    ] = False,
    tokens: Annotated[int, Option(min=1, help="Longest reply.")] = 100,
    temperature: Annotated[float, Option(min=0.0, help="0: the likeliest token.")] = 0.8,
    seed: Annotated[int, Option(help="The same seed draws the same replies.")] = 0,
    device: options.Device = "auto",
) -> None:
    """Talk with a model that remembers; every exchange is saved. An empty line ends it.

    Example:  nestlearn chat stacked/ --memory mine
    """
    import torch

    from nestlearn.cli.reading import introduction
    from nestlearn.learn.store import check_place

    if read_only and learn not in (None, "nothing"):
        raise ValueError(f"--learn {learn} with --read-only: leave one of them out")
    side = "nothing" if read_only else learn or "user"
    session = open_session(folder, memory, device, read_only=read_only)
    if side != "nothing":
        check_place(place(folder, memory))
    words = {"user": "your words", "assistant": "its own words", "both": "all that is said"}
    say(f"{introduction(session, memory)} It learns from {words.get(side, 'nothing')}.")
    torch.manual_seed(seed)
    drawing: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": temperature > 0}
    if temperature > 0:
        drawing["temperature"] = temperature
    while True:
        try:
            message = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not message:
            break
        try:
            typer.echo(session.chat(message, learn=side, **drawing))
        except ValueError as error:  # such as a message that is too long: the talk goes on
            say(f"Error: {error}", "bold red")
            continue
        if side != "nothing":
            session.save()
    if side != "nothing":
        say(introduction(session, memory), "green")
