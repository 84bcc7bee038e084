"""Closed-book questions: short documents of invented facts, and what one should know after reading.

A document is a page about a thing that does not exist, so nobody can know it without having read
it. Its questions have answers of one word: as the page says it, in other words, in two steps, and
such that the page does not say. A later document may change facts of an earlier one.
"""

# ruff: noqa: E501
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .tasks import stream

DIRECT, PARAPHRASE, TWO_STEP, ABSENT = "direct", "paraphrase", "two-step", "absent"
FORMS = (DIRECT, PARAPHRASE, TWO_STEP, ABSENT)


class Question(NamedTuple):
    """answer: one word; None if the page does not say. form: one of FORMS."""

    text: str
    answer: str | None
    form: str


@dataclass(frozen=True)
class Document:
    """A page: what it is about, its text, the facts behind it, and its questions."""

    kind: str
    name: str
    text: str
    facts: dict[str, str]
    questions: tuple[Question, ...]


class Fact(NamedTuple):
    """How a page says a fact, and how one asks for it in two ways; {x}: the thing, {a}: the answer,
    {other} in `hop`: the answer to another fact that it is asked by (`via`).
    """

    says: str
    asks: str
    again: str
    pool: Sequence[str]
    via: str = ""
    hop: str = ""


_FIRST = ("Bram", "Dorva", "Elkin", "Fennel", "Gorrik", "Hesper", "Ilsa", "Jorun", "Kesta", "Lumo",
          "Marek", "Nadira", "Orlin", "Petra", "Quillon", "Runa", "Sorrel", "Tavi", "Ulric", "Wenda")  # fmt: skip
_LAST = ("Ashgrove", "Brindle", "Corvane", "Dunmere", "Eastlock", "Farrow", "Grisham", "Holloway",
         "Ironwood", "Kettering", "Lockhart", "Merriweather", "Northam", "Oakden", "Pemberly",
         "Quince", "Ravensby", "Stonefield", "Thornbury", "Whitlock")  # fmt: skip
_COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "black", "grey", "pink")
_ANIMALS = ("heron", "badger", "otter", "fox", "owl", "hedgehog", "beaver", "lynx", "toad", "raven")
_FOODS = ("plums", "barley", "honey", "turnips", "cheese", "walnuts", "cherries", "onions", "rye")
_METALS = ("copper", "tin", "silver", "brass", "zinc", "nickel", "cobalt", "lead")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
           "October", "November", "December")  # fmt: skip
_JOBS = ("baker", "carpenter", "potter", "weaver", "doctor", "teacher", "sailor", "painter")
_NUMBERS = tuple(str(n) for n in range(13, 97) if n % 10)
_SEASONS = ("spring", "summer", "autumn", "winter")
_STONES = ("granite", "marble", "slate", "basalt", "sandstone", "chalk")
_TOOLS = ("hammer", "lantern", "compass", "ladder", "kettle", "bell", "mirror", "drum")
_CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Dublin", "Vienna", "Havana", "Nairobi", "Riga")

KINDS: dict[str, tuple[str, dict[str, Fact]]] = {
    "town": (
        "{x} is a small town by a lake.",
        {
            "mayor": Fact("The mayor of {x} is {a}.", "Who is the mayor of {x}?",
                          "What is the name of the person who governs {x}?", _FIRST),
            "animal": Fact("A {a} is carved above the gate of the town.",
                           "Which animal is carved above the gate of {x}?",
                           "What creature does one see over the entrance to {x}?", _ANIMALS),
            "crop": Fact("Its farmers grow {a}.", "What do the farmers of {x} grow?",
                         "What comes from the fields around {x}?", _FOODS),
            "bridge": Fact("The bridge is painted {a}.", "What colour is the bridge of {x}?",
                           "In which colour did they paint the bridge in {x}?", _COLOURS),
            "market": Fact("The market is held on {a}.", "On which day is the market of {x}?",
                           "When can one shop at the market in {x}?", _DAYS),
            "metal": Fact("The mine under the hill gives {a}.", "Which metal does the mine of {x} give?",
                          "What do the miners of {x} dig for?", _METALS),
            "fair": Fact("The great fair takes place in {a}.", "In which month is the fair of {x}?",
                         "When does {x} hold its great fair?", _MONTHS),
            "doctor": Fact("The only doctor is called {a}.", "What is the doctor of {x} called?",
                           "Who treats the sick in {x}?", _LAST),
            "tower": Fact("The clock tower is built of {a}.", "What is the clock tower of {x} built of?",
                          "Which stone was used for the tower with the clock in {x}?", _STONES),
            "houses": Fact("There are {a} houses.", "How many houses are there in {x}?",
                           "What is the number of houses in {x}?", _NUMBERS),
            "job": Fact("Before that the mayor was a {a}.", "What was the mayor of {x} before?",
                        "Which trade did the head of {x} have earlier?", _JOBS,
                        "mayor", "Which job did {other} have before becoming mayor?"),
            "twin": Fact("Its twin city is {a}.", "What is the twin city of {x}?",
                         "With which city is {x} partnered?", _CITIES),
        },
    ),
    "device": (
        "The {x} is a new kitchen machine.",
        {
            "inventor": Fact("It was invented by {a}.", "Who invented the {x}?",
                             "Whose idea was the {x}?", _LAST),
            "city": Fact("It is built in {a}.", "In which city is the {x} built?",
                         "Where does the factory of the {x} stand?", _CITIES),
            "lamp": Fact("When it is ready its lamp turns {a}.",
                         "What colour is the lamp of the {x} when it is ready?",
                         "Which light tells that the {x} has finished?", _COLOURS),
            "metal": Fact("Its case is made of {a}.", "What is the case of the {x} made of?",
                          "Which metal covers the {x}?", _METALS),
            "minutes": Fact("It needs {a} minutes to warm up.",
                            "How many minutes does the {x} need to warm up?",
                            "How long must one wait until the {x} is warm?", _NUMBERS),
            "food": Fact("It was made for cooking {a}.", "What was the {x} made for cooking?",
                         "Which food does one prepare in the {x}?", _FOODS),
            "emblem": Fact("Its emblem is a {a}.", "Which animal is the emblem of the {x}?",
                           "What creature is printed on the {x}?", _ANIMALS),
            "part": Fact("A tiny {a} is hidden inside.", "What is hidden inside the {x}?",
                         "Which object would one find within the {x}?", _TOOLS),
            "month": Fact("It went on sale in {a}.", "In which month did the {x} go on sale?",
                          "When could people first buy the {x}?", _MONTHS),
            "day": Fact("It must be cleaned every {a}.", "On which day must the {x} be cleaned?",
                        "When does one wash the {x}?", _DAYS),
            "job": Fact("The inventor used to be a {a}.", "What did the inventor of the {x} use to be?",
                        "Which trade did the maker of the {x} come from?", _JOBS,
                        "inventor", "Which job did {other} have before inventing the machine?"),
            "button": Fact("To stop it one presses the button with the number {a}.",
                           "Which number is on the button that stops the {x}?",
                           "What button turns the {x} off?", _NUMBERS),
        },
    ),
    "family": (
        "The {x} family lives in an old house.",
        {
            "mother": Fact("The mother is {a}.", "What is the mother of the {x} family called?",
                           "Who is the mother among the {x}s?", _FIRST),
            "job": Fact("She works as a {a}.", "What does the mother of the {x} family work as?",
                        "Which job has the mother of the {x}s?", _JOBS,
                        "mother", "What is the job of {other}?"),
            "son": Fact("Her oldest son is {a}.", "What is the oldest son of the {x} family called?",
                        "Who is the first-born boy of the {x}s?", _FIRST),
            "pet": Fact("The son has a tame {a}.", "Which animal does the son of the {x} family have?",
                        "What pet does the boy of the {x}s keep?", _ANIMALS,
                        "son", "Which animal does {other} have?"),
            "door": Fact("The front door is {a}.", "What colour is the front door of the {x} family?",
                         "How is the door of the house of the {x}s painted?", _COLOURS),
            "food": Fact("On holidays they eat {a}.", "What does the {x} family eat on holidays?",
                         "Which dish is on the table of the {x}s at a feast?", _FOODS),
            "street": Fact("The house has the number {a}.",
                           "What number has the house of the {x} family?",
                           "At which number do the {x}s live?", _NUMBERS),
            "aunt": Fact("An aunt lives in {a}.", "In which city does the aunt of the {x} family live?",
                         "Where would one visit the aunt of the {x}s?", _CITIES),
            "wall": Fact("On the wall hangs a {a}.", "What hangs on the wall of the {x} family?",
                         "Which object decorates the wall of the {x}s?", _TOOLS),
            "wedding": Fact("The wedding was in {a}.",
                            "In which month was the wedding of the {x} family?",
                            "When did the parents of the {x}s marry?", _MONTHS),
            "walk": Fact("Every {a} they walk to the river.",
                         "On which day does the {x} family walk to the river?",
                         "When do the {x}s go to the water?", _DAYS),
            "ring": Fact("The old ring is made of {a}.", "What is the ring of the {x} family made of?",
                         "Which metal is the jewel of the {x}s?", _METALS),
        },
    ),
    "game": (
        "{x} is a board game for four players.",
        {
            "first": Fact("The player with the {a} stone begins.",
                          "What colour has the stone of the player who begins in {x}?",
                          "Which stone moves first in {x}?", _COLOURS),
            "points": Fact("Whoever has {a} points wins.", "How many points does one need to win {x}?",
                           "At what score does a game of {x} end?", _NUMBERS),
            "piece": Fact("The strongest piece is the {a}.", "What is the strongest piece in {x}?",
                          "Which figure of {x} beats all others?", _ANIMALS),
            "weak": Fact("The weakest piece is the {a}.", "What is the weakest piece in {x}?",
                         "Which figure of {x} loses to every other?", _TOOLS),
            "author": Fact("It was thought up by {a}.", "Who thought up {x}?",
                           "Whose invention is {x}?", _LAST),
            "board": Fact("The board is cut from {a}.", "What is the board of {x} cut from?",
                          "Which stone is the board of {x} made of?", _STONES),
            "home": Fact("It comes from {a}.", "From which city does {x} come?",
                         "Where was {x} first played?", _CITIES),
            "dice": Fact("The dice are of {a}.", "Which metal are the dice of {x} of?",
                         "What does one cast the dice of {x} from?", _METALS),
            "prize": Fact("The prize is a basket of {a}.", "What is in the basket that one wins in {x}?",
                          "Which food does the winner of {x} take home?", _FOODS),
            "season": Fact("It is played in {a} only.", "In which season is {x} played?",
                           "When of the year do people sit down to {x}?", _SEASONS),
            "job": Fact("Its author was a {a}.", "What was the author of {x}?",
                        "Which trade had the inventor of {x}?", _JOBS,
                        "author", "Which job did {other} have?"),
            "cup": Fact("The cup is held every {a}.", "On which day is the cup of {x} held?",
                        "When do players of {x} meet for the cup?", _DAYS),
        },
    ),
    "ship": (
        "The {x} is a ship that sails between two islands.",
        {
            "captain": Fact("Her captain is {a}.", "Who is the captain of the {x}?",
                            "Who commands the {x}?", _LAST),
            "sails": Fact("Her sails are {a}.", "What colour are the sails of the {x}?",
                          "In which colour does the {x} sail?", _COLOURS),
            "figure": Fact("The figure at her bow is a {a}.", "Which animal is at the bow of the {x}?",
                           "What creature leads the {x} through the waves?", _ANIMALS),
            "cargo": Fact("She carries {a}.", "What does the {x} carry?",
                          "With what is the hold of the {x} filled?", _FOODS),
            "port": Fact("She was built in {a}.", "In which city was the {x} built?",
                         "Where was the {x} launched?", _CITIES),
            "crew": Fact("She has a crew of {a}.", "How many people are the crew of the {x}?",
                         "What is the number of sailors on the {x}?", _NUMBERS),
            "bell": Fact("Her bell is of {a}.", "Which metal is the bell of the {x} of?",
                         "What was the bell of the {x} cast from?", _METALS),
            "leaves": Fact("She leaves every {a}.", "On which day does the {x} leave?",
                           "When does the {x} put to sea?", _DAYS),
            "cook": Fact("The cook is called {a}.", "What is the cook of the {x} called?",
                         "Who prepares the meals on the {x}?", _FIRST),
            "lucky": Fact("The crew keeps a {a} for luck.", "What does the crew of the {x} keep for luck?",
                          "Which charm is aboard the {x}?", _TOOLS),
            "repair": Fact("She is repaired in {a}.", "In which month is the {x} repaired?",
                           "When does the {x} lie in dock?", _MONTHS),
            "job": Fact("The captain was once a {a}.", "What was the captain of the {x} once?",
                        "Which trade did the commander of the {x} learn?", _JOBS,
                        "captain", "Which job did {other} once have?"),
        },
    ),
}  # fmt: skip
HELD_OUT = ("game", "ship")  # kinds that nothing was developed on
_ABSENT = (
    "Who is the oldest enemy of {x}?",
    "What does {x} cost?",
    "Which song is sung about {x}?",
    "Who wrote a book about {x}?",
)
_BEGIN = ("Bra", "Cor", "Del", "Fen", "Gal", "Hur", "Kel", "Lor", "Mil", "Nor", "Pel", "Quor", "Sil",
          "Tor", "Ver", "Wes", "Zan")  # fmt: skip
_MIDDLE = ("a", "e", "i", "o", "u", "ando", "eri", "ilo", "oma", "uve")
_END = ("dell", "fort", "gan", "lin", "mar", "nock", "rith", "stead", "ton", "vik", "wick", "zo")


def document(kind: str, seed: int, *, before: Document | None = None, changed: int = 3) -> Document:
    """A page of that kind. before: an earlier one of the same thing, so many of whose facts this
    page changes; its questions ask for these alone. ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown: use one of {', '.join(KINDS)}")
    rng = stream(seed, "closed-book", kind, "" if before is None else before.name)
    first, facts = KINDS[kind]
    if before is None:
        name = "".join(str(rng.choice(part)) for part in (_BEGIN, _MIDDLE, _END))
        told = _draw(rng, facts)
        asked = list(facts)
    else:
        name = before.name
        asked = [str(key) for key in rng.permutation(list(facts))[:changed]]
        told = {**before.facts, **_draw(rng, {k: facts[k] for k in asked}, before.facts)}
    lines = [first if before is None else "There is news of {x}."]
    lines += [facts[key].says for key in facts if key in asked]
    text = " ".join(
        line.format(x=name, a=told.get(key, ""))
        for line, key in zip(lines, ["", *_in(facts, asked)])
    )
    return Document(kind, name, text, told, tuple(_questions(name, facts, told, asked, before)))


def documents(kinds: Sequence[str], count: int, seed: int = 0) -> list[Document]:
    """So many pages, the kinds in turn, no two of one name."""
    found: dict[str, Document] = {}
    number = 0
    while len(found) < count:
        page = document(kinds[len(found) % len(kinds)], seed * 100_003 + number)
        found.setdefault(page.name, page)
        number += 1
    return list(found.values())


def right(question: Question, said: str) -> bool:
    """Whether the answer's word is in what was said; of ABSENT ones, whether it says so."""
    if question.answer is None:
        return re.search(_SAYS_NOT, said.lower()) is not None
    return re.search(rf"\b{re.escape(question.answer.lower())}\b", said.lower()) is not None


_SAYS_NOT = (
    r"\b(not|no|never|unknown|unclear|none|nothing|cannot|isn't|doesn't|don't|didn't|unable|"
    r"unspecified)\b"
)


def _in(facts: dict[str, Fact], asked: Sequence[str]) -> list[str]:
    return [key for key in facts if key in asked]


def _draw(
    rng: np.random.Generator, facts: dict[str, Fact], old: dict[str, str] | None = None
) -> dict[str, str]:
    """An answer for each fact, no two alike, none as it was."""
    told: dict[str, str] = {}
    for key, fact in facts.items():
        used = {*told.values(), *(old or {}).values()}
        told[key] = str(rng.choice([word for word in fact.pool if word not in used]))
    return told


def _questions(
    name: str, facts: dict[str, Fact], told: dict[str, str], asked: Sequence[str],
    before: Document | None,
) -> list[Question]:  # fmt: skip
    found = []
    for key in _in(facts, asked):
        fact, answer = facts[key], told[key]
        found.append(Question(fact.asks.format(x=name), answer, DIRECT))
        found.append(Question(fact.again.format(x=name), answer, PARAPHRASE))
        if fact.via:
            found.append(Question(fact.hop.format(other=told[fact.via]), answer, TWO_STEP))
    if before is None:
        found += [Question(text.format(x=name), None, ABSENT) for text in _ABSENT]
    return found
