"""Names of --tool-call-parser and --reasoning-parser, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fuseline.api.config import ConfigError, ServerConfig
from fuseline.api.parsers.choice import HARMONY
from fuseline.api.parsers.formats import ToolFormat, format_of_template, tool_formats
from fuseline.api.parsers.harmony import MARKS
from fuseline.api.parsers.plugin import ToolParser, load_plugin
from fuseline.api.parsers.reasoning import ReasoningFormat, reasoning_formats
from fuseline.api.prompt.encode import TextTokenizer

HARMONY_TOOLS = ("openai", "gpt_oss")
HARMONY_REASONING = ("openai_gptoss", "gpt_oss")
TEMPLATE = "hf"
"""Takes the format whose marks the chat template writes."""


@dataclass(frozen=True)
class Formats:
    """Formats of a server's answers."""

    tools: ToolFormat | Literal["harmony"] | None = None
    plugin: type[ToolParser] | None = None
    reasoning: ReasoningFormat | Literal["harmony"] | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """All texts that must reach the parsers, special tokens or not."""
        found: list[str] = []
        for form in (self.tools, self.reasoning):
            found += MARKS if form == HARMONY else form.marks if form is not None else ()
        return tuple(found)


def tool_parser_names(plugin: str = "") -> list[str]:
    """Names that --tool-call-parser takes. Raises ConfigError for a plugin that cannot be loaded."""
    return sorted({*tool_formats(), *HARMONY_TOOLS, TEMPLATE, *(load_plugin(plugin) if plugin else ())})


def reasoning_parser_names() -> list[str]:
    return sorted({*reasoning_formats(), *HARMONY_REASONING})


def find_reasoning(name: str) -> ReasoningFormat | None:
    """The declared format of a name; None for harmony and for no name."""
    return reasoning_formats().get(name)


def find_formats(config: ServerConfig, template: str) -> Formats:
    """`template`: the chat template, which may name the format. Raises ConfigError."""
    name = config.tool_call_parser
    plugin = load_plugin(config.tool_parser_plugin).get(name) if config.tool_parser_plugin else None
    tools = None if plugin else HARMONY if name in HARMONY_TOOLS else tool_formats().get(name)
    if name == TEMPLATE and not plugin:
        tools = HARMONY if "<|channel|>" in template else format_of_template(template)
        if tools is None:
            raise ConfigError(f"--tool-call-parser {TEMPLATE}: the chat template writes no known format of tool calls")
    reasoning = HARMONY if config.reasoning_parser in HARMONY_REASONING else find_reasoning(config.reasoning_parser)
    return Formats(tools, plugin, reasoning)


def declared_formats(config: ServerConfig, template: str) -> Formats:
    """The formats that grammars can be made for: those of a plugin are not."""
    formats = replace(config, tool_parser_plugin="", tool_call_parser="") if config.tool_parser_plugin else config
    return find_formats(formats, template)


def check_vocabulary(formats: Formats, tokenizer: TextTokenizer) -> None:
    """Raises ConfigError where a mark must be a token of its own and the vocabulary has none."""
    for flag, form in (("--tool-call-parser", formats.tools), ("--reasoning-parser", formats.reasoning)):
        needed = form.tokens if isinstance(form, ToolFormat | ReasoningFormat) else ()
        if missing := [mark for mark in needed if tokenizer.token_id(mark) is None]:
            words = f"the tokenizer has no token {missing[0]!r}, which marks its text"
            raise ConfigError(f"{flag} {form.names[0]}: {words}")
