"""Cells: never twice, never half, and one that fails ends no other."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import odd_jobs
import pytest

from nestlearn.experiments.cells import cell_path, failure, run_cells
from nestlearn.experiments.provenance import commit


@pytest.fixture
def cells(tmp_path):
    """Three cells; the mood of number 1 can be set."""
    (tmp_path / "mood").write_text("well")
    log = str(tmp_path / "log")
    made = [{"task": "t", "model": "m", "n": n, "seed": n, "log": log} for n in range(3)]
    made[1]["mood"] = str(tmp_path / "mood")
    return made


def ran(tmp_path):
    """Which cells ran, in order."""
    log = tmp_path / "log"
    return [int(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []


def values(found):
    return [done and done["result"]["value"] for done in found]


def test_a_finished_cell_is_never_run_again(tmp_path, cells):
    folder = tmp_path / "cells"
    assert values(run_cells(cells[:2], odd_jobs.work, folder, workers=0)) == [0, 1]
    assert values(run_cells(cells, odd_jobs.work, folder, workers=0)) == [0, 1, 2]
    assert ran(tmp_path) == [0, 1, 2]
    done = json.loads(cell_path(folder, cells[2]).read_text())
    assert done["cell"] == cells[2]
    assert done["commit"] == commit()
    assert done["versions"]["nestlearn"]
    assert cell_path(folder, cells[2]).name.startswith("t-m-2_")
    changed = {**cells[2], "lr": 0.1}  # another cell, for all its name
    assert cell_path(folder, changed) != cell_path(folder, cells[2])
    assert cell_path(folder, {**cells[2], "device": "cuda"}) == cell_path(folder, cells[2])
    assert cell_path(folder, {**cells[2], "folder": "/data"}) == cell_path(folder, cells[2])
    sized = {**cells[2], "data": {"train": 8}}  # what it is trained on is no place
    assert cell_path(folder, sized) != cell_path(folder, cells[2])


def test_a_failed_cell_is_told_of_and_tried_again(tmp_path, cells, capsys):
    folder = tmp_path / "cells"
    (tmp_path / "mood").write_text("fails")
    assert values(run_cells(cells, odd_jobs.work, folder, workers=0)) == [0, None, 2]
    assert "cell 1 is in no mood" in failure(folder, cells[1])
    assert failure(folder, cells[0]) is None
    shown = " ".join(capsys.readouterr().err.split())
    assert "failed: t-m-1: RuntimeError: cell 1 is in no mood" in shown
    assert "t-m-2: number 2" in shown
    (tmp_path / "mood").write_text("well")
    assert values(run_cells(cells, odd_jobs.work, folder, workers=0)) == [0, 1, 2]
    assert ran(tmp_path) == [0, 1, 2, 1]
    assert failure(folder, cells[1]) is None


def test_workers_take_turns_on_the_cards_and_one_that_dies_costs_its_cell_alone(
    tmp_path, cells, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    folder = tmp_path / "cells"
    (tmp_path / "mood").write_text("dies")
    assert values(run_cells(cells, odd_jobs.work, folder, workers=2)) == [0, None, 2]
    assert "the worker died (exit code 3)" in failure(folder, cells[1])
    cards = {line.split()[0]: line.split()[2] for line in (tmp_path / "log").open()}
    assert (cards["0"], cards["1"]) == ("3", "5")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_a_card_that_is_full_of_workers_gets_one_fewer_and_the_cell_a_second_try(tmp_path, cells):
    (tmp_path / "mood").write_text("crowded")
    (tmp_path / "patience").write_text("waits")
    cells[0]["mood"] = str(tmp_path / "patience")
    assert values(run_cells(cells, odd_jobs.work, tmp_path / "cells", workers=2)) == [0, 1, 2]
    first, second, *later = ran(tmp_path)
    assert {first, second} == {0, 1}
    assert later == [2, 1]  # a second try comes after those that never had one
    assert failure(tmp_path / "cells", cells[1]) is None


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def wait_for(what, seconds=60):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.05)


def test_killed_it_loses_the_running_cell_alone(tmp_path, cells):
    folder = tmp_path / "cells"
    (tmp_path / "mood").write_text("hangs")
    command = [sys.executable, odd_jobs.__file__, json.dumps(cells), str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: 1 in ran(tmp_path))
    worker = int((tmp_path / "log").read_text().splitlines()[1].split()[1])
    process.kill()
    process.wait()
    wait_for(lambda: gone(worker))  # no orphan goes on computing
    assert sorted(p.name for p in folder.iterdir()) == [cell_path(folder, cells[0]).name]
    (tmp_path / "mood").write_text("well")
    assert values(run_cells(cells, odd_jobs.work, folder, workers=0)) == [0, 1, 2]
    assert ran(tmp_path) == [0, 1, 1, 2]
