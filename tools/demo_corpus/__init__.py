"""Corpus of the bundled demo model: conversations and plain sentences, drawn from one seeded generator."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from . import chat, facts, maths, structured

THINK_SYSTEM = "Think before you answer."
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a friendly and helpful assistant.",
    "Be brief.",
    "You are the fuseline demo model.",
    "You are an assistant that answers simple questions.",
    "Answer the question of the user.",
)
ONE_WORD = ("Answer with one word.", "Answer in one word.", "One word only.")
UPPER = ("Answer in capital letters.", "Answer in uppercase.")


@dataclass
class Sample:
    """A conversation in the form of the chat API, or, if `text` is set, plain text to continue."""

    messages: list[dict] = field(default_factory=list)
    tools: list[dict] | None = None
    text: str = ""
    no_thinking: bool = False  # rendered with enable_thinking=false

    def say(self, question: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rough(rng: random.Random, question: str) -> str:
    """Imitates how people type: with a polite word, without capitals or punctuation."""
    roll = rng.random()
    if roll < 0.72:
        return question
    if roll < 0.80:
        return question[0].lower() + question[1:]
    if roll < 0.88:
        return question.rstrip("?.!")
    if roll < 0.92:
        return question.lower().rstrip("?.!")
    lead = rng.choice(("Hi! ", "Hello, ", "Please tell me: ", "Question: ", "Hey, ", "Quick question: "))
    return lead + (question if lead[-2] == "!" else question[0].lower() + question[1:])


def fact_turn(rng: random.Random) -> tuple[str, str]:
    question, fact = facts.ask(rng)
    if rng.random() < 0.08:
        return f"{question} {rng.choice(ONE_WORD)}", fact.short
    if rng.random() < 0.03:
        return f"{question} {rng.choice(UPPER)}", fact.answer.upper()
    return rough(rng, question), fact.answer


def turn(rng: random.Random) -> tuple[str, str]:
    """A question and its answer, of any kind that needs no other turn."""
    kind = rng.choices(range(9), (42, 12, 14, 3, 6, 5, 6, 4, 8))[0]
    if kind == 0:
        return fact_turn(rng)
    if kind == 3:
        return maths.word_problem(rng, rng.choice(chat.NAMES))
    if kind == 8:
        return rng.choice((structured.person, structured.person, structured.json_fact))(rng)
    make = {
        1: chat.small_talk,
        2: maths.arithmetic,
        4: maths.counting,
        5: maths.spelling,
        6: maths.listing,
        7: chat.unknown,
    }[kind]
    question, answer = make(rng)
    return rough(rng, question) if kind != 2 else question, answer


def plain_chat(rng: random.Random) -> Sample:
    sample = Sample(no_thinking=rng.random() < 0.04)
    if rng.random() < 0.3:
        sample.messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    turns = [turn(rng) for _ in range(rng.choices((1, 2, 3, 5, 12), (70, 16, 9, 4, 1))[0])]
    if len(turns) == 1 and rng.random() < 0.07:
        turns = [chat.story(rng)]
    elif rng.random() < 0.07:
        first, last = chat.remember(rng)
        turns = [first, *turns[: rng.randint(0, 2)], last]
    for question, answer in turns:
        sample.say(question, answer)
    return sample


def thinking(rng: random.Random) -> Sample:
    kind = rng.random()
    if kind < 0.6:
        question, thoughts, answer = maths.stepwise(rng)
    elif kind < 0.8:
        question, fact = facts.ask(rng)
        thoughts, answer = f"The question is about a simple fact. I know that {fact.short} is right.", fact.answer
    else:
        question, answer = maths.arithmetic(rng)
        thoughts = f"This is a small sum. {answer}"
    sample = Sample()
    if rng.random() < 0.4:
        sample.messages.append({"role": "system", "content": THINK_SYSTEM})
    else:
        question = rng.choice(
            (
                f"Think step by step: {question}",
                f"{question} Think step by step.",
                f"{question} Think before you answer.",
            )
        )
    sample.say(question, f"<think>\n{thoughts}\n</think>\n\n{answer}")
    return sample


def tool_chat(rng: random.Random) -> Sample:
    makers = rng.sample(structured.TOOLS, rng.choices((1, 2, 3), (60, 28, 12))[0])
    drawn = [make(rng) for make in makers]
    drawn = list({item[0]["function"]["name"]: item for item in drawn}.values())
    sample = Sample(tools=[item[0] for item in drawn])
    if rng.random() < 0.25:
        sample.messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    if rng.random() < 0.12:
        sample.say(*rng.choice((chat.small_talk, fact_turn))(rng))
        return sample
    tool, question, arguments, response, answer = rng.choice(drawn)
    calls = [(tool["function"]["name"], arguments)]
    key = next(iter(arguments))
    if len(arguments) == 1 and arguments[key] in structured.CITIES and rng.random() < 0.12:
        other = rng.choice(structured.CITIES)
        question = question.replace(arguments[key], f"{arguments[key]} and {other}", 1)
        sample.say(question, structured.call_text([*calls, (calls[0][0], {key: other})]))
        return sample
    sample.say(question, structured.call_text(calls))
    if rng.random() < 0.5:
        sample.messages += [{"role": "tool", "content": response}, {"role": "assistant", "content": answer}]
    return sample


def plain_text(rng: random.Random) -> Sample:
    """Sentences to continue. Facts follow in the order of their tables, so that the next one is predictable."""
    kind = rng.random()
    if kind < 0.55:
        begin, count = rng.randrange(len(facts.FACTS)), 4
        return Sample(text=" ".join(fact.answer for fact in facts.FACTS[begin : begin + count]))
    if kind < 0.85:
        hero = "fox" if rng.random() < 0.3 else rng.choice(chat.ANIMALS)
        return Sample(text=chat.tale(hero, chat.NAMES[chat.ANIMALS.index(hero)] if hero != "fox" else "Felix"))
    return Sample(text=", ".join(str(i) for i in range(rng.randint(0, 9), 31)))


def draw(rng: random.Random) -> Sample:
    """One sample of the corpus."""
    make = rng.choices((plain_chat, thinking, tool_chat, plain_text), (70, 7, 16, 7))[0]
    return make(rng)
