"""Metrics and log lines of one prompt in the engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from fuseline.api.errors import ApiError
from fuseline.api.metrics import FinishedRequest, Metrics
from fuseline.api.output.events import Done, Event, TextDelta
from fuseline.engine.client import EngineDeadError
from fuseline.engine.messages import EngineRequest, TokenOutput

LOG = logging.getLogger("fuseline.requests")


class RequestWatch:
    """A context around the request; leaving it before all choices have ended counts the rest as aborted or failed."""

    def __init__(
        self,
        request: EngineRequest,
        label: str,
        metrics: Metrics | None,
        logs_text: bool,
        max_log_len: int | None,
        on_end: Callable[[FinishedRequest], None] | None = None,
    ) -> None:
        """`on_end` is told when the request has ended, in whatever way."""
        params = request.params
        self._kept = FinishedRequest(len(request.prompt_token_ids), params.n, params.max_tokens, request.arrival_time)
        self._label, self._metrics = label, metrics
        self._texts: dict[int, str] | None = {} if logs_text else None
        self._max_log_len, self._on_end = max_log_len, on_end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = self._kept
        num_open = kept.n - len(kept.reasons)
        if num_open:
            is_failure = isinstance(error, ApiError | EngineDeadError)
            kept.reasons += ["error" if is_failure else "abort"] * num_open
            if not is_failure:
                LOG.info("%s aborted", self._label)
        if self._metrics:
            self._metrics.take_finished(kept)
        if self._on_end:
            self._on_end(kept)

    def see_output(self, output: TokenOutput) -> None:
        kept = self._kept
        if kept.queue_seconds is None:
            kept.queue_seconds = output.queue_seconds
        kept.num_cached = kept.num_cached or output.num_cached_tokens
        kept.num_preemptions += output.num_preemptions
        if output.times is not None:
            kept.take_times(output.times)

    def see(self, event: Event) -> None:
        kept = self._kept
        if isinstance(event, Done):
            kept.reasons.append(event.finish_reason)
        elif isinstance(event, TextDelta) and event.token_ids:
            kept.lengths[event.index] = kept.lengths.get(event.index, 0) + len(event.token_ids)
            now = time.time()
            last = kept.last.get(event.index)
            kept.first_token = kept.first_token or now
            if last is not None and self._metrics:
                self._metrics.take_gap(now - last, len(event.token_ids))
            kept.last[event.index] = now
        if self._texts is not None:
            self._log(self._texts, event)

    def _log(self, texts: dict[int, str], event: Event) -> None:
        """One line for each choice, when it ends."""
        if isinstance(event, TextDelta):
            texts[event.index] = texts.get(event.index, "") + event.text
        elif isinstance(event, Done):
            text = texts.pop(event.index, "")[: self._max_log_len]
            LOG.info("%s: output %d %r, %s", self._label, event.index, text, event.finish_reason)
