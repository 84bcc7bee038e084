"""The weights in the package: those that were measured, and a memory that lasts.

`nestlearn reproduce tiny --data FOLDER` trains them and, alike, a Transformer.
"""

import json
import lzma
import math
import sys
from pathlib import Path

import pytest
import torch

from nestlearn import HopeLM, state
from nestlearn.experiments.books import FAR, NEAR, surprise
from nestlearn.hf import HopeForCausalLM
from servers import elsewhere

NAME = "nestlearn/tiny"
RESULTS = Path(__file__).parents[2] / "results/tiny/results.json"
SENTENCE = "The old house of Quornvale stood alone on the hill. "
ASKED = "They walked for hours to see the house of Quornvale"


def ids(text: str | bytes) -> torch.Tensor:
    return torch.tensor([list(text.encode() if isinstance(text, str) else text)])


@pytest.fixture(scope="module")
def model() -> HopeLM:
    return HopeLM.from_pretrained(NAME).float().eval()


def likely(model: HopeLM, memory=None) -> float:
    """Log-probability of the made-up name, after what the memory has read."""
    text = ids(ASKED)
    with torch.no_grad():
        logits, _ = model(text[:, :-1], memory)
    chosen = logits.log_softmax(-1).gather(-1, text[:, 1:, None])[0, :, 0]
    return float(chosen[-len("Quornvale") :].sum())


def likely_after(file) -> float:
    model = HopeLM.from_pretrained(NAME).float().eval()
    return likely(model, state.load(file, like=model.init_state(1)))


def test_unread_books_are_as_surprising_as_was_measured(model, shared_data, unchecked):
    """These are the weights of the results, and below the Transformer of the same training: in the
    first tenth of its stream, and in windows of four times the trained length.
    """
    book = lzma.decompress((shared_data / "gutenberg/test.txt.xz").read_bytes())
    recorded = {
        (r["model"], r["metric"]): r for r in json.loads(RESULTS.read_text()) if r["task"] == "0.8M"
    }
    ours, others = (recorded[name, NEAR]["detail"]["tenths"] for name in ("Hope", "Transformer"))
    read = bits(model, book[:10_001])
    assert read == pytest.approx(ours[0], abs=0.01)
    assert read < others[0]
    windows = torch.tensor(list(book[1_000_000:1_016_384])).view(4, 4096)
    with torch.no_grad():
        logits, _ = model(windows[:, :-1])
    nats = float(torch.nn.functional.cross_entropy(logits.mT, windows[:, 1:]))
    assert nats / math.log(2) < recorded["Transformer", FAR]["value"]


def bits(model: HopeLM, text: bytes) -> float:
    """Bits a byte of a text, the memory carried."""
    return float(surprise(model, ids(text), 8192).mean()) / math.log(2)


def test_a_name_read_in_one_process_is_likelier_in_another(model, tmp_path):
    before = likely(model)
    with torch.no_grad():
        _, memory = model(ids(SENTENCE * 4))
    state.save(memory, tmp_path / "memory.safetensors")
    after = elsewhere(likely_after, tmp_path / "memory.safetensors")
    assert after == pytest.approx(likely(model, memory), abs=1e-3)
    assert after > before + math.log(10)


def test_a_folder_of_that_name_comes_first(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    HopeLM(model.config).save_pretrained(tmp_path / NAME)
    assert not torch.equal(HopeLM.from_pretrained(NAME).embed.weight, model.embed.weight)
    for kind in (HopeLM, HopeForCausalLM):  # this one would ask the network
        with pytest.raises(FileNotFoundError, match="give a folder"):
            kind.from_pretrained("nestlearn/large")


def test_a_mistyped_name_is_refused_at_once(monkeypatch, call):
    """No library is loaded, and no network asked: none could have it."""
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    for args, message in (
        (
            ("generate", "nestlearn/tinny", "--prompt", "a"),
            "no model 'nestlearn/tinny': the",
        ),
        (("levels", "nestlearn/tinny"), "the package has 'nestlearn/tiny'"),
        (("stack", "nestlearn/tinny", "--out", "none"), "the package has 'nestlearn/tiny'"),
        (("serve", "nestlearn/tinny"), "the package has 'nestlearn/tiny'"),
        (("serve", "stackd/"), "no file or folder stackd/, and no name of the hub"),
        (("generate", "smol", "--prompt", "a"), "finished training run, or nestlearn/tiny"),
        (("learn", "smol", "--data", "x", "--memory", "m"), "no stacked model in smol; make one"),
        (("memory", "list", "smol"), "no stacked model in smol; make one"),
    ):
        code, _, said = call(*args)
        assert (code, message in said, said.count("\n")) == (2, True, 1), said


def test_commands_and_transformers_know_it(model, call):
    from nestlearn.hf import HopeForCausalLM

    assert torch.equal(
        HopeForCausalLM.from_pretrained(NAME).model.embed.weight.float(), model.embed.weight
    )
    code, said, _ = call("generate", NAME, "--prompt", "The old house", "--tokens", 5)
    assert code == 0
    assert said.startswith("The old house")
    assert call("levels", NAME)[0] == 0
