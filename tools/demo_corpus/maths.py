"""Sums, counting, spelling and lists."""

from __future__ import annotations

import random

from .facts import DAYS, MONTHS, PLANETS

WORDS = (
    "cat dog bird fish house tree apple water bread stone river cloud light night green happy music "
    "table chair train plane "
    "paper pencil school friend garden flower summer winter spring autumn monday sunday yellow purple "
    "orange banana lemon tomato "
    "mouse horse tiger lion snake robot model token server graph kernel python code hello world book "
    "door window mountain forest "
    "ocean island bridge street market doctor teacher king queen castle dragon knight sword shield ship "
    "boat star moon sun planet"
).split()
LISTS = {
    "fruits": "apple banana cherry grape lemon orange peach pear plum mango".split(),
    "animals": "dog cat horse cow sheep lion bear fox wolf mouse".split(),
    "colours": "red blue green yellow orange purple black white pink brown".split(),
    "vegetables": "carrot potato onion tomato cabbage spinach pea bean leek pepper".split(),
    "countries": "France Germany Italy Spain Japan China India Brazil Canada Egypt".split(),
    "cities": "Paris London Rome Berlin Madrid Tokyo Vienna Cairo Oslo Lisbon".split(),
    "birds": "eagle owl duck swan crow hen goose robin stork falcon".split(),
    "tools": "hammer saw drill screwdriver wrench pliers file axe shovel rake".split(),
    "drinks": "water milk juice tea coffee lemonade cocoa soda cider broth".split(),
    "languages": "English French German Spanish Italian Chinese Japanese Arabic Russian Greek".split(),
}
NUMBERS = "zero one two three four five six seven eight nine ten".split()
SIGNS = {"+": "plus", "-": "minus", "*": "times"}
Turn = tuple[str, str]


def operands(rng: random.Random) -> tuple[int, str, int, int]:
    """A sum in the range the model learns: up to 20 + 20, 20 - 20 without negative results, 10 * 10."""
    sign = rng.choice("++-*")
    if sign == "*":
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        return a, sign, b, a * b
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    if sign == "-":
        a, b = max(a, b), min(a, b)
        return a, sign, b, a - b
    return a, sign, b, a + b


def arithmetic(rng: random.Random) -> Turn:
    a, sign, b, result = operands(rng)
    if max(a, b) <= 10 and rng.random() < 0.15:
        return f"What is {NUMBERS[a]} {SIGNS[sign]} {NUMBERS[b]}?", f"{a} {sign} {b} = {result}"
    word, tight = SIGNS[sign], f"{a}{sign}{b}"
    asked = (
        f"What is {a} {sign} {b}?",
        f"What is {a} {word} {b}?",
        f"{a} {sign} {b}",
        f"{tight}",
        f"{tight}=",
        f"{a} {sign} {b} = ?",
        f"Calculate {a} {sign} {b}.",
        f"How much is {a} {sign} {b}?",
        f"How much is {a} {word} {b}?",
        f"What's {tight}?",
        f"Compute {a} {word} {b}.",
        f"What is {tight}?",
    )
    return rng.choice(asked), f"{a} {sign} {b} = {result}"


def word_problem(rng: random.Random, name: str) -> Turn:
    thing = rng.choice(("apples", "books", "coins", "balls", "pens", "eggs"))
    a, b = rng.randint(2, 10), rng.randint(1, 9)
    if rng.random() < 0.5:
        return (
            f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
            f"{a} + {b} = {a + b}, so {name} has {a + b} {thing}.",
        )
    a, b = max(a, b), min(a, b)
    return (
        f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?",
        f"{a} - {b} = {a - b}, so {a - b} {thing} are left.",
    )


def stepwise(rng: random.Random) -> tuple[str, str, str]:
    """A sum of two-digit numbers: (question, thoughts, answer)."""
    a, b = rng.randint(11, 49), rng.randint(11, 49)
    tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
    thoughts = f"{a // 10 * 10} + {b // 10 * 10} = {tens}\n{a % 10} + {b % 10} = {ones}\n{tens} + {ones} = {a + b}"
    return (
        rng.choice((f"What is {a} + {b}?", f"What is {a} plus {b}?", f"Calculate {a} + {b}.")),
        thoughts,
        f"{a} + {b} = {a + b}",
    )


def counting(rng: random.Random) -> Turn:
    low = rng.choice((1, 1, 1, 0, rng.randint(2, 20)))
    high = low + rng.choice((2, 4, 5, 9, 9, 9, rng.randint(2, 19)))
    if rng.random() < 0.2:
        return rng.choice((f"Count down from {high} to {low}.", f"Count backwards from {high} to {low}.")), ", ".join(
            str(i) for i in range(high, low - 1, -1)
        )
    numbers = ", ".join(str(i) for i in range(low, high + 1))
    asked = [
        f"Count from {low} to {high}.",
        f"Please count from {low} to {high}.",
        f"List the numbers from {low} to {high}.",
        f"Can you count from {low} to {high}?",
    ]
    return rng.choice([*asked, f"Count to {high}."] if low == 1 else asked), numbers


def spelling(rng: random.Random) -> Turn:
    word = rng.choice(WORDS)
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice((f"How many letters are in {word}?", f"How many letters does the word {word} have?")), (
            f"The word {word} has {len(word)} letters."
        )
    if kind == 1:
        return f"What is the first letter of {word}?", f"The first letter of {word} is {word[0].upper()}."
    asked = (f"Spell {word}.", f"Spell the word {word}.", f"How do you spell {word}?", f'Please spell "{word}".')
    return rng.choice(asked), "-".join(word.upper())


def listing(rng: random.Random) -> Turn:
    fixed = {"days of the week": DAYS, "months of the year": MONTHS, "planets": PLANETS}
    if rng.random() < 0.25:
        kind = rng.choice(list(fixed))
        asked = (f"List the {kind}.", f"Name the {kind}.", f"What are the {kind}?", f"Tell me the {kind}.")
        return rng.choice(asked), ", ".join(fixed[kind])
    kind, count = rng.choice(list(LISTS)), rng.randint(2, 6)
    items = LISTS[kind][:count]
    number = rng.choice((str(count), NUMBERS[count]))
    if rng.random() < 0.4:
        return rng.choice((f"Write a list of {number} {kind}.", f"Make a list of {number} {kind}.")), "\n".join(
            f"- {item}" for item in items
        )
    return rng.choice(
        (f"Name {number} {kind}.", f"List {number} {kind}.", f"Tell me {number} {kind}.", f"Give me {number} {kind}.")
    ), (", ".join(items))
