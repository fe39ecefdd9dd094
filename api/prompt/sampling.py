"""Request fields to engine sampling parameters (SPEC 4.1, 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fuseline.api.config import ServerConfig
from fuseline.api.errors import bad_request
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.grammar import request_spec
from fuseline.api.prompt.limits import Limits
from fuseline.api.prompt.vocabulary import special_ids, spelling
from fuseline.api.protocol.common import GenerateRequest
from fuseline.engine.messages import EngineReady, GrammarSpec, SamplingParams

MAX_BIAS = 100.0


def refuse_unsupported(request: GenerateRequest) -> None:
    """400 in words for what later parts bring."""
    if request.use_beam_search:
        raise bad_request("use_beam_search is not supported yet", "use_beam_search", "unsupported_value")
    if request.length_penalty not in (None, 1.0):
        message = "length_penalty goes with use_beam_search, which is not supported yet"
        raise bad_request(message, "length_penalty", "unsupported_value")
    if request.logits_processors:
        raise bad_request(
            "The `logits_processors` argument is not supported by this server.",
            "logits_processors",
            "unsupported_value",
        )
    if request.best_of is not None and request.best_of != (request.n or 1):
        if request.best_of < (request.n or 1):
            raise bad_request("best_of must not be smaller than n", "best_of")
        raise bad_request("best_of other than n is not supported yet", "best_of", "unsupported_value")


class SamplingBuilder:
    """Builds SamplingParams from requests and the server's defaults."""

    def __init__(
        self,
        config: ServerConfig,
        ready: EngineReady,
        tokenizer: TextTokenizer | None,
        limits: Limits,
        defaults: Mapping[str, Any],
    ) -> None:
        self._max_logprobs = config.engine.max_logprobs
        self._vocab = ready.vocab_size
        self._tokenizer = tokenizer
        self._limits = limits
        self._defaults = defaults
        self._backend = config.guided_decoding_backend
        self._spelling = spelling(tokenizer) if tokenizer else None
        own = tokenizer.eos_id if tokenizer else None
        self._eos = tuple(dict.fromkeys(([own] if own is not None else []) + list(ready.eos_token_ids)))

    def max_tokens(self, request: GenerateRequest, num_prompt: int, asked: int | None) -> int:
        """Tokens that a prompt may generate; `asked` None fills the context. Raises ApiError 400."""
        limit = self._limits.max_tokens(num_prompt, asked, self._defaults.get("max_new_tokens"))
        if (request.min_tokens or 0) > limit:
            raise bad_request(f"min_tokens ({request.min_tokens}) must not exceed max_tokens ({limit})", "min_tokens")
        return limit

    def build(self, request: GenerateRequest, logprobs: int | None, max_tokens: int) -> SamplingParams:
        """Build the parameters that all prompts share, with the `max_tokens` of one. Raises ApiError 400."""
        ignore_eos = bool(request.ignore_eos)
        grammar = self._grammar(request)
        self._limits.check_stops(request)
        self._limits.check_priority(request.priority)
        params = SamplingParams(
            n=request.n or 1,
            temperature=self._value(request, "temperature", 1.0),
            top_k=min(max(self._value(request, "top_k", 0), 0), self._vocab),
            top_p=self._value(request, "top_p", 1.0),
            min_p=self._value(request, "min_p", 0.0),
            repetition_penalty=self._value(request, "repetition_penalty", 1.0),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            seed=None if request.seed in (None, -1) else request.seed,
            max_tokens=max_tokens,
            min_tokens=request.min_tokens or 0,
            stop_token_ids=self._stop_ids(request, grammar),
            eos_token_ids=() if ignore_eos else self._eos,
            masked_eos_token_ids=self._eos,
            logprobs=self._logprobs(logprobs, "logprobs"),
            prompt_logprobs=self._logprobs(request.prompt_logprobs, "prompt_logprobs"),
            logit_bias=self._logit_bias(request.logit_bias),
            allowed_token_ids=self._allowed(request.allowed_token_ids),
            bad_words=self._bad_words(request.bad_words),
            grammar=grammar,
        )
        check_choice(params, self._vocab)
        return params

    def _grammar(self, request: GenerateRequest) -> GrammarSpec | None:
        spec = request_spec(request, self._backend)
        if spec is not None:
            self.check_grammar()
        return spec

    def check_grammar(self) -> None:
        """Raises ApiError 400 where this server's tokenizer cannot follow a grammar."""
        if self._tokenizer is None:
            raise bad_request("structured output needs a tokenizer; this server runs without one", "response_format")
        if not self._eos:
            message = "structured output needs an end-of-sequence token, and this model has none"
            raise bad_request(message, "response_format")
        if self._spelling is None:
            raise bad_request("structured output does not work with this model's tokenizer", "response_format")

    def _stop_ids(self, request: GenerateRequest, grammar: GrammarSpec | None) -> tuple[int, ...]:
        """A token with text is text to a grammar, which alone says where the answer ends."""
        found = self._ids(request.stop_token_ids, "stop_token_ids")
        if grammar is None or not found:
            return found
        special = special_ids(self._tokenizer)
        return tuple(token for token in found if token in special)

    def _value(self, request: GenerateRequest, name: str, built_in: Any) -> Any:
        given = getattr(request, name)
        return given if given is not None else self._defaults.get(name, built_in)

    def _ids(self, ids: list[int] | None, param: str) -> tuple[int, ...]:
        for token in ids or ():
            if not 0 <= token < self._vocab:
                raise bad_request(f"{param}: token id {token} is out of vocabulary", param)
        return tuple(dict.fromkeys(ids or ()))

    def _allowed(self, ids: list[int] | None) -> tuple[int, ...]:
        if ids is not None and not ids:
            raise bad_request("allowed_token_ids must not be empty", "allowed_token_ids")
        return self._ids(ids, "allowed_token_ids")

    def _logprobs(self, count: int | None, param: str) -> int | None:
        if count is None:
            return None
        if count == -1 and self._max_logprobs == -1:
            return self._vocab
        if count < 0:
            raise bad_request(f"{param} must not be negative", param)
        if self._max_logprobs != -1 and count > self._max_logprobs:
            raise bad_request(f"Cannot request more than {self._max_logprobs} logprobs", param)
        return min(count, self._vocab)

    def _logit_bias(self, bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
        found = []
        for key, value in (bias or {}).items():
            try:
                token = int(key)
            except ValueError as error:
                raise bad_request(f"logit_bias: key {key!r} is no token id", "logit_bias") from error
            if not 0 <= token < self._vocab:
                raise bad_request(f"logit_bias: token id {token} is out of vocabulary", "logit_bias")
            found.append((token, max(-MAX_BIAS, min(MAX_BIAS, value))))
        return tuple(found)

    def _bad_words(self, words: list[str] | None) -> tuple[tuple[int, ...], ...]:
        """Each word as written and with a leading blank (kept if it differs at once and is as long)."""
        if not words:
            return ()
        if self._tokenizer is None:
            raise bad_request("bad_words needs a tokenizer; this server runs without one", "bad_words")
        found: list[tuple[int, ...]] = []
        for word in words:
            if not word.strip():
                raise bad_request("bad_words cannot contain an empty word", "bad_words")
            plain = tuple(self._tokenizer.encode(word, add_special_tokens=False))
            spaced = tuple(self._tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
            found.append(plain)
            if spaced[0] != plain[0] and len(spaced) == len(plain):
                found.append(spaced)
        return tuple(found)


def check_choice(params: SamplingParams, vocab_size: int) -> None:
    """Raises ApiError 400 when every token is banned from the first one on: nothing could be sampled."""
    banned = {word[0] for word in params.bad_words if len(word) == 1}
    if params.min_tokens and not params.grammar:
        banned |= {*params.masked_eos_token_ids, *params.stop_token_ids}
    if set(params.allowed_token_ids) - banned or (not params.allowed_token_ids and len(banned) < vocab_size):
        return
    field = "allowed_token_ids" if params.allowed_token_ids else "bad_words"
    raise bad_request(f"{field}: no token is left that may be sampled (bad_words and min_tokens ban them all)", field)
