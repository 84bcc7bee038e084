"""Processes of a test's own that need not import torch anew."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

PRELOAD = (
    "pytest", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama",
    "transformers.trainer", "accelerate", "nestlearn.hf", "nestlearn.learn", "nestlearn.optim",
    "nestlearn.train", "uvicorn", "starlette.applications",
)  # fmt: skip


def server() -> multiprocessing.context.BaseContext:
    """What starts processes: a server that has imported what they need and run nothing, one for
    all tests of a worker. One that has run threads must not be forked: its child would wait for
    them for ever. Without fork, as on Windows, each imports for itself.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


def elsewhere(work: Callable[..., Any], *given: Any) -> Any:
    """What another process returns, to which nothing else is known."""
    with ProcessPoolExecutor(1, server(), _alone) as pool:
        return pool.submit(work, *given).result()


def _alone() -> None:
    import torch

    torch.set_num_threads(1)
