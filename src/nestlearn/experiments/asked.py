"""Questions to a model that has read: in this process, or in another one that has a saved state.

    python -m nestlearn.experiments.asked MODEL DEVICE

reads lines of JSON, {"state": FILE, "length": bytes read, "questions": [...], "most": bytes}, and
answers each with a line, a JSON list. It never sees the text.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nestlearn import state as tree
from nestlearn.models.hope import HopeLM

PIECE, TOGETHER = 4096, 2**17  # bytes of a row that are read at once, and of all rows
ROWS, WHOLE = 64, 64  # of texts that are scored: at most; the bytes of each are a multiple
SHAPED = 8192  # bytes after which no state grows any more


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a card."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def read(lm: HopeLM, texts: Sequence[bytes]) -> Any:
    """The state after texts of one length, each read once from its beginning."""
    device = next(lm.parameters()).device
    ids = torch.stack([torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts])
    state = None
    for part in ids.split(max(64, min(PIECE, TOGETHER // len(texts))), 1):
        with autocast(device):
            _, state = lm(part.to(device).long(), state, output="hidden")
    return state


def answers(
    lm: HopeLM, state: Any, questions: Sequence[bytes], most: int, end: int | None = None
) -> list[str]:
    """The likeliest `most` bytes after each question, or up to where all have said the byte `end`;
    shorter questions begin with more newlines.
    """
    device = next(lm.parameters()).device
    longest = max(map(len, questions))
    rows = [list(question.rjust(longest, b"\n")) for question in questions]
    with autocast(device):
        said = lm.generate(
            torch.tensor(rows, device=device), most, temperature=0, state=state,
            eos_token_id=end,
        )  # fmt: skip
    return [bytes(row).decode(errors="replace") for row in said[:, longest:].tolist()]


@torch.no_grad()
def scored(lm: HopeLM, pairs: Sequence[tuple[bytes, bytes]]) -> list[tuple[float, bool]]:
    """log p of each second text after its first one, in nats, and whether all of its bytes are the
    likeliest ones. ValueError for a text that is empty.
    """
    if not all(before and after for before, after in pairs):
        raise ValueError("a text is empty: give two of one byte or more")
    device = next(lm.parameters()).device
    found = [(0.0, False)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    while order:
        # whole chunks; what is padded behind, a causal model does not see
        longest = 1 + WHOLE * -(-sum(map(len, pairs[order[0]])) // WHOLE)
        count = max(1, min(ROWS, TOGETHER // longest))
        some, order = order[:count], order[count:]
        rows = [b"".join(pairs[i]).ljust(longest, b"\0") for i in some]
        ids = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, longest)
        state, parts = None, []
        for a in range(0, longest - 1, PIECE):
            part = ids[:, a : a + PIECE + 1].to(device).long()
            with autocast(device):
                logits, state = lm(part[:, :-1], state)
            nats = F.cross_entropy(logits.mT.float(), part[:, 1:], reduction="none")
            parts.append(torch.stack([nats, logits.argmax(-1) == part[:, 1:]]).cpu())
        nats, right = torch.cat(parts, -1)
        for row, i in enumerate(some):
            of = (row, slice(len(pairs[i][0]) - 1, sum(map(len, pairs[i])) - 1))
            found[i] = -float(nats[of].double().sum()), bool(right[of].all())
    return found


class Elsewhere:
    """Another process with the same model: `ask` sends it a file and questions, nothing else."""

    def __init__(self, folder: Path, device: str) -> None:
        command, pipe = [sys.executable, "-m", __name__, str(folder), device], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.communicate()

    def ask(self, state: Path, length: int, questions: Sequence[bytes], most: int) -> list[str]:
        """Its answers after the state in that file, which has read `length` bytes."""
        assert self.process.stdout is not None
        told = [question.decode() for question in questions]
        line = {"state": str(state), "length": length, "questions": told, "most": most}
        print(json.dumps(line), file=self.process.stdin, flush=True)
        found = self.process.stdout.readline()
        if not found:
            raise RuntimeError("the process that answers has ended: see its message above")
        return json.loads(found)


def _serve(folder: str, device: str) -> None:
    lm = HopeLM.from_pretrained(folder).to(device).eval()
    for line in sys.stdin:
        said = json.loads(line)
        like = read(lm, [b" " * min(said["length"], SHAPED)])
        state = tree.load(said["state"], like, device)
        questions = [question.encode() for question in said["questions"]]
        print(json.dumps(answers(lm, state, questions, said["most"])), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
