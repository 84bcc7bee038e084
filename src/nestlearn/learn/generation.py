"""What the options of a model's `generate` ask for, looked at before anything is generated."""

from __future__ import annotations

from typing import Any

from torch import nn

_INPUTS = ("input_ids", "inputs", "inputs_embeds")


def check_options(base: Any, options: dict[str, Any], *, one: bool = False) -> None:
    """ValueError for an option that a session cannot honour; one: a single reply is wanted."""
    if given := [name for name in _INPUTS if options.get(name) is not None]:
        raise ValueError(f"{given[0]}=...: the prompt is the first argument; leave it out")
    if _option(base, options, "return_dict_in_generate"):
        raise ValueError(
            "return_dict_in_generate=True: a session returns texts or ids; for the rest call "
            "StackedModel.generate(ids, session.memory, ...)"
        )
    count = _option(base, options, "num_return_sequences") or 1
    if one and count != 1:
        raise ValueError(f"num_return_sequences={count}: a chat has one reply; leave it out")


def fits(base: Any, length: int, options: dict[str, Any]) -> bool:
    """Whether a prompt of so many tokens, and what is to follow it, are within the positions."""
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return positions is None or _needed(base, length, options) <= positions


def check_room(base: Any, length: int, options: dict[str, Any]) -> None:
    """ValueError where a model with a table of positions would be asked for one beyond it.

    Rotary positions have no such end: there the model's own `generate` decides.
    """
    if fits(base, length, options) or not _has_table(base):
        return
    positions = base.config.get_text_config().max_position_embeddings
    room = positions + 1 - length
    remedy = f"ask for at most {room} (max_new_tokens)" if room > 0 else "shorten the prompt"
    raise ValueError(
        f"a prompt of {length} tokens and {_needed(base, length, options) + 1 - length} new ones "
        f"are more than the model's {positions} positions: {remedy}"
    )


def _needed(base: Any, length: int, options: dict[str, Any]) -> int:
    """How many tokens the model reads in all; the last new one is not read."""
    if (new := _option(base, options, "max_new_tokens")) is not None:
        return length + int(new) - 1
    longest = options.get("max_length")  # without one, transformers stops at the last position
    return max(length, length if longest is None else int(longest) - 1)


def _option(base: Any, options: dict[str, Any], name: str) -> Any:
    """An option's value: as given, else as the generation's configuration says."""
    if options.get(name) is not None:
        return options[name]
    config = options.get("generation_config") or getattr(base, "generation_config", None)
    return getattr(config, name, None)


def _has_table(base: Any) -> bool:
    """Whether positions are learned one by one (GPT-2): an embedding that is not the words'."""
    positions = base.config.get_text_config().max_position_embeddings
    words = base.get_input_embeddings()
    tables = (part for part in base.modules() if isinstance(part, nn.Embedding))
    return any(part is not words and len(part.weight) >= positions for part in tables)
