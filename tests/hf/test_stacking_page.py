"""The code of docs/stacking.md runs in its order, with a tiny model in place of the named one."""

import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import commands
from nestlearn.learn import Session

PAGE = (Path(__file__).parents[2] / "docs/stacking.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


def test_the_pages_code_runs(tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    commands.texts(tmp_path)
    commands.pretrained(tmp_path / "base")
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        given = kind.from_pretrained
        monkeypatch.setattr(kind, "from_pretrained", lambda name, given=given: given("base"))
    studied = []  # by a model of random words there is nothing to study
    monkeypatch.setattr(Session, "study", lambda session, text: studied.append(text))

    text = torch.randint(0, 256, (2, 24))
    names = {"ids": text[:1], "memory": None, "mask": torch.ones(1, 24), "two_prompts": text}
    names["ids_not_to_forget"] = text[1]
    assert len(BLOCKS) == 5
    for block in BLOCKS:
        block = block.replace("steps=100", "steps=1, length=16")
        exec(block.replace("(model, strength", "(model, 4, 16, strength"), names)
        names |= {"alice": names["session"].memory, "bob": names["session"].memory}
    assert (tmp_path / "memories/mine/memory.json").is_file()
    assert studied == [(tmp_path / "diary.txt").read_text()]
