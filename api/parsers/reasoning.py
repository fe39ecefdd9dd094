"""The formats in which models write their reasoning, each declared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fuseline.api.parsers.source import Reading, Sink, Source, markers

Start = Literal["open", "closed", ""]
"""Where the prompt leaves the answer: inside of reasoning, behind it, or unknown."""


@dataclass(frozen=True)
class ReasoningFormat:
    """Reasoning stands between marks, in front of the answer."""

    names: tuple[str, ...]
    """Values of --reasoning-parser."""
    begins: tuple[str, ...]
    ends: tuple[str, ...]
    is_assumed: bool = False
    """An answer without its first mark is reasoning too; otherwise it is content."""
    stops: tuple[str, ...] = ()
    """Texts that end the reasoning without its mark, and belong to what follows."""
    drops: tuple[str, ...] = ()
    """Marks around the content."""
    tokens: tuple[str, ...] = ()
    """Marks that must be tokens of the vocabulary."""

    @property
    def marks(self) -> tuple[str, ...]:
        """All texts that must reach the parser, special tokens or not."""
        return tuple(dict.fromkeys((*self.begins, *self.ends, *self.stops, *self.drops)))

    def start(self, prompt_end: str) -> Start:
        """Look for the last mark of what the template wrote behind the messages."""
        bare = prompt_end.rstrip()
        if any(bare.endswith(mark) for mark in self.begins):
            return "open"
        return "closed" if any(bare.endswith(mark) for mark in self.ends) else ""

    def start_within(self, content: str) -> Start:
        """Look for the last mark of an answer that has begun already."""
        last_begin = max((content.rfind(mark) for mark in self.begins), default=-1)
        last_end = max((content.rfind(mark) for mark in self.ends), default=-1)
        if last_begin < 0 and last_end < 0:
            return ""
        return "open" if last_begin > last_end else "closed"


class ThinkingReader:
    """Splits one choice's text. `is_thinking` tells where it stands."""

    def __init__(self, form: ReasoningFormat, start: Start) -> None:
        self._form, self._start = form, start
        self.is_thinking = start == "open" or (form.is_assumed and start != "closed")

    def read(self, source: Source, think: Sink, rest: Sink) -> Reading[None]:
        form = self._form
        if self._start != "closed":
            yield from self._begin(source, think, rest)
        if self.is_thinking:
            mark = yield from source.until(markers(*form.ends, *form.stops), think)
            self.is_thinking = False
            if mark in form.stops:
                rest(mark)
        if form.drops:
            while (yield from source.until(markers(*form.drops), rest)) is not None:
                pass
        while (yield from source.peek()):
            rest(source.take(len(source.rest)))

    def _begin(self, source: Source, think: Sink, rest: Sink) -> Reading[None]:
        """Read the first mark, if there is one, and blanks before it."""
        source.record()
        yield from source.blanks()
        mark = yield from source.goes_on_with(markers(*self._form.begins))
        before = source.recorded()
        if mark is not None:
            self.is_thinking = True
        else:
            (think if self.is_thinking else rest)(before)


THINK = (("<think>",), ("</think>",))
FORMATS = (
    ReasoningFormat(("deepseek_r1",), *THINK, is_assumed=True, tokens=("<think>", "</think>")),
    ReasoningFormat(("minimax_m2", "step3", "step3p5", "nemotron_v3"), *THINK, is_assumed=True),
    ReasoningFormat(
        (
            "qwen3", "glm45", "glm47", "deepseek_v3", "deepseek_v31", "nemotron", "olmo3", "holo2", "minimax",
            "exaone4",
        ),
        *THINK,
    ),
    ReasoningFormat(("kimi_k2",), *THINK, is_assumed=True, stops=("<|tool_calls_section_begin|>",)),
    ReasoningFormat(("kimi",), ("◁think▷",), ("◁/think▷",)),
    ReasoningFormat(("hunyuan_a13b",), *THINK, drops=("<answer>", "</answer>")),
    ReasoningFormat(("ernie45",), *THINK, is_assumed=True, drops=("<response>", "</response>")),
    ReasoningFormat(("mistral", "magistral"), ("[THINK]", "<think>"), ("[/THINK]", "</think>")),
    ReasoningFormat(("seed_oss",), ("<seed:think>",), ("</seed:think>",), is_assumed=True),
    ReasoningFormat(("gemma4",), ("<|channel>thought\n",), ("<channel|>",)),
    ReasoningFormat(("longcat",), ("<longcat_think>",), ("</longcat_think>",)),
    ReasoningFormat(
        ("cohere",), ("<|START_THINKING|>",), ("<|END_THINKING|>",),
        drops=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    ReasoningFormat(
        ("granite",),
        ("Here is my thought process:", "Here's my thought process:"),
        ("Here is my response:", "Here's my response:"),
    ),
)  # fmt: skip


def reasoning_formats() -> dict[str, ReasoningFormat]:
    """The formats by the names that --reasoning-parser takes, but for those with a stream of their own."""
    return {name: form for form in FORMATS for name in form.names}
