"""Admission: the sizes one request may ask for, and the number of sequences of all requests together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fuseline.api.config import ServerConfig
from fuseline.api.errors import ApiError, bad_request
from fuseline.api.protocol.common import GenerateRequest


class Admission:
    """Counts sequences (prompts x n), one for a request that is being prepared, until their answer has ended."""

    def __init__(self, config: ServerConfig) -> None:
        scheduler = config.engine.scheduler
        self._config = config
        self._num_queued = scheduler.max_num_queued_reqs or 4 * scheduler.max_num_seqs
        self._capacity = scheduler.max_num_seqs + self._num_queued
        self.num_sequences = 0

    @contextmanager
    def hold(self) -> Iterator[Places]:
        """The places of one request, none at first; all are given back at the end."""
        places = Places(self)
        try:
            yield places
        finally:
            self.num_sequences -= places.num_sequences

    def check_room(self, num_more: int, num_sequences: int) -> None:
        """Raises ApiError 429 when so many more, of a request's `num_sequences`, do not all fit (SPEC D19)."""
        if self.num_sequences + num_more > self._capacity:
            raise self._full(num_sequences)

    def _full(self, num_sequences: int) -> ApiError:
        message = "too many requests are waiting; try again later"
        if num_sequences > self._capacity:
            message = (
                f"the request asks for {num_sequences} sequences (prompts x n), and this server takes in at most "
                f"{self._capacity} (--max-num-seqs and --max-num-queued-reqs); send several smaller requests"
            )
        return ApiError(429, message, code="rate_limit_exceeded", retry_after=1)

    def check(self, request: GenerateRequest, num_prompts: int = 1) -> int:
        """The request's number of sequences. Raises ApiError 400 for more of anything than the flags allow."""
        config, n = self._config, request.num_generated
        _at_most(config.max_num_prompts, num_prompts, "prompt", "prompts in one request", "max-num-prompts")
        _at_most(config.max_n, n, "n" if n == request.num_choices else "best_of", "choices", "max-n")
        _at_most(config.max_stop_strings, len(request.stops), "stop", "stop strings", "max-stop-strings")
        longest = max(map(len, request.stops), default=0)
        _at_most(config.max_stop_length, longest, "stop", "characters in a stop string", "max-stop-length")
        for field in ("logit_bias", "bad_words", "stop_token_ids"):
            flag = f"max_{field}"
            _at_most(getattr(config, flag), len(getattr(request, field) or ()), field, "entries", flag)
        return num_prompts * n


class Places:
    """The sequences that one request is counted for."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.num_sequences = 0

    def take(self, num_sequences: int) -> None:
        """Be counted for so many from now on. Raises ApiError 429 when they do not all fit."""
        num_more = num_sequences - self.num_sequences
        self._admission.check_room(num_more, num_sequences)
        self._admission.num_sequences += num_more
        self.num_sequences = num_sequences


def _at_most(limit: int, found: int, field: str, things: str, flag: str) -> None:
    if found > limit:
        raise bad_request(f"{field}: at most {limit} {things} are allowed (--{flag.replace('_', '-')})", field)
