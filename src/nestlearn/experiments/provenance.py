"""Of which code a result is: its commit, a hash of its sources; what may enter results/."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from nestlearn import __version__

HERE = Path(__file__).parent
PACKAGE = HERE.parent
TRAINING = (  # what every training depends on
    "memory", "scan", "layers", "models", "optim", "train", "evals", "state.py", "tree.py",
    "options.py",
    "experiments/fit.py", "experiments/models.py",
)  # fmt: skip


@cache
def commit() -> str:
    """The commit of the code, "-dirty" if src/ changed since; without git, the version."""
    found = _git("rev-parse", "HEAD")
    if found is None:
        return f"nestlearn {__version__}"
    return found + "-dirty" * bool(_git("status", "--porcelain", "--", str(PACKAGE)))


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *command], cwd=HERE, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check_place(out: Path) -> None:
    """Refuse, by ValueError, to write into results/ what no clean commit has made."""
    roots = {Path("results").resolve(), PACKAGE.parents[1] / "results"}
    if not roots & {out.resolve(), *out.resolve().parents}:
        return
    made = commit()
    if made.endswith("-dirty"):
        why = f"{PACKAGE} has changed since {made[:12]}: commit, or write"
    elif made.startswith("nestlearn"):
        why = "this code is in no git repository: write"
    else:
        return
    raise ValueError(
        f"{out} takes results of clean commits only, and {why} elsewhere (--out runs/{out.name})"
    )


def code_version(*sources: str) -> str:
    """A short hash of the sources that a result depends on: files, and rooms of nestlearn whole."""
    paths = {
        path
        for name in (*TRAINING, *sources)
        for path in ([PACKAGE / name] if name.endswith(".py") else (PACKAGE / name).rglob("*.py"))
    }
    return fingerprint(paths)


def fingerprint(paths: Iterable[str | Path]) -> str:
    """A short hash of files: of their contents and names, not of where they stand."""
    digest = hashlib.sha256()
    for path in sorted(map(Path, paths)):
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
