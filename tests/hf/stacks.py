"""Tiny models of random weights, of every family that can be stacked."""

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 48
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox",
    "phi", "phi3",
)  # fmt: skip
SPECIAL = {
    "mistral": {"sliding_window": 7},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 7},
    "gemma3_text": {"head_dim": 8, "sliding_window": 7},
    "gpt2": {"n_inner": 24},
}


def tiny(family="llama", dtype=torch.float32, layers=2, seed=0, **options):
    """A model of width 16 with `layers` blocks, 4 heads, a vocabulary of 48 and 64 positions."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": layers, "num_attention_heads": 4, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if family not in ("gpt2", "gpt_neox"):
        sizes["num_key_value_heads"] = 2
    config = CONFIG_MAPPING[family](**{**sizes, **SPECIAL.get(family, {})})
    model = AutoModelForCausalLM.from_config(config, **options)
    with torch.no_grad():  # sharper than a fresh model's, so that errors would show
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.25)
    return model.to(dtype).eval()


def tokens(batch, length, seed=0):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
