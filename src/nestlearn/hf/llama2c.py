"""Tiny pretrained Llamas from llama2.c's checkpoints ("version 0", .bin), as transformers models.

A checkpoint is a header of seven int32 (dim, hidden, layers, heads, key/value heads, vocabulary,
length), then float32 arrays [out, in], all layers of one kind together. It rotates neighbouring
pairs of a head where transformers rotates its halves, so the rows of q and k are reordered.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def load_llama2c(path: str | Path) -> LlamaForCausalLM:
    """The checkpoint as a LlamaForCausalLM in float32; ValueError for a file of another size."""
    raw = Path(path).read_bytes()
    if len(raw) < 28:
        raise ValueError(f"{path} has {len(raw)} bytes: no llama2.c checkpoint")
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", raw[:28])
    tied, vocab = vocab > 0, abs(vocab)
    if min(dim, hidden, layers, heads, kv_heads, vocab, length) < 1 or dim % heads:
        raise ValueError(f"{path}: its header is no llama2.c checkpoint's")
    kv = dim // heads * kv_heads
    floats = vocab * dim * (1 if tied else 2) + dim + length * (dim // heads)
    floats += layers * (2 * dim + 2 * dim * dim + 2 * kv * dim + 3 * hidden * dim)
    if len(raw) != 28 + 4 * floats:
        raise ValueError(f"{path} has {len(raw)} bytes: its header asks for {28 + 4 * floats}")
    config = LlamaConfig(
        hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, vocab_size=vocab,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length,
        rms_norm_eps=1e-5, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    values = torch.from_numpy(np.frombuffer(raw, "<f4", offset=28).copy())
    weights = dict(_arrays(values, config))
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model


def _arrays(values: Tensor, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """The arrays in the file's order, under transformers' names."""
    dim, hidden, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv_heads, layers = config.num_key_value_heads, config.num_hidden_layers
    assert kv_heads is not None
    kv, at = dim // heads * kv_heads, 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return values[at - size : at].view(shape)

    yield "model.embed_tokens.weight", take(config.vocab_size, dim)
    for name, *shape in (
        ("input_layernorm", dim),
        ("self_attn.q_proj", dim, dim),
        ("self_attn.k_proj", kv, dim),
        ("self_attn.v_proj", kv, dim),
        ("self_attn.o_proj", dim, dim),
        ("post_attention_layernorm", dim),
        ("mlp.gate_proj", hidden, dim),
        ("mlp.down_proj", dim, hidden),
        ("mlp.up_proj", hidden, dim),
    ):
        turned = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
        for layer, array in enumerate(take(layers, *shape)):
            if turned:
                array = array.view(turned, -1, 2, dim).transpose(1, 2).reshape(-1, dim)
            yield f"model.layers.{layer}.{name}.weight", array
    yield "model.norm.weight", take(dim)
    take(config.max_position_embeddings, dim // heads)  # cosines and sines, which follow from
    if not config.tie_word_embeddings:  # the configuration
        yield "lm_head.weight", take(config.vocab_size, dim)


FILE = "llama2c_tokenizer.bin"  # its name beside a saved model


class Llama2cTokenizer:
    """llama2.c's tokenizer.bin: byte pair merges by score, with bytes for unknown characters."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, path: str | Path):
        self._raw = raw = Path(path).read_bytes()
        at = 4
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        while at < len(raw):
            score, size = struct.unpack_from("<fi", raw, at)
            self.pieces.append(raw[at + 8 : at + 8 + size])
            self.scores.append(score)
            at += 8 + size
        self.numbers = {piece: i for i, piece in enumerate(self.pieces)}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with the special ones, the text's start (1) stands first."""
        ids = [self.numbers[b" "]] if text else []
        for char in text:
            raw = char.encode()
            ids += [self.numbers[raw]] if raw in self.numbers else [byte + 3 for byte in raw]
        # Merging the best pair first, line by line: pairs never reach over a newline.
        newline, lines, start = 10 + 3, [], 0
        for i, token in enumerate([*ids, newline]):
            if token == newline:
                lines.append(self._merge(ids[start:i]))
                start = i + 1
        merged = [token for line in lines for token in (*line, newline)][:-1]
        return [self.bos_token_id, *merged] if add_special_tokens else merged

    def _merge(self, ids: list[int]) -> list[int]:
        while True:
            best = (-float("inf"), -1, -1)
            for i in range(len(ids) - 1):
                joined = self.numbers.get(self.pieces[ids[i]] + self.pieces[ids[i + 1]])
                if joined is not None and self.scores[joined] > best[0]:
                    best = (self.scores[joined], i, joined)
            if best[1] < 0:
                return ids
            ids = [*ids[: best[1]], best[2], *ids[best[1] + 2 :]]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; broken UTF-8 becomes the replacement character."""
        special = (self.bos_token_id, self.eos_token_id)
        text = b"".join(
            bytes([i - 3]) if 3 <= i < 259 else self.pieces[i]
            for i in ids
            if not (skip_special_tokens and i in special)
        ).decode(errors="replace")
        return text.removeprefix(" ") if ids[:1] == [self.bos_token_id] else text

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it beside a model, as `FILE`."""
        (Path(folder) / FILE).write_bytes(self._raw)


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer beside a saved model: this one, or transformers' own."""
    if (folder / FILE).is_file():
        return Llama2cTokenizer(folder / FILE)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
