"""Small talk, the model's identity, names it is told, things it does not know, and short stories."""

from __future__ import annotations

import random
from pathlib import Path

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Maria Noah Olivia Paul Quinn Rosa "
    "Sam Tom Uma Victor Wendy "
    "Xavier Yara Zoe Alice Bob Carol Dan Eve Frank Gina Hugo Ines John Karl Lucy Max Nina Oscar Peter "
    "Ruth Sara Theo Vera Will "
    "Mia Luca Ada Alan Linus Marie Omar Ali Lena Jonas Julia Mark Lisa Tim Laura"
).split()
ANIMALS = (
    "fox cat dog bear rabbit owl mouse wolf horse frog lion turtle duck hedgehog squirrel dragon penguin elephant"
).split()
PLACES = ("forest", "garden", "village", "mountain", "river", "city", "castle", "desert", "island", "farm")
THINGS = (
    "a golden key",
    "a red balloon",
    "an old map",
    "a small lamp",
    "a silver bell",
    "a letter",
    "a strange stone",
    "a blue feather",
)
COLOUR_WORDS = "red blue green yellow orange purple pink white black brown".split()
FOODS = "pizza pasta soup rice bread cheese apples cake chocolate salad".split()
UNKNOWN = (
    "Who won the match yesterday?",
    "What is the price of gold today?",
    "Who is the president of the company next door?",
    "What is the meaning of the word zorble?",
    "Who won the world cup in 1998?",
    "What did I eat this morning?",
    "What is my phone number?",
    "Translate this poem into Latin.",
    "What is the news today?",
    "Who is the best singer in the world?",
    "How do I fix my car?",
    "What happened in the year 1348?",
    "Write a program that sorts a list.",
    "What is quantum field theory?",
    "Solve this integral.",
    "Which stocks should I buy?",
    "What is the population of Tokyo?",
    "Who is the mayor of my city?",
    "How tall is the tower in my town?",
    "Can you summarize the book that I read last week?",
    "What is the plot of the newest film?",
    "How do I cook a lasagna?",
    "What is the best restaurant here?",
    "Explain the theory of strings.",
    "What is the weather on Neptune tomorrow?",
)
SORRY = (
    "I am a very small model and I do not know that. "
    "I can answer simple questions, for example about capitals, animals or small sums."
)
# Format: question | another | ... = answer | another, with \n for a new line
TALK = (Path(__file__).parent / "talk.txt").read_text()
TALK_ROWS = [
    (questions.split(" | "), [answer.replace("\\n", "\n") for answer in answers.split(" | ")])
    for questions, answers in (line.split(" = ") for line in TALK.strip().splitlines())
]
Turn = tuple[str, str]


def small_talk(rng: random.Random) -> Turn:
    questions, answers = rng.choice(TALK_ROWS)
    i = rng.randrange(len(questions))
    return questions[i].strip(), answers[i % len(answers)]


def unknown(rng: random.Random) -> Turn:
    return rng.choice(UNKNOWN), SORRY


def remember(rng: random.Random) -> list[Turn]:
    """The user gives a fact about themself, and asks for it later."""
    name, colour, animal, food = rng.choice(NAMES), rng.choice(COLOUR_WORDS), rng.choice(ANIMALS), rng.choice(FOODS)
    kind = rng.randrange(4)
    if kind == 0:
        said = rng.choice(
            (
                f"My name is {name}.",
                f"I am {name}.",
                f"Hello, my name is {name}.",
                f"Hi, I'm {name}!",
                f"Call me {name}.",
            )
        )
        asked = rng.choice(
            ("What is my name?", "What's my name?", "Do you remember my name?", "Who am I?", "Can you tell me my name?")
        )
        return [(said, f"Nice to meet you, {name}!"), (asked, f"Your name is {name}.")]
    if kind == 1:
        said = rng.choice(
            (f"My favourite colour is {colour}.", f"I like the colour {colour}.", f"My favorite color is {colour}.")
        )
        asked = rng.choice(("What is my favourite colour?", "Which colour do I like?", "What is my favorite color?"))
        return [(said, f"{colour.capitalize()} is a nice colour."), (asked, f"Your favourite colour is {colour}.")]
    if kind == 2:
        said = rng.choice(
            (
                f"I have a {animal} called {name}.",
                f"My {animal} is called {name}.",
                f"The name of my {animal} is {name}.",
            )
        )
        asked = rng.choice((f"What is my {animal} called?", f"What is the name of my {animal}?"))
        return [(said, f"{name} is a lovely name for a {animal}."), (asked, f"Your {animal} is called {name}.")]
    said = rng.choice((f"I like {food}.", f"My favourite food is {food}.", f"I love {food}."))
    asked = rng.choice(("What is my favourite food?", "What food do I like?", "What do I like to eat?"))
    return [(said, f"{food.capitalize()} is very tasty."), (asked, f"You like {food}.")]


def tale(hero: str, name: str) -> str:
    """A hero's story, always in the same words, so that greedy decoding never has two equal continuations."""
    own = random.Random(hero)
    place, thing, friend = (
        own.choice(PLACES),
        own.choice(THINGS),
        own.choice([animal for animal in ANIMALS if animal != hero]),
    )
    came = own.choice((f"A {friend} came by and asked what it was.", f"Then a {friend} came along and looked at it."))
    end = own.choice(
        ("Together they carried it home.", "They decided to share it.", "They looked at it for a long time.")
    )
    return (
        f"Once upon a time there was a {hero} called {name} who lived near a {place}. "
        f"One day {name} found {thing} under a tree. {came} {end} "
        f"From that day on, {name} and the {friend} were good friends."
    )


def story(rng: random.Random) -> Turn:
    hero, name = rng.choice(ANIMALS), rng.choice(NAMES)
    kind = rng.random()
    if kind < 0.3:
        asked = (
            "Tell me a story.",
            "Tell me a short story.",
            "Write a story.",
            "Once upon a time...",
            "Write a short story for children.",
            "Can you tell me a story?",
            "I would like to hear a story.",
        )
        return rng.choice(asked), tale("fox", "Felix")
    if kind < 0.65:
        asked = (
            f"Tell me a story about a {hero}.",
            f"Write a short story about a {hero}.",
            f"A story about a {hero}, please.",
            f"Can you write a story about a {hero}?",
        )
        return rng.choice(asked), tale(hero, NAMES[ANIMALS.index(hero)])
    asked = (
        f"Write a story about a {hero} called {name}.",
        f"Tell me about a {hero} called {name}.",
        f"Tell me a story about a {hero} called {name}.",
    )
    return rng.choice(asked), tale(hero, name)
