"""State is data: a tree is selected, joined, moved, saved and loaded without losing a bit."""

import errno
import os
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from nestlearn import state

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


class Memory(NamedTuple):
    W: torch.Tensor
    momentum: torch.Tensor


class Layer(NamedTuple):
    memory: Memory
    buffers: dict
    position: int
    note: str | None


def layer(batch=3, position=7, note=None, seed=0) -> Layer:
    g = torch.Generator().manual_seed(seed)
    memory = Memory(torch.randn(batch, 2, 4, generator=g), torch.randn(batch, 4, generator=g))
    buffers = {"tail": torch.randint(9, (batch, 5), generator=g), "empty": torch.empty(batch, 0)}
    return Layer(memory, buffers, position, note)


def tree(batch=3, **kwargs):
    scalars = [0.1, float("inf"), -0.0, True, "π", 2**70]
    return {"layers": (layer(batch, **kwargs), layer(batch, seed=1)), "scalars": scalars}


def assert_same(a, b):
    left, right = state.leaves(a), state.leaves(b)
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, x), (_, y) in zip(left, right):
        assert type(x) is type(y), path
        if isinstance(x, torch.Tensor):
            assert (x.dtype, x.shape) == (y.dtype, y.shape), path
            bits = [t.contiguous().view(-1).view(torch.uint8) for t in (x, y)]
            assert torch.equal(*bits), path
        else:
            assert repr(x) == repr(y), path


def test_leaves_are_named_by_dotted_paths():
    found = dict(state.leaves(tree()))
    assert len(found) == 2 * 6 + 6
    assert found["layers.0.position"] == 7
    assert found["layers.1.memory.W"].shape == (3, 2, 4)
    assert found["scalars.4"] == "π"
    assert state.leaves(torch.ones(1))[0][0] == ""


def test_tree_map_changes_tensors_only_and_keeps_types():
    a = tree()
    mapped = state.tree_map(torch.add, a, a)
    assert isinstance(mapped["layers"][0], Layer)
    torch.testing.assert_close(mapped["layers"][0].memory.W, 2 * a["layers"][0].memory.W)
    assert mapped["layers"][0].position == 7


def test_tree_map_names_where_structures_differ():
    with pytest.raises(ValueError, match=r"layers: a tuple of 2 .* a tuple of 1"):
        state.tree_map(torch.add, tree(), {**tree(), "layers": (layer(),)})
    with pytest.raises(ValueError, match=r"layers\.1\.note: .*type none .*type str"):
        state.tree_map(torch.add, tree(), {**tree(), "layers": (layer(), layer(note="x"))})


@pytest.mark.parametrize("bad", [object(), {1: torch.ones(1)}, {"": 1}, 1j, torch.Size([1])])
def test_what_is_no_state_tree_is_refused_by_path(bad):
    with pytest.raises(ValueError, match=r"parts.1"):
        state.leaves({"parts": (None, bad)})


def test_detach_and_to():
    a = state.tree_map(lambda t: t.requires_grad_() if t.is_floating_point() else t, tree())
    b = state.to(state.detach(a), dtype=torch.bfloat16)
    assert b["layers"][0].memory.W.dtype == torch.bfloat16
    assert b["layers"][0].buffers["tail"].dtype == torch.int64
    assert not b["layers"][0].memory.W.requires_grad
    assert a["layers"][0].memory.W.requires_grad
    assert state.to(a, "meta")["layers"][0].memory.W.is_meta


@pytest.mark.parametrize("rows", [[2, 0, 0], torch.tensor([2, 0, 0]), slice(None, None, -1), []])
def test_select_reorders_and_repeats(rows):
    a = tree()
    picked = state.select(a, rows)
    expected = torch.tensor(list(range(3))[rows] if isinstance(rows, slice) else list(rows)).long()
    for (path, x), (_, y) in zip(state.leaves(a), state.leaves(picked)):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x[expected], y), path
            assert y.numel() == 0 or y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 3], r"rows \[3\] are out of bounds: the state has rows 0 to 2"),
        ([-1], r"rows \[-1\] are out of bounds"),
        ([True], "list of ints"),
        (1, r"rows=\[0\]"),
        (torch.tensor([True, False, True]), "nonzero"),
    ],
)
def test_select_refuses_wrong_rows(rows, message):
    with pytest.raises(ValueError, match=message):
        state.select(tree(), rows)


def test_every_tensor_has_the_same_batch():
    with pytest.raises(ValueError, match=r"b: the batch axis is 2, but 3 at a"):
        state.select({"a": torch.ones(3), "b": torch.ones(2)}, [0])
    with pytest.raises(ValueError, match=r"a: a tensor of shape \(\) has no batch axis"):
        state.select({"a": torch.tensor(1.0)}, [0])
    assert state.select({"a": 5}, [9]) == {"a": 5}
    assert state.batch_size(tree(4)) == 4


def test_concat_undoes_select():
    a = tree()
    assert_same(state.concat([state.select(a, [0]), state.select(a, [1, 2])]), a)


def test_concat_names_what_differs():
    with pytest.raises(ValueError, match=r"layers\.0\.position: 7 in one state and 8 in another"):
        state.concat([tree(), tree(position=8)])
    with pytest.raises(ValueError, match="a: different dtypes"):
        state.concat([{"a": torch.ones(1)}, {"a": torch.ones(1).int()}])
    with pytest.raises(ValueError, match=r"a: the shapes .* differ beyond the batch"):
        state.concat([{"a": torch.ones(1, 2)}, {"a": torch.ones(1, 3)}])
    with pytest.raises(ValueError, match="no trees"):
        state.concat([])


def test_nbytes():
    assert state.nbytes({"a": torch.ones(3, 2), "b": [torch.ones(4).bfloat16(), 5]}) == 24 + 8


# ------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("dtype", FLOATS + OTHERS, ids=str)
def test_round_trip_keeps_every_bit(tmp_path, dtype):
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (3, 64), dtype=torch.uint8)
    tensor = raw.view(dtype)  # any bit pattern: NaNs with payloads, subnormals, -0
    saved = {"x": tensor, "zero": torch.zeros((), dtype=dtype), "rest": tree()}
    state.save(saved, tmp_path / "s", {"note": "ü"})
    assert_same(state.load(tmp_path / "s", like=saved), saved)
    assert state.read_metadata(tmp_path / "s") == {"note": "ü"}


def test_round_trip_of_strided_and_aliased_tensors(tmp_path):
    base = torch.randn(4, 6)
    saved = (base, base, base.T[::2], base[1:], base[:, :1].expand(4, 5), base.requires_grad_())
    state.save(saved, tmp_path / "s")
    assert_same(state.load(tmp_path / "s", like=saved), state.detach(saved))


@pytest.mark.parametrize("root", [torch.ones(2), 5, (), {}, None, {"__metadata__": torch.ones(1)}])
def test_any_root_is_a_tree(tmp_path, root):
    state.save(root, tmp_path / "s")
    assert_same(state.load(tmp_path / "s", like=root), root)


def test_the_batch_may_differ_from_the_template_and_values_come_from_the_file(tmp_path):
    saved = tree(batch=5, position=99)
    state.save(saved, tmp_path / "s")
    assert_same(state.load(tmp_path / "s", like=tree(batch=1)), saved)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": torch.ones(2, 3).double()}, r"a expected a float64 tensor \[batch, 3\], found a fl"),
        ({"a": torch.ones(2, 4)}, r"at a expected .*\[batch, 4\], found .*\[batch, 3\]"),
        ({"a": 1}, "at a expected a leaf of type int, found a float32 tensor"),
        ({"b": torch.ones(2, 3)}, r"root of the tree expected a dict of \(b\), found .*\(a\)"),
        ([torch.ones(2, 3)], "expected a list of 1, found a dict"),
        (Memory(torch.ones(2, 3), torch.ones(1)), "expected a namedtuple"),
    ],
)
def test_a_template_that_disagrees_is_refused(tmp_path, like, message):
    state.save({"a": torch.ones(2, 3)}, tmp_path / "s")
    with pytest.raises(ValueError, match=message) as error:
        state.load(tmp_path / "s", like=like)
    assert str(tmp_path / "s") in str(error.value)
    assert "configuration" in str(error.value)


def test_every_flipped_byte_and_every_truncation_is_noticed(tmp_path):
    saved = {"a": torch.arange(6).reshape(2, 3).bfloat16(), "n": 3}
    path = tmp_path / "s"
    state.save(saved, path, {"k": "v"})
    whole = path.read_bytes()
    noticed = 0
    for at in range(len(whole)):
        for mask in (0x01, 0x20, 0x80):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
            try:
                loaded = state.load(path, like=saved)
            except ValueError as error:
                noticed += str(path) in str(error)
            else:  # only a change without meaning may pass, e.g. in the header's padding
                assert_same(loaded, saved)
    assert noticed > 2.9 * len(whole)
    for size in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="restore it from a copy"):
            state.load(path, like=saved)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="damaged"):
        state.load(path, like=saved)


def test_other_files_are_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="no nestlearn state"):
        state.load(tmp_path / "other", like={"a": torch.ones(1)})
    with pytest.raises(FileNotFoundError, match="absent"):
        state.load(tmp_path / "absent", like=1)
    with pytest.raises(ValueError, match=r"a: safetensors cannot hold torch\.complex128"):
        state.save({"a": torch.ones(1, dtype=torch.complex128)}, tmp_path / "s")
    with pytest.raises(ValueError, match=r"a\.b: two leaves have this path"):
        state.save({"a.b": 1, "a": {"b": 2}}, tmp_path / "s")
    with pytest.raises(ValueError, match="must be str"):
        state.save(1, tmp_path / "s", {"a": 1})
    assert not (tmp_path / "s").exists()


# ------------------------------------------------------------------------------- atomic_write


def test_atomic_write_leaves_only_the_file(tmp_path):
    state.atomic_write(tmp_path / "f", lambda temp: temp.write_text("old"))
    state.atomic_write(tmp_path / "f", lambda temp: temp.write_text("new"))
    assert (tmp_path / "f").read_text() == "new"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
def test_atomic_write_undoes_a_failure(tmp_path, error):
    (tmp_path / "f").write_text("old")

    def fail(temp):
        temp.write_text("half")
        raise error

    with pytest.raises(type(error)):
        state.atomic_write(tmp_path / "f", fail)
    assert (tmp_path / "f").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("stage", ["write", "fsync"])
def test_a_full_disk_is_named_with_the_remedy(tmp_path, monkeypatch, stage):
    path = tmp_path / "f"
    path.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if stage == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="free some space") as error:
        state.atomic_write(path, full if stage == "write" else lambda temp: temp.write_text("new"))
    assert error.value.errno == errno.ENOSPC
    assert str(path) in str(error.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_safetensors_own_disk_errors_are_oserrors_too(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does the folder .* exist"):
        state.atomic_write(
            tmp_path / "absent" / "f", lambda temp: save_file({"a": torch.ones(1)}, temp)
        )


def test_atomic_write_of_a_folder(tmp_path):
    def write(temp):
        (temp / "sub").mkdir(parents=True)
        (temp / "sub" / "file").write_text("x")

    state.atomic_write(tmp_path / "d", write)
    assert (tmp_path / "d" / "sub" / "file").read_text() == "x"
    with pytest.raises(OSError, match="Directory not empty"):
        state.atomic_write(tmp_path / "d", write)
    assert os.listdir(tmp_path) == ["d"]
