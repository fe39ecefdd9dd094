"""One prompt of /v1/completions: its token ids, and the text that echo shows of it (SPEC 4.1, 4.3, 4.5)."""

from __future__ import annotations

from collections.abc import Sequence

from fuseline.api.errors import bad_request
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.limits import Limits
from fuseline.api.protocol.completion import CompletionRequest


class CompletionPrompts:
    """All methods raise ApiError 400."""

    def __init__(self, tokenizer: TextTokenizer | None, limits: Limits) -> None:
        self._tokenizer, self._limits = tokenizer, limits

    def encode(self, body: CompletionRequest, prompt: str | list[int]) -> tuple[Sequence[int], str | None]:
        """Token ids, and the text that is echoed; None without echo."""
        if body.suffix:
            ids: Sequence[int] = self._around_middle(body, prompt)
        else:
            ids = self._ids(body, prompt, body.add_special_tokens is not False)
        self._limits.check_prompt(ids)
        kept = self._limits.kept(len(ids), body)
        return ids[kept], self._echo(prompt, ids, kept) if body.echo else None

    def _ids(self, body: CompletionRequest, prompt: str | list[int], adds_special: bool) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            raise bad_request("this server runs without a tokenizer (--skip-tokenizer-init): send token ids", "prompt")
        if body.truncate_prompt_tokens is None:
            self._limits.check_text(prompt)
        return self._tokenizer.encode(prompt, adds_special)

    def _around_middle(self, body: CompletionRequest, prompt: str | list[int]) -> list[int]:
        """Prefix and suffix around what the model fills in."""
        fim = self._tokenizer.fim if self._tokenizer else None
        if fim is None:
            raise bad_request(
                "suffix is not currently supported: the model's tokenizer has no tokens for filling in the middle",
                "suffix", "unsupported_value",
            )  # fmt: skip
        if body.truncate_prompt_tokens is not None:
            raise bad_request("truncate_prompt_tokens does not go with suffix", "truncate_prompt_tokens")
        self._limits.check_text(body.suffix, "suffix")
        adds_special = isinstance(prompt, str) and body.add_special_tokens is not False
        begin = self._tokenizer.encode("", True) if adds_special else []
        begin = [token for token in begin if token != self._tokenizer.eos_id]
        prefix = self._ids(body, prompt, False)
        return [*begin, *fim.prompt(prefix, self._tokenizer.encode(body.suffix, False))]

    def _echo(self, prompt: str | list[int], ids: Sequence[int], kept: slice) -> str:
        is_whole = kept == slice(0, len(ids))
        if isinstance(prompt, str) and is_whole:
            return prompt
        if self._tokenizer is None:
            return ""
        if isinstance(prompt, str):
            kept = self._within_text(prompt, ids, kept)
        shown = ids[kept] if isinstance(prompt, str) or not is_whole else prompt
        return self._tokenizer.decode(shown, False)

    def _within_text(self, prompt: str, ids: Sequence[int], kept: slice) -> slice:
        """`kept` without the special tokens that the tokenizer has put around the text's own."""
        plain = self._tokenizer.encode(prompt, False)
        for begin in range(len(ids) - len(plain) + 1):
            if ids[begin : begin + len(plain)] == plain:
                return slice(max(kept.start, begin), min(kept.stop, begin + len(plain)))
        return kept
