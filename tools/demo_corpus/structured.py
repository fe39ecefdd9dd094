"""JSON answers and tool calls."""

from __future__ import annotations

import json
import random

from .chat import FOODS, NAMES
from .facts import CAPITALS, DAYS
from .maths import operands

CITIES = tuple(city for _, city in CAPITALS) + (
    "New York",
    "Munich",
    "Barcelona",
    "Milan",
    "Boston",
    "Sydney",
    "San Francisco",
    "Zurich",
)
JOBS = "doctor teacher baker pilot nurse cook driver singer farmer painter".split()
WEATHER = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy")
TOPICS = (
    "black holes",
    "old castles",
    "green tea",
    "the moon",
    "electric cars",
    "chess openings",
    "the history of Rome",
    "solar power",
    "jazz music",
    "wild horses",
    "bread recipes",
    "python lists",
    "the Alps",
    "deep sea fish",
    "paper planes",
    "language models",
    "graph compilers",
)
Turn = tuple[str, str]


def as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def person(rng: random.Random) -> Turn:
    name, age, city, job = rng.choice(NAMES), rng.randint(18, 80), rng.choice(CITIES), rng.choice(JOBS)
    fields = {"name": name, "age": age, "city": city}
    text = rng.choice(
        (f"{name} is {age} years old and lives in {city}.", f"{name} lives in {city} and is {age} years old.")
    )
    if rng.random() < 0.4:
        fields["job"] = job
        text += f" {name} is a {job}."
    if rng.random() < 0.3:
        keep = rng.sample(list(fields), rng.randint(1, len(fields)))
        fields = {key: fields[key] for key in keep}
    keys = ", ".join(fields)
    asked = (
        f"Extract {keys} as JSON: {text}",
        f"{text} Answer as JSON with the fields {keys}.",
        f"Answer as JSON with the keys {keys}. {text}",
        f"Give me a JSON object with {keys}: {text}",
    )
    return rng.choice(asked), as_json(fields)


def json_fact(rng: random.Random) -> Turn:
    country, city = rng.choice(CAPITALS)
    kind = rng.randrange(3)
    if kind == 0:
        asked = (
            f"What is the capital of {country}? Answer as JSON.",
            f"Answer as JSON: what is the capital of {country}?",
            f"Give the capital of {country} as JSON.",
        )
        return rng.choice(asked), as_json({"country": country, "capital": city})
    if kind == 1:
        a, sign, b, result = operands(rng)
        return rng.choice(
            (f"What is {a} {sign} {b}? Answer as JSON.", f"Answer as JSON: what is {a} {sign} {b}?")
        ), as_json({"result": result})
    food, count, day = rng.choice(FOODS), rng.randint(1, 9), rng.choice(DAYS)
    return (
        rng.choice((f"Order {count} {food} for {day}. Answer as JSON.", f"Answer as JSON: {count} {food} for {day}.")),
        as_json({"item": food, "count": count, "day": day}),
    )


def _tool(name: str, description: str, required: tuple[str, ...], **properties: dict) -> dict:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _string(description: str | None = None) -> dict:
    return {"type": "string", "description": description} if description else {"type": "string"}


def weather_tool(rng: random.Random) -> tuple[dict, str, dict, str, str]:
    """(tool, question, arguments, tool response, answer); names vary, so that they must be read, not memorized."""
    city, sky, degrees = rng.choice(CITIES), rng.choice(WEATHER), rng.randint(-9, 35)
    name = rng.choice(("get_weather", "get_weather", "get_current_weather", "weather", "lookup_weather"))
    key = rng.choice(("city", "city", "location", "place"))
    properties = {key: _string(rng.choice((None, "The name of the city", "City name", "The city to look up")))}
    arguments = {key: city}
    asked = [
        f"What is the weather in {city}?",
        f"What's the weather like in {city}?",
        f"How is the weather in {city}?",
        f"Tell me the weather in {city}.",
        f"What is the weather like in {city} today?",
        f"Weather in {city}?",
        f"Is it raining in {city}?",
    ]
    question = rng.choice(asked)
    if rng.random() < 0.35:
        units = rng.choice((["celsius", "fahrenheit"], ["c", "f"]))
        properties["unit"] = {"type": "string", "enum": units}
        if rng.random() < 0.6:
            unit = rng.choice((0, 1))
            arguments["unit"] = units[unit]
            question = question.rstrip("?.") + (" in celsius?", " in fahrenheit?")[unit]
    tool = _tool(
        name,
        rng.choice(("Get the weather", "Get the current weather in a given city", "Weather of a city")),
        (key,),
        **properties,
    )
    response = rng.choice(
        (
            as_json({"weather": sky, "temperature": degrees}),
            as_json({"temperature": degrees, "weather": sky}),
            f"{sky}, {degrees} degrees",
        )
    )
    return tool, question, arguments, response, f"The weather in {city} is {sky} with {degrees} degrees."


def time_tool(rng: random.Random) -> tuple[dict, str, dict, str, str]:
    city, clock = rng.choice(CITIES), f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    key = rng.choice(("city", "city", "location", "place"))
    name = rng.choice(("get_time", "get_current_time", "current_time", "clock"))
    tool = _tool(
        name,
        rng.choice(("Get the time", "Get the current time in a city")),
        (key,),
        **{key: _string(rng.choice((None, "City name")))},
    )
    asked = (
        f"What time is it in {city}?",
        f"What is the time in {city}?",
        f"Tell me the time in {city}.",
        f"How late is it in {city}?",
    )
    response = rng.choice((as_json({"time": clock}), clock))
    return tool, rng.choice(asked), {key: city}, response, f"It is {clock} in {city}."


def calculator_tool(rng: random.Random) -> tuple[dict, str, dict, str, str]:
    a, b, sign = rng.randint(2, 999), rng.randint(2, 999), rng.choice("+-*/")
    key, name = rng.choice(("expression", "expression", "formula")), rng.choice(("calculator", "calculate", "compute"))
    tool = _tool(name, rng.choice(("Calculate an expression", "Evaluate a formula")), (key,), **{key: _string()})
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    asked = (
        f"What is {a} {sign} {b}?",
        f"Calculate {a} {sign} {b}.",
        f"How much is {a} {sign} {b}?",
        f"Use the {name} for {a} {sign} {b}.",
    )
    return tool, rng.choice(asked), {key: f"{a} {sign} {b}"}, str(result), f"{a} {sign} {b} = {result}"


def add_tool(rng: random.Random) -> tuple[dict, str, dict, str, str]:
    a, b, number = rng.randint(0, 99), rng.randint(0, 99), {"type": rng.choice(("integer", "number"))}
    sign, names = rng.choice((("+", ("add", "add_numbers", "sum")), ("*", ("multiply", "mul", "product"))))
    tool = _tool(
        rng.choice(names), "Add two numbers" if sign == "+" else "Multiply two numbers", ("a", "b"), a=number, b=number
    )
    result = a + b if sign == "+" else a * b
    asked = (
        (f"Add {a} and {b}.", f"What is {a} + {b}?")
        if sign == "+"
        else (f"Multiply {a} and {b}.", f"What is {a} * {b}?")
    )
    return tool, rng.choice(asked), {"a": a, "b": b}, str(result), f"{a} {sign} {b} = {result}"


def search_tool(rng: random.Random) -> tuple[dict, str, dict, str, str]:
    topic, key = rng.choice(TOPICS), rng.choice(("query", "query", "q", "text"))
    name = rng.choice(("search", "web_search", "search_web", "find"))
    tool = _tool(
        name,
        rng.choice(("Search the web", "Find pages")),
        (key,),
        **{key: _string(rng.choice((None, "What to search for")))},
    )
    asked = (
        f"Search for {topic}.",
        f"Find something about {topic}.",
        f"Search the web for {topic}.",
        f"Look up {topic}.",
    )
    found = rng.choice(("A short guide", "The big book", "Ten questions", "All you need to know"))
    return tool, rng.choice(asked), {key: topic}, as_json({"title": found}), f"I found this about {topic}: {found}."


TOOLS = (weather_tool, weather_tool, weather_tool, time_tool, calculator_tool, add_tool, search_tool)


def call_text(calls: list[tuple[str, dict]]) -> str:
    return "\n".join(
        f"<tool_call>\n{as_json({'name': name, 'arguments': arguments})}\n</tool_call>" for name, arguments in calls
    )
