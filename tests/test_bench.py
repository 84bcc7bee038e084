"""The bench: fair orders, honest refusals, and a table that comes from the file alone."""

import json
import runpy
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nestlearn.layers import SelfModifyingTitans
from nestlearn.options import Titans

sys.path.insert(0, str(Path(__file__).parents[1]))  # the room is not installed: it runs from here

from bench import __main__ as cli
from bench import contestants, equivalence, harness, memory, report, tasks
from bench.contestants import Contestant, Shape

TINY = tasks.Settings(
    lengths=(4, 10), rounds=2, shape=Shape(16, 2, 4), memory=False, compiled=False, model=False,
    peak_size=32,
)  # fmt: skip
BY_NAME = {c.name: c for c in contestants.contestants()}
TITANS, SUBLAYER = BY_NAME[contestants.OURS], BY_NAME["attention sublayer"]


@pytest.fixture(autouse=True)
def _no_repeats(monkeypatch):
    monkeypatch.setattr(harness, "LEAST", 0.0)


# ------------------------------------------------------------------------------------ rounds


@pytest.mark.parametrize("n", range(1, 8))
def test_orders_are_balanced(n):
    rows = [harness.order(n, turn) for turn in range(2 * n)]
    assert all(sorted(row) == list(range(n)) for row in rows)
    for place in range(n):  # everyone has every place twice
        assert Counter(row[place] for row in rows) == dict.fromkeys(range(n), 2)
    follows = Counter(pair for row in rows for pair in pairwise(row))
    assert len(set(follows.values())) <= 1  # and everyone follows everyone equally often
    assert len(follows) == n * (n - 1)
    for even, odd in zip(rows[::2], rows[1::2]):  # a steady drift cancels in every two rounds
        assert even == odd[::-1]


def task(name, run=lambda: None, length=1, **options):
    about = {"amount": length, "unit": "tokens/s", "group": f"g{length}", **options}
    return harness.Task(name, "forward", length, run, **about)


def test_every_round_runs_all_in_its_own_order():
    ran = []
    found = [task(name, lambda name=name: ran.append(name)) for name in "abc"]
    harness.warm_up(found, 9.0, lambda *_: None)
    ran.clear()
    after = []
    harness.run_rounds(found, 4, lambda *_: None, after.append)
    rounds = [ran[i : i + 3] for i in range(0, 12, 3)]
    assert after == [1, 2, 3, 4]
    assert rounds == [["abc"[i] for i in harness.order(3, turn)] for turn in range(4)]
    assert all(len(t.values) == 4 for t in found)


def test_a_slow_one_is_dropped_and_not_run_at_longer_lengths(monkeypatch):
    now, ran = [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def takes(name, length, seconds):
        def run():
            ran.append((name, length))
            now[0] += seconds

        return task(name, run, length)

    found = [takes("slow", n, 0.01 * n**2) for n in (4, 8, 16, 32)] + [takes("fast", 32, 0.1)]
    harness.warm_up(found, 1.0, lambda *_: None)
    assert [t.seconds is not None for t in found] == [True, True, False, False, True]
    assert ("slow", 32) not in ran  # 16 was more than the limit, so 32 is too
    assert found[3].dropped == "more than 1 s per run"
    record = found[3].record()
    assert (record["median"], record["rounds"]) == (None, 0)


def test_the_error_of_a_peer_drops_it_and_ours_is_raised():
    def fails():
        raise RuntimeError("of theirs\nand more")

    peer = task("peer", fails, lenient=True)
    harness.warm_up([peer], 1.0, lambda *_: None)
    assert peer.dropped == "of theirs"
    with pytest.raises(RuntimeError, match="of theirs"):
        harness.warm_up([task("ours", fails)], 1.0, lambda *_: None)
    full = task("ours", lambda: torch.empty(2**60))
    harness.warm_up([full], 1.0, lambda *_: None)
    assert full.dropped == "out of memory"


# --------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run of two contestants and one that is not installed: (document, folder, writes)."""
    out = tmp_path_factory.mktemp("bench") / "results"
    absent = replace(SUBLAYER, name="absent", module="not_installed_here", package="not-here")
    writes, write = [], report.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "LEAST", 0.0)

        def counted(document, out):
            writes.append(document["settings"]["rounds"])
            write(document, out)

        patch.setattr(report, "write", counted)
        document = cli.run(TINY, out, [TITANS, SUBLAYER, absent])
    return document, out, writes


def test_a_run_writes_records_after_every_round(measured):
    document, out, writes = measured
    assert writes == [1, 2]
    assert json.loads((out / "bench.json").read_text()) == json.loads(json.dumps(document))
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob(".*"))
    assert {"cpu", "cores", "threads", "memory_gib", "os"} <= document["machine"].keys()
    assert {"python", "torch", "nestlearn"} <= document["versions"].keys()
    speeds = [r for r in document["records"] if r["unit"] == "tokens/s"]
    cells = {(r["contestant"], r["kind"], r["T"]) for r in speeds}
    assert len(cells) == len(speeds) == 2 * 2 * 2
    for record in speeds:
        assert record["rounds"] == len(record["values"]) == 2
        assert 0 < record["low"] <= record["median"] <= record["high"]
        assert (record["batch"], record["width"], record["chunk"]) == (2, 16, 4)
    kinds = {r["kind"] for r in document["records"]}
    assert {"forward", "forward + backward", "decode", "peak", "share of peak"} <= kinds
    assert {r["T"] for r in document["records"] if r["kind"] == "decode"} == {100, 1_000_000}


def test_a_missing_peer_is_skipped_with_its_remedy(measured):
    document, out, _ = measured
    assert document["skipped"] == ["absent skipped: pip install not-here"]
    assert "pip install not-here" in (out / "table.md").read_text()
    assert "absent" not in {r["contestant"] for r in document["records"]}


def test_the_table_comes_from_the_file(measured, tmp_path):
    _, out, _ = measured
    shown = CliRunner().invoke(cli.app, ["table", str(out / "bench.json")])
    assert shown.exit_code == 0
    assert shown.stdout == (out / "table.md").read_text()
    (tmp_path / "bad.json").write_text('{"records": 3}')
    assert CliRunner().invoke(cli.app, ["table", str(tmp_path / "bad.json")]).exit_code == 2


def record(name, values, length, ours=True, **more):
    about = {"contestant": name, "kind": "forward", "T": length, "metric": "speed"}
    shape = {"width": 16, "heads": 2, "batch": 2, "chunk": 4, "parameters": 1234}
    spread = harness.summary(values)
    return {**about, "unit": "tokens/s", **spread, "dropped": "", "ours": ours, **shape, **more}


def test_ratios_are_of_the_same_round():
    document = {
        "machine": {"cpu": "c", "cores": 2, "threads": 2, "memory_gib": 8.0, "os": "o"},
        "versions": {}, "commit": None, "date": "d", "command": "m", "settings": {"rounds": 3},
        "baselines": ["peer"], "skipped": [],
        "records": [
            record("ours", [10.0, 200.0, 3000.0], 8),
            record("ours", [], 16, dropped="more than 1 s per run"),
            record("peer", [5.0, 100.0, 1500.0], 8, ours=False),
        ],
    }  # fmt: skip
    lines = report.table(document).splitlines()
    assert "| contestant | parameters | 8 | 16 |" in lines
    assert "| ours | 1,234 | 200 ± 748 % (2.00) | — |" in lines
    assert "| peer | 1,234 | 100 ± 748 % |  |" in lines
    assert lines[-1] == "* —: not measured (more than 1 s per run)."


# ------------------------------------------------------------------------------ equivalence


class Wrong(SelfModifyingTitans):
    """Wrong in one way: "output" and "gradient" in its chunk form, "stream" after a call."""

    how = ""

    def forward(self, x, state=None):
        y, after = super().forward(x, state)
        if self.how == "stream" and state is not None and state.position % 4:
            return y * (1 + 1e-6), after
        if self.writer.backend == "naive":
            return y, after
        if self.how == "gradient":
            return y + 1e-6 * (y - y.detach()), after
        return (y * (1 + 1e-6) if self.how == "output" else y), after

    def compile(self, **options):
        self.how = "output"


def wrong(how, **options):
    def build(shape):
        layer = Wrong(shape.width, shape.heads, Titans(shape.chunk, depth=2, half_life=None))
        layer.how = how
        return layer

    return Contestant(f"wrong {how}", build, **options)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("output", ["chunks ≠ token by token: y"]),
        ("gradient", ["chunks ≠ token by token: gradient of"]),
        ("stream", ["pieces ≠ one pass: y"]),
    ],
)
def test_a_wrong_layer_is_found(how, named):
    failures = equivalence.check_equivalence([wrong(how)])
    assert len(failures) == len(named)
    for failure, part in zip(failures, named):
        assert failure.startswith(f"wrong {how}: {part}")


def test_right_layers_pass_and_peers_are_not_ours_to_prove():
    assert equivalence.check_equivalence([TITANS, BY_NAME["Attention"], SUBLAYER]) == []


def test_a_wrong_compilation_is_found(monkeypatch):
    monkeypatch.setattr(equivalence, "SINGLE", 1e-8)
    (failure,) = equivalence.check_equivalence([wrong("", compiled=True)])
    assert failure.startswith("wrong : compiled ≠ not compiled: y")


def test_wrong_numbers_have_no_speed(monkeypatch, tmp_path):
    monkeypatch.setattr(contestants, "contestants", lambda: [wrong("output")])
    monkeypatch.setattr(cli, "limit_memory", lambda: None)  # of a process of its own
    out = tmp_path / "results"
    shown = CliRunner().invoke(cli.app, ["--quick", "--out", str(out)])
    assert shown.exit_code == 1
    assert shown.stdout == ""
    assert "Refused" in shown.stderr
    assert "chunks ≠ token by token" in shown.stderr
    assert not out.exists()


# -------------------------------------------------------------------------------- the parts


def test_contestants_have_their_own_names_and_baselines_are_among_them():
    names = [c.name for c in contestants.contestants()]
    assert len(set(names)) == len(names)
    assert set(contestants.BASELINES) <= set(names)
    without, lines = contestants.present([TITANS, wrong("", compiled=True)], compiled=False)
    assert (without, lines) == ([TITANS], [])


@pytest.mark.parametrize("name", [c.name for c in BY_NAME.values() if not c.package])
def test_who_needs_nothing_runs(name):
    c = replace(BY_NAME[name], compiled=False)
    layer = c.make(TINY.shape)
    for kind in c.kinds:
        tasks.pass_through(c, layer, kind, 6, 1, TINY.shape)()
    assert (
        all(p.grad is not None for p in layer.parameters()) or "forward + backward" not in c.kinds
    )
    if c.prepare is not None:  # causal: the last token changes nothing before it
        x = torch.randn(1, 6, 16)
        other = torch.cat([x[:, :-1], torch.randn(1, 1, 16)], 1)
        before, after = (c.step(layer, part, None)[0][:, :-1] for part in (x, other))
        torch.testing.assert_close(before, after)


def test_counted_operations_are_those_of_the_products():
    B, T, D = 2, 8, 16
    forward = 2 * B * T * (3 * D * D + D * D)  # the two projections; attention is no mm
    assert tasks.counted_flops(SUBLAYER, T, B, Shape(D, 2, 4)) == 3 * forward


def test_a_far_position_is_a_near_one_with_another_number():
    layer = TITANS.make(TINY.shape)
    _, state = layer(torch.randn(1, 8, 16))
    far = tasks.at_position((state, None), 1_000_000)
    assert far[0].position == 1_000_000
    assert far[1] is None
    x = torch.randn(1, 4, 16)
    torch.testing.assert_close(layer(x, far[0])[0], layer(x, state)[0])


def test_memory_is_measured_in_a_fresh_process():
    settings = replace(TINY, memory=True, lengths=(512,), shape=Shape(64, 2, 64))
    (job,) = memory.memory_jobs([replace(SUBLAYER, memory=True)], settings)
    keep = torch.zeros(2**26)  # 256 MiB held here must not hide what the child needs
    (got,) = memory.memory_records([job], 60.0, lambda *_: None)
    del keep
    assert (got["dropped"], got["T"], got["unit"]) == ("", 512, "MiB")
    assert 0.25 < got["median"] < 64  # an output alone is 0.25


def test_who_fails_in_memory_is_not_tried_longer():
    settings = replace(TINY, memory=True, lengths=(4, 8, 16), flat=True)
    jobs = memory.memory_jobs([TITANS, SUBLAYER], settings)
    assert [j["length"] for j in jobs[:3]] == [4, 8, 16]
    assert {j["kind"] for j in jobs[3:]} == {memory.STREAM_MEMORY}
    tried = []

    def measure(job, seconds):
        tried.append(job["length"])
        return {"dropped": "out of memory"} if job["length"] > 4 else {"dropped": "", "mib": 1.0}

    found = memory.memory_records(jobs[:3], 1.0, lambda *_: None, measure)
    assert tried == [4, 8]
    assert [r["median"] for r in found] == [1.0, None, None]


def test_help_names_every_option():
    shown = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "120"})
    assert shown.exit_code == 0
    for option in ("out", "quick", "layers", "decode", "memory", "model", "compile", "flat"):
        assert f"--{option}" in shown.stdout
    for option in ("lengths", "rounds", "limit", "batch", "model-batch", "threads"):
        assert f"--{option}" in shown.stdout
    bad = CliRunner().invoke(cli.app, ["--lengths", "256,x"])
    assert bad.exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would measure")
@pytest.mark.parametrize("module", ["bench.gpu", "bench.newton_schulz"])
def test_gpu_says_what_it_needs(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")  # as `python -m` does
    assert stop.value.code == 2
    assert "no CUDA card" in capsys.readouterr().err
