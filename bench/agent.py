"""python bench/agent.py RESTARTS ARGUMENTS: torchrun's agent over two processes of `nestlearn`.

As `torchrun --nproc-per-node 2 --max-restarts RESTARTS -m nestlearn ARGUMENTS`; but the processes
are forked from one that has loaded the modules, which takes a start ten seconds of a processor.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def work(*arguments: str) -> None:
    """One of the processes, in its place of the group."""
    from nestlearn.cli import main

    sys.argv = ["nestlearn", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise


def ranks_of(agent: int) -> list[int]:
    """The processes that this agent has running, by rank."""
    return [rank for server in _children(agent) for rank in _children(server)]


def _children(process: int) -> list[int]:
    try:
        return [
            int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except OSError:  # it has ended
        return []


if __name__ == "__main__":
    restarts, *arguments = sys.argv[1:]
    multiprocessing.set_forkserver_preload(
        ["torch.distributed.fsdp", "nestlearn.cli", "nestlearn.train", "nestlearn.models.hope"]
    )
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=int(restarts), monitor_interval=0.1,
        start_method="forkserver",
    )  # fmt: skip
    elastic_launch(config, work)(*arguments)
