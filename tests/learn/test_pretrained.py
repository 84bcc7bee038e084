"""A pretrained model of stories reads a novel: what it learns lasts, also in another process.

Needs stories260K.bin and tok512.bin of llama2.c, and novels, in ../shared/data beside the
repository.
"""

import gzip
from pathlib import Path

import pytest
import torch

from nestlearn import DeltaLevel, Session, stack_levels
from nestlearn.hf.llama2c import Llama2cTokenizer, load_llama2c
from servers import elsewhere

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
MODELS = DATA / "models"
pytestmark = pytest.mark.skipif(
    not (MODELS / "stories260K.bin").is_file(),
    reason=f"the pretrained stories model is not in {MODELS}",
)
# The first sentences of the 200 greedy tokens printed in llama2.c's doc/stories260K.md.
GREEDY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)


def words():
    return Llama2cTokenizer(MODELS / "tok512.bin")


def novel(begin, size):
    text = gzip.decompress((DATA / "books" / "dracula.txt.gz").read_bytes()).decode()
    return text[30_000 + begin : 30_000 + begin + size]


def reader(memory=None):
    levels = [DeltaLevel(64, lr=0.1, rule="gd"), DeltaLevel(512, lr=0.05, rule="gd")]
    model = stack_levels(load_llama2c(MODELS / "stories260K.bin"), levels)
    return Session(model, memory, words())


def test_the_conversion_is_llama2cs():
    model, tokenizer = load_llama2c(MODELS / "stories260K.bin"), words()
    assert tokenizer.encode("Once upon a time") == [1, 403, 407, 261, 378]
    assert tokenizer.decode(tokenizer.encode("Ça va, Lily?\n")) == "Ça va, Lily?\n"
    made = model.generate(torch.tensor([[1]]), max_new_tokens=80, do_sample=False)
    assert tokenizer.decode(made[0].tolist()).startswith(GREEDY)
    bad = MODELS / "tok512.bin"
    with pytest.raises(ValueError, match=r"tok512\.bin"):
        load_llama2c(bad)


def perplexity(memory):
    return reader(memory).perplexity(novel(14_000, 3_000))


def test_a_novel_is_learned_and_remembered_by_another_process(tmp_path):
    one = reader(tmp_path / "dracula")
    ahead = novel(14_000, 3_000)
    before = one.perplexity(ahead)
    one.learn(novel(0, 14_000), source="dracula")
    after = one.perplexity(ahead)
    assert after < 0.65 * before  # it never read that part
    one.save()
    assert elsewhere(perplexity, tmp_path / "dracula") == pytest.approx(after, rel=1e-5)
