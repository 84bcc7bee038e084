"""What the tests of sessions share: a tiny stacked model, and a tokenizer of letters."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn import DeltaLevel, Session, stack_levels

LETTERS = "\0^abcdefghijklmnopqrstuvwxyz .:\nUA"


class Letters:
    """One token a letter; ^ begins a text."""

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [max(LETTERS.find(c), 2) for c in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(LETTERS[i] for i in ids if i > 1 or not skip_special_tokens)


def base(seed=0):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(LETTERS),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    return model


LEVELS = (DeltaLevel(4, lr=0.3, rule="dgd"), DeltaLevel(16, lr=0.1, rule="momentum"))


def stacked(seed=0, levels=LEVELS, **options):
    return stack_levels(base(seed), list(levels), window=24, **options)


def session(model=None, memory=None, **options):
    return Session(stacked() if model is None else model, memory, Letters(), **options)


def ids(length, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(2, len(LETTERS), (1, length), generator=draw)
