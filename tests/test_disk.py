"""Files are whole or absent on systems that are not ours, by their ways of refusing."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from nestlearn import disk
from nestlearn.train import run


@pytest.fixture
def windows(monkeypatch):
    """Opens no folders, syncs nothing that is open for reading only, has no O_DIRECTORY."""
    opened, really_open, really_sync = {}, os.open, os.fsync

    def open_(path, flags, *mode, **options):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        handle = really_open(path, flags, *mode, **options)
        opened[handle] = flags
        return handle

    def sync(handle):
        if opened[handle] & os.O_RDWR == 0:
            raise OSError(errno.EBADF, "Bad file descriptor")
        really_sync(handle)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.delattr(os, "O_DIRECTORY", raising=False)
    monkeypatch.setattr(disk, "WINDOWS", True)


def both(folder):
    """A file, over an old one; and a folder of two."""

    def make(temp):
        (temp / "in").mkdir(parents=True)
        (temp / "a").write_text("one")
        (temp / "in/b").write_text("two")

    for text in ("old", "new"):
        disk.atomic_write(folder / "file", lambda temp, text=text: temp.write_text(text))
    disk.atomic_write(folder / "made", make)
    assert (folder / "file").read_text() == "new"
    assert (folder / "made/in/b").read_text() == "two"
    assert sorted(p.name for p in folder.iterdir()) == ["file", "made"]


def test_where_folders_cannot_be_opened(windows, tmp_path):
    both(tmp_path)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.ENOTSUP])
def test_where_folders_cannot_be_synced(monkeypatch, tmp_path, code):
    really = os.fsync

    def sync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        really(handle)

    monkeypatch.setattr(os, "fsync", sync)
    both(tmp_path)


@pytest.mark.parametrize("name", ["a:b", "what?", "nul", "com1.txt", "end.", "end ", "a\tb", "c|d"])
def test_names_that_windows_does_not_take(windows, tmp_path, name):
    with pytest.raises(ValueError, match="no file name on Windows: leave out"):
        disk.atomic_write(tmp_path / name / "memory.json", lambda temp: temp.write_text("x"))
    assert not list(tmp_path.iterdir())


def test_names_that_only_windows_refuses(tmp_path):
    disk.atomic_write(tmp_path / "a:b", lambda temp: temp.write_text("x"))
    assert (tmp_path / "a:b").read_text() == "x"


def test_auto_takes_apples_gpu_where_it_works(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert run.resolve_device("auto").type == "cpu"  # said to be there, and fails when it is used
    monkeypatch.setattr(run, "_apple_works", lambda: True)
    assert run.resolve_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run.resolve_device("auto").type == "cuda"
