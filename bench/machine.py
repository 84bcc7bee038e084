"""Where it was measured: the machine, the versions, the commit, and its memory's limits."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import nestlearn

ROOT = Path(__file__).parents[1]


def machine() -> dict[str, Any]:
    """CPU, cores, threads that torch uses, memory in GiB, operating system."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": platform.platform(),
    }


def _cpu() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The repository's commit, with "+" if files differ from it.

    None outside of a repository, or where the nestlearn that is measured is not the one in it.
    """
    if not Path(nestlearn.__file__).resolve().is_relative_to(ROOT):
        return None
    try:
        head, changes = (
            subprocess.run(
                ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("--no-optional-locks", "status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + "+" * bool(changes)


def limit_memory(share: float = 0.9) -> None:
    """Make an allocation beyond this share of the free memory an error here, which drops one
    contestant, and not the end of the whole run. Where the system does not tell, do nothing.
    """
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable"):
            most = int(share * int(line.split()[1]) * 1024)
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def forget_peak() -> None:
    """Start the peak anew from what is held now, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """The most memory that this process has held.

    On Linux not `ru_maxrss`: a child inherits its parent's there, and then nothing that needs less
    than the parent has held can be measured in it.
    """
    for line in _lines("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
