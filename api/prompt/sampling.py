"""Request fields to engine sampling parameters (SPEC 4.1, 6)."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from fuseline.api.config import ServerConfig
from fuseline.api.errors import bad_request
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.field_checks import read_processors
from fuseline.api.prompt.grammar import request_spec
from fuseline.api.prompt.limits import MAX_NAMED, Limits
from fuseline.api.prompt.vocabulary import special_ids, spelling
from fuseline.api.protocol.common import GenerateRequest
from fuseline.engine.messages import EngineReady
from fuseline.engine.params import GrammarSpec, SamplingParams

LOG = logging.getLogger("fuseline.requests")
MAX_BIAS = 100.0
MIN_TEMPERATURE = 0.01
"""A temperature between 0 and this is raised to it by the engine (SPEC 6.2)."""
TOKEN_ID = re.compile(r"-?[0-9]{1,18}")


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
        self._is_raw = config.engine.logprobs_mode == "raw_logprobs"
        self._pattern = config.logits_processor_pattern
        self._has_warned = False
        self._vocab = ready.vocab_size
        self._tokenizer = tokenizer
        self._limits = limits
        self._defaults = defaults
        self._backend = config.guided_decoding_backend
        self._spelling = spelling(tokenizer) if tokenizer else None
        own = tokenizer.eos_id if tokenizer else None
        self._eos = tuple(dict.fromkeys(([own] if own is not None else []) + list(ready.eos_token_ids)))

    def max_tokens(self, request: GenerateRequest, num_prompt: int, asked: int | None, names: tuple[str, str]) -> int:
        """Tokens that a prompt may generate; `asked` None fills the context. `names`: as Limits.max_tokens has them.

        Raises ApiError 400.
        """
        limit = self._limits.max_tokens(num_prompt, asked, self._defaults.get("max_new_tokens"), names)
        if (request.min_tokens or 0) > limit:
            raise bad_request(f"min_tokens ({request.min_tokens}) must not exceed max_tokens ({limit})", "min_tokens")
        return limit

    def build(
        self, request: GenerateRequest, logprobs: int | None, max_tokens: int, logprobs_name: str = "logprobs"
    ) -> SamplingParams:
        """Build the parameters that all prompts share, with the `max_tokens` of one. Raises ApiError 400.

        `logprobs_name`: the client's field that asks for so many log-probabilities.
        """
        ignore_eos = bool(request.ignore_eos)
        is_ranked = request.num_generated != request.num_choices  # best_of picks by log-probability
        grammar = self._grammar(request)
        self._limits.check_stops(request)
        self._limits.check_priority(request.priority)
        params = SamplingParams(
            n=self._num_generated(request),
            temperature=self._temperature(request),
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
            logprobs=self._logprobs(0 if logprobs is None and is_ranked else logprobs, logprobs_name),
            prompt_logprobs=self._logprobs(request.prompt_logprobs, "prompt_logprobs"),
            logit_bias=self._logit_bias(request.logit_bias),
            allowed_token_ids=self._allowed(request.allowed_token_ids),
            bad_words=self._bad_words(request.bad_words),
            logprob_token_ids=self._named(request),
            logits_processors=read_processors(request.logits_processors, self._pattern),
            grammar=grammar,
        )
        check_choice(params, self._vocab)
        return params

    def _num_generated(self, request: GenerateRequest) -> int:
        if request.use_beam_search and request.num_choices > self._vocab:
            raise bad_request(f"n: a beam search is at most as wide as the vocabulary ({self._vocab})", "n")
        return request.num_generated

    def _temperature(self, request: GenerateRequest) -> float:
        value = self._value(request, "temperature", 1.0)
        if 0 < value < MIN_TEMPERATURE and not self._has_warned:
            self._has_warned = True
            LOG.warning("temperature %g is too close to 0: %g is used (0 is greedy)", value, MIN_TEMPERATURE)
        return value

    def _named(self, request: GenerateRequest) -> tuple[int, ...]:
        """logprob_token_ids, of which one position may show as many as the flag allows."""
        ids = self._ids(request.logprob_token_ids, "logprob_token_ids")
        if ids and not self._is_raw:
            message = "logprob_token_ids needs a server with --logprobs-mode raw_logprobs"
            raise bad_request(message, "logprob_token_ids", "unsupported_value")
        self._logprobs(len(ids), "logprob_token_ids")
        return ids

    def _grammar(self, request: GenerateRequest) -> GrammarSpec | None:
        spec = request_spec(request, self._backend)
        if spec is not None:
            self.check_grammar(request)
        return spec

    def check_grammar(self, request: GenerateRequest) -> None:
        """Raises ApiError 400 where this request, or this server's tokenizer, cannot follow a grammar."""
        if request.use_beam_search:
            message = "use_beam_search does not go with structured output"
            raise bad_request(message, "use_beam_search", "unsupported_value")
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
        self._limits.check_ids(ids or (), param)
        return tuple(dict.fromkeys(ids or ()))

    def _allowed(self, ids: list[int] | None) -> tuple[int, ...]:
        if ids is not None and not ids:
            raise bad_request("allowed_token_ids must not be empty", "allowed_token_ids")
        return self._ids(ids, "allowed_token_ids")

    def _logprobs(self, count: int | None, param: str) -> int | None:
        if count is None:
            return None
        allows_all = self._max_logprobs == -1 or self._max_logprobs >= self._vocab
        if count == -1 and allows_all:
            return self._vocab
        if count < 0:
            raise bad_request(f"{param} must not be negative (-1, all, needs --max-logprobs {self._vocab})", param)
        if not allows_all and count > self._max_logprobs:
            raise bad_request(f"Cannot request more than {self._max_logprobs} logprobs", param)
        return min(count, self._vocab)

    def _logit_bias(self, bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
        bias = bias or {}
        if wrong := [key for key in bias if not TOKEN_ID.fullmatch(key)]:
            shown = ", ".join(repr(key[:20]) for key in wrong[:MAX_NAMED])
            raise bad_request(f"logit_bias: keys must be token ids, not {shown}", "logit_bias")
        self._limits.check_ids(map(int, bias), "logit_bias")
        found = {int(key): max(-MAX_BIAS, min(MAX_BIAS, value)) for key, value in bias.items()}
        return tuple(found.items())

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
