"""Chats: each exchange is read once and learned from the chosen side, whatever a template does."""

import pytest
import torch
from jinja2 import Template
from people import LETTERS, Letters, base, ids, session, stacked
from transformers import GPT2Config, GPT2LMHeadModel

from nestlearn import DeltaLevel, Session, stack_levels

OPTIONS = {"max_new_tokens": 6, "do_sample": False}
SHORT = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
TURN = "{% if m.role == 'user' %}U{{ m.content }}:{% else %}A{{ body }}:{% endif %}"
TEMPLATES = {
    "plain": "{% for m in messages %}{% set body = m.content %}" + TURN + "{% endfor %}",
    # all but the newest reply lose what stands before the point
    "drops": "{% for m in messages %}{% set body = m.content if loop.last else "
    "m.content.split('.')[-1] %}" + TURN + "{% endfor %}",
    "adds": "{% for m in messages %}{% set body = ('z.' if loop.last else '') + m.content %}"
    + TURN + "{% endfor %}",
    "dated": "{{ messages | length }} {% for m in messages %}{% set body = m.content %}"
    + TURN + "{% endfor %}",
    "forgets": "{% for m in messages %}{% set body = m.content %}{% if loop.last %}"
    + TURN + "{% endif %}{% endfor %}",
}  # fmt: skip


class Templated(Letters):
    """Letters with a chat template; a colon ends a turn, A asks for a reply."""

    def __init__(self, template):
        self.chat_template = template

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        assert not tokenize
        text = Template(self.chat_template).render(messages=turns)
        return text + "A" * add_generation_prompt


class Ended(Letters):
    """Every text ends with a mark, too."""

    def encode(self, text, add_special_tokens=True):
        return super().encode(text, add_special_tokens) + [0] * add_special_tokens


def talk(one, said, side="user", messages=("hi there", "i am bob", "so long")):
    """What each exchange read and learned, where the model says `said`."""
    replies, seen, learn = iter(said), [], one.learn
    one.generate = lambda prompt, **options: torch.tensor([Letters().encode(next(replies), False)])

    def spy(tokens, mask=None, *, source=None):
        row = tokens[0].tolist()
        learned = [token for token, weight in zip(row, mask[0].tolist()) if weight]
        seen.append((Letters().decode(row), Letters().decode(learned)))
        return learn(tokens, mask, source=source)

    one.learn = spy
    for message in messages:
        one.chat(message, learn=side)
    return seen


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_exchange_is_read_once(name):
    said = ["why.hello:", "who.nice:", "end.bye:"]
    one = Session(stacked(), tokenizer=Templated(TEMPLATES[name]))
    seen = talk(one, said)
    first = "a " if name == "dated" else ""  # a number is no letter: it is read as an a
    assert seen == [
        (f"{first}Uhi there:Awhy.hello:", f"{first}Uhi there:A"),
        ("Ui am bob:Awho.nice:", "Ui am bob:A"),
        ("Uso long:Aend.bye:", "Uso long:A"),
    ]
    assert one.memory.position == sum(len(read) for read, _ in seen)
    assert [turn["content"] for turn in one.turns[1::2]] == said
    other = Session(stacked(), tokenizer=Templated(TEMPLATES[name]))
    assert [learned for _, learned in talk(other, said, "assistant")] == said


def test_a_reply_that_was_cut_is_closed_and_the_mark_is_nobodys():
    one = Session(stacked(), tokenizer=Templated(TEMPLATES["drops"]))
    seen = talk(one, ["why.hel", "nice:", "bye"], "both")
    assert [read for read, _ in seen] == [
        "Uhi there:Awhy.hel",
        ":Ui am bob:Anice:",
        "Uso long:Abye",
    ]
    assert seen[1][1] == "Ui am bob:Anice:"
    lines = Session(stacked(), tokenizer=Letters())
    assert [read for read, _ in talk(lines, [" hello", " nice", " bye"])][1:] == [
        "\nUser: i am bob\nAssistant: nice",
        "\nUser: so long\nAssistant: bye",
    ]


def test_what_was_read_in_between_closes_nothing():
    one = Session(stacked(), tokenizer=Templated(TEMPLATES["plain"]))
    options = {"max_new_tokens": 3, "do_sample": False}
    one.chat("hi", **options)
    one.learn(ids(5))
    before = one.memory.position
    one.chat("so long", **options)
    assert one.memory.position - before == len("Uso long:A") + 3
    twin = one.fork()
    twin.turns = []  # a new conversation
    before = twin.memory.position
    twin.chat("hi", **options)
    assert twin.memory.position - before == len("Uhi:A") + 3


def test_an_end_mark_stands_nowhere_but_at_an_end():
    plain, ended = session(), Session(stacked(), tokenizer=Ended())
    for one in (plain, ended):
        one.learn("the key is under the mat. ")
        one.chat("where is it", **OPTIONS)
        one.chat("say it again", **OPTIONS)
    assert ended.turns == plain.turns
    assert ended.memory.position == plain.memory.position
    assert ended.perplexity("the key") == plain.perplexity("the key")
    assert ended.generate("the key", **OPTIONS) == plain.generate("the key", **OPTIONS)


# ------------------------------------------------------------------------------------- options


def table_of_positions():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "n_inner": 24}
    config = GPT2Config(vocab_size=len(LETTERS), bos_token_id=1, eos_token_id=None, **sizes)
    return stack_levels(GPT2LMHeadModel(config), [DeltaLevel(8, lr=0.1, rule="dgd")])


def test_a_chat_longer_than_the_positions_goes_on():
    for model in (table_of_positions(), stack_levels(base(), [DeltaLevel(8, lr=0.1, rule="dgd")])):
        one, asked = Session(model, tokenizer=Letters()), []
        make = one.generate

        def spy(prompt, make=make, asked=asked, **options):
            asked.append(prompt)
            return make(prompt, **options)

        one.generate = spy
        for _ in range(4):
            one.chat("tell me more", **SHORT)
        assert len(one.turns) == 8
        assert max(prompt.shape[1] for prompt in asked) + 8 - 1 <= 64
        one.turns.insert(0, {"role": "system", "content": "be kind"})
        one.chat("tell me more", **SHORT)
        assert Letters().decode(asked[-1][0].tolist()).startswith("aystem: be kind\nUser: tell")


def test_beyond_a_table_of_positions_is_refused_before_anything_is_made():
    one = Session(table_of_positions(), tokenizer=Letters())
    with pytest.raises(ValueError, match=r"71 tokens and 3 new .* 64 positions: shorten"):
        one.generate("a" * 70, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"more than the model's 64 .* at most 14 \(max_new_to"):
        one.generate("a" * 50, max_new_tokens=20)
    assert len(one.generate("a" * 50, max_new_tokens=14, min_new_tokens=14)) > 0
    with pytest.raises(ValueError, match="shorten the prompt"):
        one.chat("a" * 70, **SHORT)
    assert one.turns == []
    assert one.memory.position == 0


def test_options_are_honoured_or_refused_by_name():
    one = session()
    several = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 4}
    assert [len(text) <= 4 for text in one.generate("the key", **several)] == [True] * 3
    assert one.generate(ids(5), **several).shape == (3, 4)
    with pytest.raises(ValueError, match="num_return_sequences=3: a chat has one reply"):
        one.chat("hello", **several)
    with pytest.raises(ValueError, match="return_dict_in_generate=True"):
        one.generate("the key", return_dict_in_generate=True)
    with pytest.raises(ValueError, match=r"inputs_embeds=\.\.\."):
        one.generate("the key", inputs_embeds=torch.zeros(1, 1, 16))
    with pytest.raises(ValueError, match=r"source=.*give a str"):
        one.learn("a letter", source=3)
    with pytest.raises(ValueError, match="a list is no text"):
        one.learn([3, 4])
    assert one.history == []
