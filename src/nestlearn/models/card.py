"""The model card of a saved Hope: what it is, how it was trained, how to load it."""

from __future__ import annotations

import json
from pathlib import Path

from .._version import __version__
from ..disk import atomic_write
from .config import HopeConfig

CARD = "README.md"

_TEXT = """---
library_name: nestlearn
pipeline_tag: text-generation
tags: [nested-learning, hope]
---

# A Hope of {parameters:,} parameters

A causal language model whose memories learn while it reads: {layers} blocks of width {dim}, each a
{mixer} mixer and a {channel} channel, over {vocab:,} tokens. Saved by nestlearn {version}. What it
has read is in its state, not in these files.

## How it was trained

{trained}

## How to load it

```python
from nestlearn import HopeLM

model = HopeLM.from_pretrained("FOLDER")  # this folder
```

`nestlearn generate FOLDER --prompt "..."` continues a text; `nestlearn doctor --model FOLDER` says
what memory it needs. With `import nestlearn.hf`, transformers' Auto classes load it, too.

## Configuration

```json
{config}
```
"""


def write_card(folder: Path, config: HopeConfig, parameters: int, trained: str = "") -> None:
    """Write README.md into the folder of a model; one that is there stays as it is."""
    if (folder / CARD).exists():
        return
    text = _TEXT.format(
        parameters=parameters, layers=config.layers, dim=config.dim, vocab=config.vocab_size,
        mixer=type(config.mixer).__name__, channel=type(config.channel).__name__,
        version=__version__, trained=trained or "Not recorded.",
        config=json.dumps(config.to_dict(), indent=2),
    )  # fmt: skip
    atomic_write(folder / CARD, lambda path: path.write_text(text, encoding="utf-8"))
