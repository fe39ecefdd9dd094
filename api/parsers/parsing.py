"""The parsers of one server: what its flags name, and how one request's answer is parsed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from fuseline.api.config import ServerConfig
from fuseline.api.parsers.choice import ParseSettings
from fuseline.api.parsers.plugin import ParserRequest, PluginParser, ToolParser
from fuseline.api.parsers.registry import Formats, check_vocabulary, find_formats
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.prepared import AnswerOptions, ParseOptions


@dataclass(frozen=True)
class Parsing:
    """Parses no answer where no flag asks for it."""

    formats: Formats
    tokenizer: TextTokenizer | None
    kept_ids: frozenset[int] = frozenset()
    """Special tokens that parsers look for."""

    def settings(self, answer: AnswerOptions) -> tuple[ParseSettings | None, bool]:
        """(how the answer is parsed, whether special tokens are left out of its text)."""
        options = answer.parse
        if options is None:
            return None, answer.skips_special
        plugin, skips = None, answer.skips_special
        if self.formats.plugin and options.choice == "auto":
            plugin, skips = self._plugin(self.formats.plugin, options, answer)
        settings = ParseSettings(
            tools=dict(options.tools), choice=options.choice, named=options.tools[0][0] if options.tools else "",
            format=self.formats.tools, reasoning=self.formats.reasoning, start=options.start,
            is_parallel=options.is_parallel, is_limited=options.is_limited,
            shows_reasoning=options.shows_reasoning, plugin=plugin,
        )  # fmt: skip
        return settings, skips

    def _plugin(self, kind: type[ToolParser], options: ParseOptions, answer: AnswerOptions) -> tuple[partial, bool]:
        tools = [
            {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in options.tools
        ]
        request = ParserRequest(tools=tools, skip_special_tokens=answer.skips_special, stream=answer.stream)
        request = kind(self.tokenizer).adjust_request(request) or request
        make = partial(_plugin_parser, kind=kind, tokenizer=self.tokenizer, request=request, options=options)
        return make, bool(request.skip_special_tokens)


def _plugin_parser(
    index: int, kind: type[ToolParser], tokenizer: TextTokenizer | None, request: ParserRequest, options: ParseOptions
) -> PluginParser:
    return PluginParser(index, kind(tokenizer), request, options.is_parallel)


def build_parsing(config: ServerConfig, tokenizer: TextTokenizer | None, template: str | None) -> Parsing:
    """Raises ConfigError for a format that the tokenizer or the template cannot serve."""
    formats = find_formats(config, template or "")
    if tokenizer is None:
        return Parsing(formats, None)
    check_vocabulary(formats, tokenizer)
    special = {content for content, is_special in tokenizer.added_tokens.items() if is_special}
    kept = [content for content in special if any(content in mark for mark in formats.marks)]
    return Parsing(formats, tokenizer, frozenset(map(tokenizer.token_id, kept)))
