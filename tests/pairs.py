"""Two processes on the CPU (gloo), in one start for all cases of a test."""

import gc
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from servers import server


@contextmanager
def pair(
    work: Callable[..., None],
    *given: Any,
    before: Callable[[Path], None] = lambda _: None,
) -> Iterator[Path]:
    """The folder in which two processes, joined in a group, have run `work(rank, folder, *given)`.

    before: makes what the folder holds at their start.
    """
    server()
    for again in (True, False):
        with tempfile.TemporaryDirectory() as name:
            before(Path(name))
            try:
                _run(work, name, given)
            except _Crash as crash:
                # Once in hundreds of runs, under load, gloo's own thread dies within malloc (torch
                # 2.13), where no code of ours runs. That alone is tried again, and not twice.
                if not again:
                    raise
                warnings.warn(f"{crash}; started once more", stacklevel=1)
            else:
                yield Path(name)
                return


class _Crash(Exception):
    """A process ended by SIGSEGV."""


def _run(work: Callable[..., None], folder: str, given: tuple) -> None:
    started = mp.start_processes(
        _joined, (folder, work, given), nprocs=2, join=False, start_method="forkserver"
    )
    try:
        while not started.join():
            pass
    except (
        mp.ProcessExitedException,
        mp.ProcessRaisedException,
    ) as error:  # of the first to end; the other may have crashed
        if -signal.SIGSEGV in [process.exitcode for process in started.processes]:
            raise _Crash("one of two processes ended by SIGSEGV") from error
        raise


def _joined(rank: int, folder: str, work: Callable[..., None], given: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    work(rank, Path(folder), *given)
    gc.collect()  # DDP's reducer, which a caught exception keeps, goes before its group
    dist.barrier()  # and no group goes while the other process uses it
    dist.destroy_process_group()
