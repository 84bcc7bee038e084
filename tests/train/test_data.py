"""Text becomes tokens without loss, and a batch depends on (seed, step) alone."""

import gzip
import importlib
import json
import math
import os
import re
import sys

import pytest
import torch

from nestlearn.train import Corpus, load_text, stdlib_text
from nestlearn.train.data import ByteTokenizer, load_tokenizer


def corpus_of(tokens=1000, val=200) -> Corpus:
    return Corpus(torch.arange(tokens) % 256, torch.arange(val) % 256, vocab_size=256)


def text_of(tokens: torch.Tensor) -> str:
    return ByteTokenizer().decode(tokens.tolist())


@pytest.fixture
def word_tokenizer(tmp_path):
    tokenizers = importlib.import_module("tokenizers")
    words = {"[UNK]": 0, "one": 1, "two": 2, "three": 9}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


# ------------------------------------------------------------------------------------ batches


def test_a_batch_is_a_pure_function_of_seed_and_step():
    corpus = corpus_of()
    a = corpus.batch(5, 4, 16, seed=1)
    corpus.batch(6, 4, 16, seed=1)
    torch.manual_seed(123)
    assert torch.equal(a, corpus.batch(5, 4, 16, seed=1))
    assert not torch.equal(a, corpus.batch(6, 4, 16, seed=1))
    assert not torch.equal(a, corpus.batch(5, 4, 16, seed=2))
    assert a.dtype == torch.int64
    assert a.shape == (4, 17)


def test_a_batch_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    corpus_of().batch(0, 2, 8, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_windows_are_contiguous_text_and_every_offset_is_drawn():
    corpus = corpus_of(tokens=20)
    ids = corpus.batch(0, 500, 15, seed=0)
    assert torch.equal(ids - ids[:, :1], torch.arange(16).expand(500, 16))
    assert set(ids[:, 0].tolist()) == {0, 1, 2, 3, 4}


def test_validation_windows_are_evenly_spaced_and_fixed():
    windows = corpus_of(val=101).val_windows(5, 20)
    assert windows[:, 0].tolist() == [0, 20, 40, 60, 80]
    assert windows[-1, -1] == 100
    assert corpus_of(val=21).val_windows(3, 20)[:, 0].tolist() == [0, 0, 0]


def test_short_text_and_wrong_tokens_are_refused():
    corpus = corpus_of(tokens=10, val=5)
    with pytest.raises(ValueError, match=r"train text has 10 tokens.*length \+ 1 = 11"):
        corpus.batch(0, 1, 10, seed=0)
    assert corpus.batch(0, 1, 9, seed=0).tolist() == [list(range(10))]
    with pytest.raises(ValueError, match=r"val text has 5 tokens.*val_fraction"):
        corpus.val_windows(2, 5)
    with pytest.raises(ValueError, match=r"ids from 0 to 255, outside vocab_size=10"):
        Corpus(torch.arange(256), torch.arange(3), vocab_size=10)
    with pytest.raises(ValueError, match="integer ids"):
        Corpus(torch.ones(4), torch.arange(3), vocab_size=10)


# ------------------------------------------------------------------------------------- files


def test_few_files_give_their_tails_to_validation(tmp_path):
    for name, char in (("b.txt", "b"), ("a.txt", "a")):
        (tmp_path / name).write_text(char * 90 + char.upper() * 10)
    corpus = load_text([tmp_path], val_fraction=0.1)
    assert load_text(tmp_path, val_fraction=0.1).val_bytes == corpus.val_bytes
    assert load_text(str(tmp_path), val_fraction=0.1).val_bytes == corpus.val_bytes
    assert text_of(corpus.train) == "a" * 90 + "b" * 90
    assert text_of(corpus.val) == "A" * 10 + "B" * 10
    assert (corpus.train_bytes, corpus.val_bytes, corpus.files) == (180, 20, 2)
    assert corpus.train.dtype == torch.uint8


def test_many_files_are_split_by_file(tmp_path):
    texts = {f"file {i:02d};" * 5 for i in range(40)}
    for i, text in enumerate(sorted(texts)):
        (tmp_path / f"{i:02d}.txt").write_text(text)
    splits = [load_text([tmp_path], val_fraction=0.1, seed=seed) for seed in (0, 0, 1)]
    cut = len(next(iter(texts)))
    for corpus in splits:
        train, val = text_of(corpus.train), text_of(corpus.val)
        parts = [t[i : i + cut] for t in (train, val) for i in range(0, len(t), cut)]
        assert sorted(parts) == sorted(texts)
        assert len(val) == 4 * cut
    assert torch.equal(splits[0].val, splits[1].val)
    assert not torch.equal(splits[0].val, splits[2].val)


def test_a_tiny_share_still_holds_one_file_out(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("x" * (10 + i))
    assert load_text([tmp_path], val_fraction=0.001).val_bytes == 10


def test_the_cut_never_splits_a_character(tmp_path):
    (tmp_path / "a.txt").write_text("€" * 100, encoding="utf-8")
    for share in (0.1, 0.103, 0.107):
        corpus = load_text([tmp_path], val_fraction=share)
        assert set(text_of(corpus.train) + text_of(corpus.val)) == {"€"}


def test_folders_skip_what_is_no_text_and_count_it(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "good.txt").write_text("good" * 10)
    (tmp_path / "sub" / "good.txt.gz").write_bytes(gzip.compress(b"zips" * 10))
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"x" * 100)[:-9])
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "binary").write_bytes(b"ab\0cd")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "text").write_text("never seen")
    (tmp_path / "empty.txt").write_text("")
    corpus = load_text([tmp_path], val_fraction=0.5)
    assert text_of(corpus.train) == "good" * 5 + "zips" * 5
    assert corpus.skipped == 4


def test_links_are_read_once_and_loops_end(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    (data / "sub").mkdir(parents=True)
    other.mkdir()
    (data / "a.txt").write_text("a" * 40)
    (other / "b.txt").write_text("b" * 40)
    (tmp_path / "c.txt").write_text("c" * 40)
    (data / "linked").symlink_to(other, target_is_directory=True)
    (data / "again").symlink_to(other, target_is_directory=True)
    (data / "c.txt").symlink_to(tmp_path / "c.txt")
    (data / "sub" / "loop").symlink_to(data, target_is_directory=True)
    (data / "broken.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(data / "pipe")
    corpus = load_text([data], val_fraction=0.5)
    assert text_of(corpus.train) == "a" * 20 + "b" * 20 + "c" * 20
    assert (corpus.files, corpus.skipped) == (3, 2)
    assert all("is a link to nothing, or no file" in why for why in corpus.no_text)
    (tmp_path / "alias").symlink_to(data, target_is_directory=True)
    assert load_text([tmp_path / "alias"]).files == 3


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + b"ab" * 10)
    (tmp_path / "marked.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + b"cd" * 10))
    corpus = load_text([tmp_path], val_fraction=0.5)
    assert text_of(corpus.train) == "cd" * 5 + "ab" * 5


def test_what_is_no_text_is_named_with_the_reason(tmp_path):
    whole = gzip.compress(b"text " * 100)
    for name, content, why in (
        ("latin.txt", b"ab\xe9 cd", "byte 2 of 6"),
        ("cut.txt", "ab€".encode()[:-1], "byte 2 of 4"),
        ("wide.txt", "text".encode("utf-16"), "byte 0 of 10"),
        ("zeros.txt", b"ab\0", "zero bytes"),
        ("cut.gz", whole[:-9], "damaged .gz"),
        ("more.gz", whole + b"rest", "damaged .gz"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(name)} is .*{why}"):
            load_text([tmp_path / name])
    with pytest.raises(ValueError, match=r"6 files skipped .*cut\.gz is a damaged"):
        load_text([tmp_path])


@pytest.mark.parametrize("name", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "uint64"])
def test_every_integer_type_is_tokens(name):
    tokens = torch.arange(100)
    corpus = Corpus(tokens.to(getattr(torch, name)), tokens.to(getattr(torch, name)), 100)
    expected = Corpus(tokens, tokens, 100)
    assert torch.equal(corpus.batch(3, 4, 8, 0), expected.batch(3, 4, 8, 0))
    assert torch.equal(corpus.val_windows(3, 8), expected.val_windows(3, 8))
    assert corpus.describe()["train_tokens"] == 100
    with pytest.raises(ValueError, match="ids from 0 to 99, outside vocab_size=99"):
        Corpus(tokens.to(getattr(torch, name)), tokens, 99)


def test_bools_are_no_tokens():
    with pytest.raises(ValueError, match=r"train is a torch\.bool tensor"):
        Corpus(torch.ones(9, dtype=torch.bool), torch.arange(9), 10)


def test_a_file_met_twice_counts_once(tmp_path):
    (tmp_path / "a.txt").write_text("abcd" * 10)
    twice = load_text([tmp_path, tmp_path / "a.txt", tmp_path], val_fraction=0.5)
    assert twice.train.numel() + twice.val.numel() == 40


def test_clear_errors(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text; convert it"):
        load_text([tmp_path / "latin.txt"])
    with pytest.raises(FileNotFoundError, match="absent"):
        load_text([tmp_path / "absent"])
    with pytest.raises(ValueError, match="1 files skipped"):
        load_text([tmp_path])
    with pytest.raises(ValueError, match="no paths were given"):
        load_text([])
    with pytest.raises(ValueError, match="val_fraction=1"):
        load_text([tmp_path], val_fraction=1)


def test_description_follows_the_content_not_the_place(tmp_path):
    sums = []
    for name, text in (("a", "abc" * 30), ("b", "abc" * 30), ("c", "abd" * 30)):
        (tmp_path / name).write_text(text)
        sums.append(json.loads(json.dumps(load_text([tmp_path / name]).describe()))["sha256"])
    assert sums[0] == sums[1] != sums[2]


def test_the_standard_library_is_a_corpus():
    paths = stdlib_text()
    assert paths == sorted(paths) == stdlib_text()
    names = {path.name for path in paths}
    assert {"argparse.py", "dataclasses.py"} <= names
    banned = {"site-packages", "test", "tests", "idle_test"}
    assert not [p for p in paths if banned & set(p.parts)]
    corpus = load_text(paths[:60])
    assert corpus.files + corpus.skipped <= 60
    assert corpus.train.numel() > 100_000
    assert corpus.skipped == 0


# -------------------------------------------------------------------------------- tokenizers


def test_bytes_round_trip():
    coder = ByteTokenizer()
    assert coder.decode(coder.encode("naïve €")) == "naïve €"
    assert coder.decode([0xE2, 0x82]) == "�"


def test_bits_per_byte():
    corpus = Corpus(torch.zeros(8).int(), torch.zeros(4).int(), 2, train_bytes=16, val_bytes=2)
    assert corpus.bits_per_byte(math.log(2), "train") == pytest.approx(0.5)
    assert corpus.bits_per_byte(math.log(2), "val") == pytest.approx(2)
    assert corpus_of().bits_per_byte(1.0) is None


def test_a_tokenizer_file(tmp_path, word_tokenizer):
    (tmp_path / "a.txt").write_text("one two three " * 10)
    corpus = load_text([tmp_path / "a.txt"], val_fraction=0.5, tokenizer=word_tokenizer)
    assert corpus.vocab_size == 10  # the ids have gaps
    assert corpus.train.tolist() == [1, 2, 9] * 5
    assert corpus.train.dtype == torch.int32
    assert corpus.batch(0, 1, 4, seed=0).dtype == torch.int64
    assert corpus.train_bytes == 70
    model = tmp_path / "model"
    model.mkdir()
    corpus.tokenizer.save(model)
    again = load_tokenizer(model, vocab_size=10)
    assert again.encode("two one") == [2, 1]
    assert again.decode([1, 9]) == "one three"
    with pytest.raises(ValueError, match="vocab_size 9"):
        load_tokenizer(model, vocab_size=9)


def test_a_model_without_tokenizer_reads_bytes(tmp_path):
    assert load_tokenizer(tmp_path, vocab_size=256).name == "bytes"
    with pytest.raises(ValueError, match=r"put the tokenizer\.json"):
        load_tokenizer(tmp_path, vocab_size=5000)


def test_tokenizer_errors(tmp_path, monkeypatch, word_tokenizer):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match="absent"):
        load_text([tmp_path / "a.txt"], tokenizer=tmp_path / "absent.json")
    with pytest.raises(ValueError, match=r"a\.txt is no tokenizer\.json"):
        load_text([tmp_path / "a.txt"], tokenizer=tmp_path / "a.txt")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "nestlearn\[tokenizer\]"'):
        load_text([tmp_path / "a.txt"], tokenizer=word_tokenizer)
