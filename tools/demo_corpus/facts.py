"""Facts the demo model knows: tables, and the phrasings of questions and answers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HELD_OUT = 8  # every eighth (fact, phrasing) pair is held out; tools/train_demo.py measures on those


class Fact(NamedTuple):
    questions: tuple[str, ...]
    answer: str
    short: str


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(key.strip(), value.strip()) for key, _, value in (row.partition(":") for row in text.split(","))]


CAPITALS = _pairs(
    "France:Paris,Germany:Berlin,Italy:Rome,Spain:Madrid,Portugal:Lisbon,England:London,Ireland:Dublin,"
    "Scotland:Edinburgh,"
    "Norway:Oslo,Sweden:Stockholm,Finland:Helsinki,Denmark:Copenhagen,Iceland:Reykjavik,Poland:Warsaw,Austria:Vienna,"
    "Switzerland:Bern,Belgium:Brussels,the Netherlands:Amsterdam,Greece:Athens,Turkey:Ankara,"
    "Russia:Moscow,Ukraine:Kyiv,"
    "Hungary:Budapest,the Czech Republic:Prague,Romania:Bucharest,Bulgaria:Sofia,Croatia:Zagreb,Serbia:Belgrade,"
    "Japan:Tokyo,China:Beijing,India:New Delhi,South Korea:Seoul,Thailand:Bangkok,Vietnam:Hanoi,Indonesia:Jakarta,"
    "Australia:Canberra,New Zealand:Wellington,Canada:Ottawa,the United States:Washington,Mexico:Mexico "
    "City,Cuba:Havana,"
    "Brazil:Brasilia,Argentina:Buenos Aires,Chile:Santiago,Peru:Lima,Colombia:Bogota,Egypt:Cairo,Morocco:Rabat,"
    "Kenya:Nairobi,Nigeria:Abuja,Ghana:Accra,Ethiopia:Addis Ababa,Israel:Jerusalem,Iran:Tehran,Iraq:Baghdad"
)
OPPOSITES = _pairs(
    "hot:cold,big:small,up:down,left:right,fast:slow,happy:sad,light:dark,open:closed,old:young,new:old,"
    "high:low,long:short,"
    "hard:soft,wet:dry,full:empty,rich:poor,strong:weak,day:night,good:bad,early:late,clean:dirty,"
    "loud:quiet,inside:outside,"
    "near:far,black:white,yes:no,love:hate,win:lose,push:pull,heavy:light,thick:thin,wide:narrow,"
    "deep:shallow,sweet:sour,"
    "true:false,easy:difficult,asleep:awake,always:never,first:last,begin:end,cheap:expensive,brave:afraid"
)
COLOURS = _pairs(
    "the sky:blue,grass:green,snow:white,coal:black,a banana:yellow,a lemon:yellow,an orange:orange,a carrot:orange,"
    "blood:red,a tomato:red,a strawberry:red,milk:white,chocolate:brown,the sun:yellow,a flamingo:pink,"
    "an elephant:grey,"
    "a frog:green,the sea:blue,an emerald:green,a ruby:red,a lime:green,an eggplant:purple,a crow:black,"
    "a polar bear:white"
)
SOUNDS = _pairs(
    "dog:woof,cat:meow,cow:moo,sheep:baa,duck:quack,pig:oink,horse:neigh,lion:roar,bee:buzz,snake:hiss,"
    "owl:hoot,frog:ribbit,"
    "rooster:cock-a-doodle-doo,mouse:squeak,wolf:howl,crow:caw"
)
BABIES = _pairs(
    "dog:puppy,cat:kitten,cow:calf,sheep:lamb,duck:duckling,pig:piglet,horse:foal,lion:cub,bear:cub,"
    "goat:kid,frog:tadpole,"
    "kangaroo:joey,hen:chick,swan:cygnet,deer:fawn,goose:gosling,butterfly:caterpillar,fox:cub"
)
LEGS = _pairs(
    "dog:four,cat:four,spider:eight,ant:six,bird:two,horse:four,snake:no,fish:no,bee:six,octopus:no,human:two,cow:four,"
    "frog:four,beetle:six,chicken:two,elephant:four,crab:ten,worm:no"
)
LANGUAGES = _pairs(
    "France:French,Germany:German,Italy:Italian,Spain:Spanish,Portugal:Portuguese,England:English,Brazil:Portuguese,"
    "Mexico:Spanish,Japan:Japanese,China:Chinese,Russia:Russian,Greece:Greek,Turkey:Turkish,"
    "Poland:Polish,Sweden:Swedish,"
    "Norway:Norwegian,Egypt:Arabic,Austria:German,Argentina:Spanish,Australia:English"
)
SYMBOLS = _pairs(
    "hydrogen:H,helium:He,carbon:C,nitrogen:N,oxygen:O,sodium:Na,iron:Fe,copper:Cu,silver:Ag,gold:Au,lead:Pb,tin:Sn,"
    "calcium:Ca,potassium:K,neon:Ne,chlorine:Cl,zinc:Zn,sulfur:S,lithium:Li,mercury:Hg"
)
AUTHORS = _pairs(
    "Hamlet:William Shakespeare,Romeo and Juliet:William Shakespeare,Don Quixote:Miguel de Cervantes,Faust:Goethe,"
    "War and Peace:Leo Tolstoy,Oliver Twist:Charles Dickens,Pride and Prejudice:Jane Austen,Moby Dick:Herman Melville,"
    "Frankenstein:Mary Shelley,Dracula:Bram Stoker,The Odyssey:Homer,Alice in Wonderland:Lewis Carroll,"
    "Peter Pan:J. M. Barrie,Treasure Island:Robert Louis Stevenson,The Jungle Book:Rudyard Kipling"
)
CONTINENTS = _pairs(
    "France:Europe,Germany:Europe,Italy:Europe,Spain:Europe,Norway:Europe,Japan:Asia,China:Asia,"
    "India:Asia,Thailand:Asia,"
    "Egypt:Africa,Kenya:Africa,Nigeria:Africa,Morocco:Africa,Brazil:South America,Peru:South America,"
    "Chile:South America,"
    "Argentina:South America,Canada:North America,Mexico:North America,Cuba:North America"
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
PLANETS = ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune")
ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
)
MONTH_DAYS = ("31", "28", "31", "30", "31", "30", "31", "31", "30", "31", "30", "31")

# Format: question | another phrasing | ... = answer = short answer
SINGLE = (Path(__file__).parent / "facts.txt").read_text()


def _one(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def _tables() -> Iterator[Fact]:
    for country, city in CAPITALS:
        yield Fact(
            (
                f"What is the capital of {country}?",
                f"Which city is the capital of {country}?",
                f"Tell me the capital of {country}.",
                f"Capital of {country}?",
                f"Name the capital of {country}.",
                f"Do you know the capital of {country}?",
                f"What city is the capital of {country}?",
                f"I would like to know the capital of {country}.",
            ),
            f"The capital of {country} is {city}.",
            city,
        )
        yield Fact(
            (
                f"{city} is the capital of which country?",
                f"Which country has the capital {city}?",
                f"What country is {city} the capital of?",
            ),
            f"{city} is the capital of {country}.",
            country,
        )
    for word, other in OPPOSITES:
        yield Fact(
            (
                f"What is the opposite of {word}?",
                f"Tell me the opposite of {word}.",
                f"Opposite of {word}?",
                f"Which word is the opposite of {word}?",
                f"Give me the opposite of {word}.",
                f'What is the opposite of "{word}"?',
            ),
            f"The opposite of {word} is {other}.",
            other.capitalize(),
        )
    for thing, colour in COLOURS:
        yield Fact(
            (
                f"What colour is {thing}?",
                f"What color is {thing}?",
                f"Which colour does {thing} have?",
                f"What is the color of {thing}?",
                f"Tell me the colour of {thing}.",
                f"What is the colour of {thing}?",
            ),
            f"{thing[0].upper()}{thing[1:]} is {colour}.",
            colour.capitalize(),
        )
    for animal, sound in SOUNDS:
        yield Fact(
            (
                f"What sound does {_one(animal)} make?",
                f"What does {_one(animal)} say?",
                f"Which sound does the {animal} make?",
                f"How does {_one(animal)} sound?",
                f"What does the {animal} say?",
            ),
            f"{_one(animal).capitalize()} says {sound}.",
            sound.capitalize(),
        )
    for animal, baby in BABIES:
        yield Fact(
            (
                f"What is a baby {animal} called?",
                f"What do you call a baby {animal}?",
                f"What is the name of a young {animal}?",
                f"How is a young {animal} called?",
            ),
            f"A baby {animal} is called {_one(baby)}.",
            baby.capitalize(),
        )
    for animal, legs in LEGS:
        yield Fact(
            (
                f"How many legs does {_one(animal)} have?",
                f"How many legs has {_one(animal)}?",
                f"Number of legs of {_one(animal)}?",
                f"Tell me how many legs {_one(animal)} has.",
            ),
            f"{_one(animal).capitalize()} has {legs} legs.",
            legs.capitalize(),
        )
    for country, language in LANGUAGES:
        yield Fact(
            (
                f"What language do people speak in {country}?",
                f"Which language is spoken in {country}?",
                f"What is the language of {country}?",
                f"Tell me the language of {country}.",
            ),
            f"People in {country} speak {language}.",
            language,
        )
    for country, continent in CONTINENTS:
        yield Fact(
            (
                f"On which continent is {country}?",
                f"Where is {country}?",
                f"Which continent is {country} in?",
                f"What continent is {country} on?",
            ),
            f"{country} is in {continent}.",
            continent,
        )
    for element, symbol in SYMBOLS:
        yield Fact(
            (
                f"What is the chemical symbol of {element}?",
                f"What is the symbol for {element}?",
                f"Which symbol stands for {element}?",
                f"Tell me the chemical symbol for {element}.",
            ),
            f"The chemical symbol of {element} is {symbol}.",
            symbol,
        )
    for book, author in AUTHORS:
        yield Fact(
            (
                f"Who wrote {book}?",
                f"Who is the author of {book}?",
                f"Tell me who wrote {book}.",
                f"Which author wrote {book}?",
            ),
            f"{book} was written by {author}.",
            author,
        )


def _sequences() -> Iterator[Fact]:
    for kind, names in (("day", DAYS), ("month", MONTHS)):
        for i, name in enumerate(names):
            after, before = names[(i + 1) % len(names)], names[i - 1]
            yield Fact(
                (
                    f"What {kind} comes after {name}?",
                    f"Which {kind} is after {name}?",
                    f"What comes after {name}?",
                    f"Which {kind} follows {name}?",
                    f"What is the {kind} after {name}?",
                ),
                f"{after} comes after {name}.",
                after,
            )
            yield Fact(
                (
                    f"What {kind} comes before {name}?",
                    f"Which {kind} is before {name}?",
                    f"What comes before {name}?",
                    f"What is the {kind} before {name}?",
                ),
                f"{before} comes before {name}.",
                before,
            )
    for i, month in enumerate(MONTHS):
        yield Fact(
            (f"How many days are in {month}?", f"How many days does {month} have?", f"How long is {month}?"),
            f"{month} has {MONTH_DAYS[i]} days.",
            MONTH_DAYS[i],
        )
        yield Fact(
            (
                f"What is the {ORDINALS[i]} month of the year?",
                f"Which month is the {ORDINALS[i]}?",
                f"Name the {ORDINALS[i]} month.",
            ),
            f"The {ORDINALS[i]} month of the year is {month}.",
            month,
        )
    for i, planet in enumerate(PLANETS):
        yield Fact(
            (
                f"What is the {ORDINALS[i]} planet from the Sun?",
                f"Which planet is the {ORDINALS[i]} from the Sun?",
                f"Name the {ORDINALS[i]} planet.",
            ),
            f"The {ORDINALS[i]} planet from the Sun is {planet}.",
            planet,
        )


def _singles() -> Iterator[Fact]:
    for line in SINGLE.strip().splitlines():
        questions, answer, short = line.split(" = ")
        yield Fact(tuple(question.strip() for question in questions.split(" | ")), answer, short)


FACTS: tuple[Fact, ...] = (*_tables(), *_sequences(), *_singles())


def is_held_out(fact: Fact, question: str) -> bool:
    """Whether the (fact, phrasing) pair is held out of training; facts with few phrasings are not."""
    return len(fact.questions) >= 3 and zlib.crc32(question.encode()) % HELD_OUT == 0 and question != fact.questions[0]


def ask(rng: random.Random) -> tuple[str, Fact]:
    """Draws a trained phrasing of a random fact."""
    fact = rng.choice(FACTS)
    return rng.choice([question for question in fact.questions if not is_held_out(fact, question)]), fact


def held_out() -> list[tuple[str, Fact]]:
    return [(question, fact) for fact in FACTS for question in fact.questions if is_held_out(fact, question)]
