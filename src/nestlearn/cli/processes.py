"""`nestlearn train` under torchrun: join its processes, and say once what ended them."""

from __future__ import annotations

import os
import re
import secrets
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
JOINING = 300.0  # seconds to wait for all to start
PATIENCE = 2.0  # seconds to wait for another rank's own words
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
        board = _Board()
        _join(device, board)
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


def _join(device: str, board: _Board) -> None:
    import torch
    import torch.distributed as dist

    from nestlearn.train.run import resolve_device

    cuda = resolve_device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=board.store, rank=board.rank, world_size=board.size,
    )  # fmt: skip


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
    """A place in torchrun's store, which outlives processes, where they meet and leave word."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        server = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=server,
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
        self.store: Any = dist.PrefixStore(f"nestlearn/{self._round(store)}", store)

    def _round(self, store: Any) -> str:
        """A name for this start that all ranks know: the store keeps the addresses of processes
        that were killed before a restart, so these must not be looked up again.
        """
        mine, end = secrets.token_hex(8), time.monotonic() + JOINING
        waiting = set(range(1, self.size))
        if self.rank == 0:
            store.set("nestlearn/round", mine)
        while time.monotonic() < end:
            name = mine if self.rank == 0 else store.get("nestlearn/round").decode()
            if self.rank == 0:
                for rank in [r for r in waiting if store.check([f"{name}/{r}"])]:
                    store.set(f"{name}/{rank}/met", store.get(f"{name}/{rank}"))
                    waiting.remove(rank)
                if not waiting:
                    return name
            else:
                store.set(f"{name}/{self.rank}", mine)
                met = f"{name}/{self.rank}/met"
                if store.check([met]) and store.get(met).decode() == mine:  # no earlier process
                    return name
            time.sleep(0.02)
        raise OSError(f"rank {self.rank} waited {JOINING:.0f} s for the others to start")

    def mine(self) -> bool:
        """Whether this rank speaks: the first to ask does."""
        return self.store.add("spoken", 1) == 1

    def missing(self) -> list[int]:
        """The ranks that left no word in time; none where one of them has spoken."""
        self.store.set(f"here/{self.rank}", "")
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not self.store.check(["spoken"]):
            time.sleep(0.05)
        if self.store.check(["spoken"]):
            return []
        return [rank for rank in range(self.size) if not self.store.check([f"here/{rank}"])]
