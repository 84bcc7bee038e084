"""`nestlearn train` under torchrun: join its processes, and say once what ended them."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from nestlearn.cli.commands import say

if TYPE_CHECKING:
    from nestlearn.train.ranks import Ranks

FORESEEN = (ValueError, OSError, FloatingPointError, ImportError)
PATIENCE = 4.0  # seconds to wait for another rank's own words
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|timed? ?out", re.I)
_GO_ON = "the checkpoints are kept: the same command with --resume goes on"


def restarted() -> bool:
    """Whether torchrun has started these processes again, by --max-restarts."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """This process' place among those that torchrun started; alone without it.

    When one fails or is killed, one of them says which, and all exit with 2.
    """
    from nestlearn.train.ranks import Ranks

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    board = None
    try:
        _join(device)
        board = _Board()
        yield Ranks.here()
        dist.destroy_process_group()
    except typer.Exit:
        raise
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, to the others of a failed one
        text = _last_words(error, board) if board else str(error)
        if text and isinstance(error, (*FORESEEN, RuntimeError)):
            say(f"Error: {' '.join(text.split())}", "bold red")
        elif text:
            raise
        raise typer.Exit(2) from None


def _join(device: str) -> None:
    import torch
    import torch.distributed as dist

    from nestlearn.train.run import resolve_device

    cuda = resolve_device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def _last_words(error: BaseException, board: _Board) -> str:
    """What this rank is to say of the end, "" where another one says it."""
    import torch.distributed as dist

    others = isinstance(error, dist.DistError | RuntimeError) and _LOST.search(str(error))
    missing = board.missing() if others else []
    if not board.mine():
        return ""
    if missing:
        return f"rank {', '.join(map(str, missing))} was killed or hangs; {_GO_ON}"
    return f"rank {getattr(error, 'rank', board.rank)}: {error}; {_GO_ON}"


class _Board:
    """A place in torchrun's store, which outlives its processes, where they leave word."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store: Any = dist.PrefixStore(f"nestlearn/{attempt}", store)

    def mine(self) -> bool:
        """Whether this rank speaks: the first to ask does."""
        return self._store.add("spoken", 1) == 1

    def missing(self) -> list[int]:
        """The ranks that left no word in time; none where one of them has spoken."""
        self._store.set(f"here/{self.rank}", "")
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not self._store.check(["spoken"]):
            time.sleep(0.05)
        if self._store.check(["spoken"]):
            return []
        return [rank for rank in range(self.size) if not self._store.check([f"here/{rank}"])]
