"""The tests of compiled.py, in a process without the runtime checks of conftest.py."""

import os
import subprocess
import sys
from pathlib import Path


def test_compiled_layers():
    file = Path(__file__).with_name("compiled.py")
    quiet = ["--noconftest", "-q", "-n", "0", "--show-capture=no"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *quiet, file],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
