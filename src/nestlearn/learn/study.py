"""Study in a session: asked, answered, consolidated; kept on the way; gone on with when stopped."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nestlearn.disk import atomic_write
from nestlearn.hf.door import evaluating
from nestlearn.hf.lending import lend

from .consolidation import Epoch, StudyConfig, consolidate, level_of
from .questions import Question, Tell, ask, by_name

if TYPE_CHECKING:
    from .session import Session

FORMAT = "nestlearn-study"
KEPT = 36  # questions of a study that the history keeps, for later ones to rehearse


class Studied(NamedTuple):
    """What one study did. questions: that the model asked itself and answered from the text.
    epochs: rounds of them, in all. apart: the divergence, in nats a token, of what it says without
    the text from what it is to say, on questions kept apart: at first, and now. held_out,
    rolled_back: as in `Learned`. stopped: by Ctrl-C; what was learned until then is kept. strayed:
    how far the model is from what it was, all studies together, in nats a token and on own samples
    that it was not held to (None: the study was stopped, or there is no anchor).
    """

    questions: int
    epochs: int
    apart: tuple[float, float]
    held_out: float | None
    rolled_back: str | None
    stopped: bool
    strayed: float | None = None


def study(
    session: Session, text: str, config: StudyConfig, source: str | None, tell: Tell
) -> Studied:
    """`Session.study`."""
    notes = None if session.path is None else Notes.of(session.path, text, config)
    ids, before = session.ids(text), session.memory
    found: list[Question] = [] if notes is None else notes.questions
    model, untouched = session.model, not before.levels[level_of(session.model, config.level)].fast
    done = 0 if notes is None or untouched else notes.done  # reset: what was done is forgotten
    last: Epoch | None = None
    held_out, reason, stopped = None, None, False

    def each(epoch: Epoch) -> bool:
        """A round that harms nothing is kept, and saved; one that does undoes this study."""
        nonlocal last, held_out, reason
        last, session.memory = epoch, before
        held_out, reason = session.judge(epoch.memory)
        if reason is None and epoch.strayed is not None and not epoch.strayed <= config.most:
            reason = (
                f"the model would be {epoch.strayed:.2f} nats a token from what it was, above "
                f"most={config.most}: study this in a new memory, or in an older copy"
            )
        if reason is None:
            session.memory = epoch.memory
            if notes is not None:
                session.save()
                notes.keep(found, epoch.number)
        return reason is None

    try:
        if not found:
            with evaluating(model.base), lend({}):  # a block of `using` around it is not the base
                found = by_name(session.tokenizer, text, config.words)
                found += ask(
                    model.base, session.tokenizer, text, config.questions, config.seed, tell
                )
            if notes is not None and found:
                notes.keep(found, 0)
        consolidate(
            model, session.tokenizer, before, found, ids, config, tell, each, done=done,
            drift=session.drift, anchor=session.anchor, earlier=earlier(session.history, found),
        )  # fmt: skip
    except KeyboardInterrupt:
        stopped = True
    apart = (math.nan, math.nan) if last is None else last.apart
    made, strayed = (done, None) if last is None else (last.number, last.strayed)
    studied = Studied(len(found), made, apart, held_out, reason, stopped, strayed)
    facts = studied._asdict() | {"apart": [None if math.isnan(x) else x for x in apart]}
    count = min(KEPT, len(found)) if reason is None and made > 0 else 0
    kept = [found[i * len(found) // count] for i in range(count)]
    asked = [[q.text, q.answer] for q in kept]
    session.note("study", source=source, begin=before.position, asked=asked, **facts)
    if notes is not None:
        session.save()
        if not stopped:
            notes.end()
    return studied


def earlier(history: list[dict[str, Any]], now: list[Question]) -> list[Question]:
    """What was asked in earlier studies, is not asked now, and was not reset since."""
    found: dict[str, str] = {}
    for entry in history:
        if entry["what"] == "reset":
            found = {}
        pairs = entry.get("asked") if entry["what"] == "study" else None
        found |= {
            pair[0]: pair[1]
            for pair in (pairs if isinstance(pairs, list) else ())
            if isinstance(pair, list) and [type(x) for x in pair] == [str, str]
        }
    asked = {question.text for question in now}
    return [Question(text, answer, "") for text, answer in found.items() if text not in asked]


class Notes:
    """What a study has come to, beside the memory: its questions, and the rounds that are made."""

    def __init__(self, file: Path, key: dict[str, Any], questions: list[Question], done: int):
        self.file, self.key, self.questions, self.done = file, key, questions, done

    @classmethod
    def of(cls, folder: Path, text: str, config: StudyConfig) -> Notes:
        """Those of an earlier study of this text with these settings, or new ones."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        key = {"format": FORMAT, "text": digest, "settings": asdict(config)}
        file = folder / f"study-{digest[:16]}.json"
        try:
            body = json.loads(file.read_text(encoding="utf-8"))
            same = {name: body[name] for name in key} == json.loads(json.dumps(key))
            rows, done = body["questions"], body["done"]
            found = [Question(a, b, c, tuple(ways)) for a, b, c, ways in rows]
            whole = all(isinstance(x, str) for q in found for x in (*q[:3], *q.ways))
            if same and whole and type(done) is int and 0 <= done < config.epochs:
                return cls(file, key, found, done)
        except (OSError, LookupError, TypeError, ValueError):  # none, of another study, or damaged
            pass
        return cls(file, key, [], 0)

    def keep(self, questions: list[Question], done: int) -> None:
        """Write them."""
        self.questions, self.done = questions, done
        body = self.key | {"questions": [list(q) for q in questions], "done": done}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.file, lambda path: path.write_text(json.dumps(body, indent=1) + "\n"))

    def end(self) -> None:
        """The study is over."""
        self.file.unlink(missing_ok=True)
