"""A model that goes on learning: one stream of text, one memory, kept across processes."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nestlearn.hf.anchor import Anchor
from nestlearn.hf.folder import fingerprint
from nestlearn.hf.lending import Weights
from nestlearn.hf.plan import StackMemory
from nestlearn.hf.stack import StackedModel
from nestlearn.hf.writes import inner, size

from . import conversation, store
from .consolidation import StudyConfig
from .conversation import ChatTurn
from .generation import check_options, check_room, fits
from .questions import Tell
from .study import Studied, study

Text = str | Tensor
MEMORIES = Path("memories")  # where a bare name stands


class Learned(NamedTuple):
    """What one call of `learn` did. tokens: read; learned: of these, learned from. loss: their
    mean −log p in nats, before anything was learned from them. held_out: the loss on the held-out
    text afterwards. rolled_back: why nothing was kept, if so.
    """

    tokens: int
    learned: int
    loss: float
    held_out: float | None
    rolled_back: str | None


class Difference(NamedTuple):
    """One level in two memories: the norms of its deltas, their distance, and cosine."""

    level: int
    norm: float
    other: float
    distance: float
    cosine: float


class Session:
    """A stacked model that reads one stream of text, learns from it, and remembers.

    memory: a folder, or a bare name for memories/NAME; what is there is loaded, else it is written
    by the first `save`. None: in this process only. tokenizer: for texts; without one, everything
    takes and gives token ids [1, T].

    Guards: held_out, a text that must stay understood: a `learn` that makes its loss worse than
    before, and by more than the share `tolerance` worse than the model's own without any memory, is
    taken back as a whole. drift: no level's delta of a layer gets larger than this share of the
    layer's pretrained weights. anchor: texts, such as the model's own samples, to which it is held
    while it learns (`nestlearn.hf.anchor.Anchor`). read_only: nothing may be learned or saved.

    Everything but `learn`, `study`, `chat`, `reset`, `merge` and `load` leaves the memory as it
    is. Raises ValueError for a memory of another base model, FileNotFoundError for a read-only
    session without one. One session is one stream: for many readers in one batch see
    `StackedModel.using([a.memory, b.memory])`.
    """

    def __init__(
        self, model: StackedModel, memory: str | Path | None = None, tokenizer: Any = None, *,
        held_out: Text | None = None, tolerance: float = 0.05, drift: float | None = None,
        anchor: Anchor | None = None, read_only: bool = False,
    ):  # fmt: skip
        if not isinstance(model, StackedModel):
            raise ValueError(
                f"a {type(model).__name__} has no levels: pass stack_levels(model, levels=[...])"
            )
        if drift is not None and not drift > 0:
            raise ValueError(f"drift={drift}: give a share above 0, or None")
        self.model, self.tokenizer = model, tokenizer
        self.drift, self.anchor, self.read_only = drift, anchor, read_only
        self.path = None if memory is None else find(memory)
        self.memory, self.turns = model.init_memory(1), list[ChatTurn]()
        self._history: list[store.Entry] = []
        self._digest: str | None = None
        self._base = fingerprint(model)
        self._ready: tuple[Any, str, Weights] | None = None
        self._spoken: tuple[ChatTurn, list[int], int] | None = None  # last reply: ids, their end
        self._held_out: Tensor | None = None
        self._limit = math.inf
        if held_out is not None:
            self.guard(held_out, tolerance)
        if self.path is not None and (self.path / "memory.json").is_file():
            self.load()
        elif read_only:
            raise FileNotFoundError(f"no memory in {self.path} to read: learn and save one first")

    # ------------------------------------------------------------------------------ learning

    def learn(
        self, text: Text, mask: Tensor | None = None, *, source: str | None = None
    ) -> Learned:
        """Read a text as the stream's next tokens, and learn from it.

        mask [1, T], for token ids: those to learn from, bool or a weight of each. source: what to
        call the text in `history`. What would make a number infinite is taken back, too.
        """
        self._may_learn(source)
        ids = self.ids(text, first=self.memory.position == 0)
        losses, memory = self.model.learn(
            ids, self.memory, mask, drift=self.drift, anchor=self.anchor
        )
        chosen = torch.ones_like(losses) if mask is None else mask.to(losses)
        chosen = chosen * ~losses.isnan()
        loss = float((losses.nan_to_num() * chosen).sum() / chosen.sum().clamp(min=1e-9))
        held_out, reason = self.judge(memory, loss)
        begin = self.memory.position
        learned = Learned(ids.shape[1], int((chosen > 0).sum()), loss, held_out, reason)
        self.note("learn", source=source, begin=begin, **learned._asdict())
        if reason is None:
            self.memory = memory
        return learned

    def study(
        self, text: str, config: StudyConfig | None = None, *, source: str | None = None,
        tell: Tell | None = None,
    ) -> Studied:  # fmt: skip
        """Learn what a text says, so that it can be asked about without the text.

        The model asks itself questions about the text and answers them with the text before it;
        then one level learns to answer so without. The text need not have been read; the stream
        stays where it is. With a folder, questions and rounds are saved: a study that was stopped
        or killed goes on. One that leaves the model too far from what it was (`StudyConfig.most`)
        is undone. tell: called with what is being done, how much of it, of how much.

        ValueError without a tokenizer, for an empty text, and where the model finds no question
        that the text answers.
        """
        self._may_learn(source)
        if self.tokenizer is None:
            raise ValueError("study needs a tokenizer: Session(..., tokenizer=...)")
        if not isinstance(text, str) or not text.strip():
            raise ValueError("there is nothing to study: give a text with words")
        return study(self, text, config or StudyConfig(), source, tell or (lambda *_: None))

    def guard(self, held_out: Text, tolerance: float = 0.05) -> None:
        """From now on take back what harms this text (the class says when)."""
        if not tolerance >= 0:
            raise ValueError(f"tolerance={tolerance}: give a share of 0 or more")
        ids = self.ids(held_out)
        self._limit = self._mean(ids, self.model.init_memory(1)) * (1 + tolerance)
        self._held_out = ids

    def chat(
        self, message: str, *, learn: Literal["user", "assistant", "both", "nothing"] = "user",
        **options: Any,
    ) -> str:  # fmt: skip
        """Answer a message, then learn from the chosen side of the exchange; the reply.

        The conversation so far is the prompt (`turns`; a new session starts a new one and knows
        older ones by what it has learned). options: of the model's own `generate`. Uses the
        tokenizer's chat template, or without one the lines "User: ..." and "Assistant: ...".
        """
        if learn not in ("user", "assistant", "both", "nothing"):
            raise ValueError(f"learn={learn!r}: use 'user', 'assistant', 'both' or 'nothing'")
        if learn != "nothing":
            self._may_write()
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer: Session(..., tokenizer=...)")
        turns: list[ChatTurn] = [*self.turns, {"role": "user", "content": message}]
        check_options(self.model.base, options, one=True)
        new, closing = conversation.heard(self.tokenizer, turns, self._said(turns))
        reply = self.generate(self._prompt(turns, options), **options)
        text = self.tokenizer.decode(reply[0].tolist(), skip_special_tokens=True).strip()
        answer: ChatTurn = {"role": "assistant", "content": text}
        self.turns = [*turns, answer]
        if learn != "nothing":
            ids = torch.cat([torch.tensor([new], dtype=torch.long), reply.cpu()], 1)
            mask = torch.zeros(ids.shape)
            mask[:, closing : len(new)] = learn in ("user", "both")
            mask[:, len(new) :] = learn in ("assistant", "both")
            self._spoken = (answer, reply[0].tolist(), self.memory.position + ids.shape[1])
            self.learn(ids, mask, source="chat")
        return text

    # ------------------------------------------------------------------------------- reading

    def generate(self, prompt: Text, **options: Any) -> Any:
        """What the model says after the prompt, with what it has learned: a text for a text, ids
        [1, N] for ids. options: of the model's own `generate` (max_new_tokens, do_sample, ...);
        with num_return_sequences=n a list of n texts, or ids [n, N].

        ValueError, before anything is generated, for options whose result would be no text, and
        for a prompt and new tokens that are more than a table of positions holds.
        """
        ids = self.ids(prompt)
        check_options(self.model.base, options)
        check_room(self.model.base, ids.shape[1], options)
        options.setdefault("attention_mask", torch.ones_like(ids))
        with torch.no_grad():
            made = self.model.generate(ids, self._weights(), **options)[:, ids.shape[1] :]
        if isinstance(prompt, Tensor):
            return made
        assert self.tokenizer is not None
        texts = [self.tokenizer.decode(r.tolist(), skip_special_tokens=True) for r in made]
        return texts[0] if len(texts) == 1 else texts

    def surprise(self, text: Text) -> Tensor:
        """−log p in nats of every token [1, T] of a text by itself; the first is nan."""
        return self.model.losses(self.ids(text), self.memory)

    def perplexity(self, text: Text) -> float:
        """exp of the mean surprise of a text by itself; ValueError for less than two tokens."""
        return math.exp(self._mean(self.ids(text), self.memory))

    def diff(self, other: Session | str | Path) -> list[Difference]:
        """How far this memory is from another one of the same model, level by level."""
        if not isinstance(other, Session):
            other = Session(self.model, other, read_only=True)
        found = []
        for i, (a, b) in enumerate(zip(self.memory.levels, other.memory.levels)):
            x, y = (level.fast or self.model.start(i, 1) for level in (a, b))
            xx, yy, xy = inner(x, x), inner(y, y), inner(x, y)
            distance = math.sqrt(max(xx + yy - 2 * xy, 0.0))
            cosine = xy / math.sqrt(xx * yy) if xx and yy else math.nan
            found.append(Difference(i, math.sqrt(xx), math.sqrt(yy), distance, cosine))
        return found

    @property
    def history(self) -> list[store.Entry]:
        """What the memory has been through: each text with its source, place and losses."""
        return [dict(record) for record in self._history]

    @property
    def bytes(self) -> dict[str, int]:
        """How large the memory is: each level, and the context that it reads on from."""
        return store.sizes(self.memory)

    # ----------------------------------------------------------------------- memories as wholes

    def save(self, path: str | Path | None = None) -> Path:
        """Write the memory to its folder, or from now on to another, new one.

        Whole or not at all, whenever the process is killed. ValueError if another process has
        written there since, or if the base model was changed.
        """
        self._may_write()
        folder = self.path if path is None else find(path)
        if folder is None:
            raise ValueError("this session has no folder: save(path)")
        self._check_base()
        known = self._digest if folder == self.path else None
        self._digest = store.save_memory(
            folder, self.model, self.memory, self._history, expected=known
        )
        self.path = folder
        return folder

    def load(self) -> None:
        """Go back to what is on disk; errors as in `load_memory`, and then nothing is changed."""
        if self.path is None:
            raise ValueError("this session has no folder: give Session(model, memory=...) one")
        stored = store.load_memory(self.path, self.model)
        self.memory, self._history, self._digest = stored.memory, stored.history, stored.digest
        self._base = fingerprint(self.model)

    def reset(self, level: int | None = None) -> None:
        """Forget what a level has learned, or everything, the place in the stream included."""
        self._may_write()
        if level is None:
            self.memory = self.model.init_memory(1)
        else:
            self.memory = self.model.reset(self.memory, level)
        self.note("reset", level=level)

    def fork(self, path: str | Path | None = None) -> Session:
        """Another session that knows the same and goes its own way; saved if it has a path.

        ValueError if there is a memory at the path already.
        """
        twin = Session(self.model, None, self.tokenizer, drift=self.drift, anchor=self.anchor)
        twin._held_out, twin._limit = self._held_out, self._limit
        twin.memory, twin._history, twin._base = self.memory, self.history, self._base
        twin.turns, twin._spoken = list(self.turns), self._spoken
        twin.note("fork", source=None if self.path is None else str(self.path))
        if path is not None:
            twin.save(path)
        return twin

    def merge(self, level: int) -> None:
        """Write a level into the base model's weights, for good: it starts again, and the model
        computes what it did. Other memories of the base model do not fit it any more.
        """
        self._may_write()
        self._check_base()
        self.memory = self.model.merge(self.memory, level)
        self._base = fingerprint(self.model)
        self.note("merge", level=level)

    @property
    def moved(self) -> float:
        """How far the weights are from the pretrained ones, as a share of these (levels added)."""
        learned = [size(delta).double().square() for x in self.memory.levels for delta in x.fast]
        own = sum(norm * norm for norm in self.model.norms)
        return math.sqrt(float(torch.stack(learned).sum()) / own) if learned else 0.0

    # --------------------------------------------------------------------------------- inside

    def ids(self, text: Text, *, first: bool = True) -> Tensor:
        """A text's ids [1, T] on the model's device; first: with the tokens that begin one."""
        if isinstance(text, str):
            if self.tokenizer is None:
                raise ValueError("a text needs a tokenizer: Session(..., tokenizer=...), or ids")
            ids = conversation.encode(self.tokenizer, text, first=first)
            text = torch.tensor([ids], dtype=torch.long)
        if not isinstance(text, Tensor):
            raise ValueError(f"a {type(text).__name__} is no text: pass a str, or int64 ids [1, T]")
        if text.ndim != 2 or len(text) != 1 or text.dtype != torch.long or not text.numel():
            raise ValueError(f"ids is {text.dtype} {list(text.shape)}: pass int64 ids [1, T]")
        return text.to(self.model.lr[0].device)

    def _mean(self, ids: Tensor, memory: Any) -> float:
        if ids.shape[1] < 2:
            raise ValueError("one token alone cannot be predicted: give two or more")
        return float(self.model.losses(ids, memory)[:, 1:].mean())

    def _weights(self) -> Weights:
        """The effective weights, computed once after every write and every change of the base."""
        levels, version = self.memory.levels, self.model.version()
        if self._ready is None or self._ready[0] is not levels or self._ready[1] != version:
            self._ready = (levels, version, self.model.weights(self.memory))
        return self._ready[2]

    def _prompt(self, turns: list[ChatTurn], options: dict[str, Any]) -> Tensor:
        """The conversation's ids, without its oldest exchanges where they leave no room."""
        ids = conversation.prompt(self.tokenizer, turns)
        while len(turns) > 1 and not fits(self.model.base, len(ids), options):
            turns = conversation.shorter(turns)
            ids = conversation.prompt(self.tokenizer, turns)
        return torch.tensor([ids], dtype=torch.long)

    def _said(self, turns: list[ChatTurn]) -> list[int] | None:
        """The ids of the last reply, if the stream still ends with them."""
        if self._spoken is None or len(turns) < 2:
            return None
        answer, ids, end = self._spoken
        return ids if turns[-2] is answer and self.memory.position == end else None

    def _may_write(self) -> None:
        if self.read_only:
            raise ValueError("this session is read-only: open the memory without read_only")

    def _may_learn(self, source: str | None) -> None:
        self._may_write()
        if source is not None and not isinstance(source, str):
            raise ValueError(f"source={source!r}: give a str; the history is saved as JSON")
        if not self.memory.position and not any(level.fast for level in self.memory.levels):
            self._base = fingerprint(self.model)  # nothing yet that could belong to another base
        self._check_base()

    def _check_base(self) -> None:
        if fingerprint(self.model) != self._base:
            raise ValueError(
                "the base model has changed under this session (trained, loaded anew, or merged), "
                "so its memory does not fit: give the model its weights back, or begin a new one"
            )

    def judge(self, memory: StackMemory, loss: float = 0.0) -> tuple[float | None, str | None]:
        """The loss on the held-out text under a new memory, and why that is not to be kept."""
        norms = [float(size(delta).max()) for level in memory.levels for delta in level.fast]
        if not all(map(math.isfinite, (*norms, loss))):
            return None, "the deltas became infinite: lower the levels' step sizes"
        if self._held_out is None:
            return None, None
        held_out = self._mean(self._held_out, memory)
        if held_out <= max(self._limit, self._mean(self._held_out, self.memory)):
            return held_out, None
        return held_out, f"the held-out loss rose to {held_out:.4f}, above {self._limit:.4f}"

    def note(self, what: str, **facts: Any) -> None:
        """Add to the history."""
        self._history.append({"what": what, "time": round(time.time()), **facts})


def find(memory: str | Path) -> Path:
    """The folder of a memory: a bare name stands in ./memories, anything else is a path."""
    if not isinstance(memory, str | os.PathLike):
        raise ValueError(f"memory={memory!r}: give a name, a folder's path, or None")
    if not str(memory):
        raise ValueError("the memory's name is empty")
    if "\0" in str(memory):
        raise ValueError(f"{str(memory)!r} is no memory's name: it holds a zero character")
    bare = isinstance(memory, str) and os.sep not in memory and memory not in (".", "..")
    return MEMORIES / memory if bare else Path(memory)
