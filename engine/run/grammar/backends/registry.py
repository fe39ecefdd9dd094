"""The grammar backends by name."""

from __future__ import annotations

from collections.abc import Callable

from fuseline.engine.messages import Vocabulary
from fuseline.engine.run.grammar.backends.format_enforcer import FormatEnforcerBackend
from fuseline.engine.run.grammar.backends.guidance import GuidanceBackend
from fuseline.engine.run.grammar.backends.interface import Backend
from fuseline.engine.run.grammar.backends.outlines import OutlinesBackend
from fuseline.engine.run.grammar.backends.xgrammar import XGrammarBackend

MAKERS: dict[str, Callable[[Vocabulary], Backend]] = {
    "xgrammar": XGrammarBackend,
    "guidance": GuidanceBackend,
    "outlines": OutlinesBackend,
    "lm-format-enforcer": FormatEnforcerBackend,
}


class Backends:
    """The backends of one vocabulary, each made when it is first asked for."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._made: dict[str, Backend] = {}

    def get(self, name: str) -> Backend:
        """Raises ImportError where its package is missing."""
        if name not in self._made:
            self._made[name] = MAKERS[name](self._vocabulary)
        return self._made[name]
