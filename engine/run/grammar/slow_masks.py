"""Masks of slow grammars are made in a thread beside the steps, which go on without their sequences meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from fuseline.engine.state.rows import RequestRows
from fuseline.engine.state.sequence import Sequence

PATIENCE_SECONDS = 0.002
"""How long a step waits for masks: those of a grammar that only might be slow are there by then."""


class SlowMasks:
    """Called by the engine's thread. `on_ready` is called by another one when a mask is there."""

    def __init__(self, rows: RequestRows) -> None:
        self.on_ready: Callable[[], None] = lambda: None
        self._rows = rows
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: dict[Sequence, Future[None]] = {}
        self._new: list[Future[None]] = []
        """Jobs that the next step has yet to wait for, for a moment."""
        self._first: list[Sequence] = []
        """Sequences that wait for their first mask, outside of the scheduler."""

    @property
    def is_waiting(self) -> bool:
        """Whether masks are being made, and none is there that nobody has been told of."""
        return bool(self._jobs) and not any(job.done() for job in self._jobs.values())

    def add(self, seq: Sequence) -> None:
        """Make the first mask of a sequence that no step knows yet; `take_first` hands it back."""
        self._start(seq, [])
        self._first.append(seq)

    def take_first(self) -> list[Sequence]:
        """Sequences whose first mask is there since the last call."""
        done = [seq for seq in self._first if self._jobs[seq].done()]
        for seq in done:
            self._first.remove(seq)
            del self._jobs[seq]
        return done

    def hold(self) -> bool:
        """Keep rows out of the next step whose mask is still to be made, and begin with it. True if there are any."""
        rows = self._rows
        rows.is_held[:] = False
        for row in np.flatnonzero(rows.has_grammar).tolist():
            seq = rows.sequences[row]
            if seq in self._jobs or seq.grammar.is_slow:
                rows.num_drafts[row] = 0
                rows.is_held[row] = self._is_behind(seq, row)
        self._forget_finished()
        if rows.is_held.any():
            self._wait_a_little()
        return bool(rows.is_held.any())

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _is_behind(self, seq: Sequence, row: int) -> bool:
        rows = self._rows
        job = self._jobs.get(seq)
        if job is not None and not job.done():
            return True
        self._jobs.pop(seq, None)
        known, prompt = int(rows.num_known[row]), int(rows.prompt_len[row])
        if known < rows.num_tokens[row]:
            return True
        if not seq.grammar.is_slow or seq.grammar.has_mask(known - prompt):
            return False
        self._new.append(self._start(seq, rows.tokens[row, prompt + seq.grammar.num_seen : known].tolist()))
        return True

    def _wait_a_little(self) -> None:
        """Masks that are soon there let their rows take part in this step."""
        jobs, self._new = self._new, []
        if jobs:
            wait(jobs, timeout=PATIENCE_SECONDS)
            for row in np.flatnonzero(self._rows.is_held).tolist():
                self._rows.is_held[row] = self._is_behind(self._rows.sequences[row], row)

    def _forget_finished(self) -> None:
        finished = [seq for seq, job in self._jobs.items() if seq.is_finished and job.done()]
        for seq in finished:
            if seq not in self._first:
                del self._jobs[seq]

    def _start(self, seq: Sequence, tokens: list[int]) -> Future[None]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "fuseline-masks")
        job = self._jobs[seq] = self._pool.submit(seq.grammar.prepare, seq.grammar.num_seen, tokens)
        job.add_done_callback(lambda _: self.on_ready())
        return job
