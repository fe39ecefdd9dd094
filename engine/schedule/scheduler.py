"""Decides what each step computes: one token budget, running sequences first, then waiting ones."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import numpy as np

from fuseline.compile.specs import RopeSwitchSpec
from fuseline.engine.config import SchedulerConfig
from fuseline.engine.memory.kv_manager import KVManager
from fuseline.engine.schedule.budget import StepBudget, make_batch
from fuseline.engine.schedule.delay import PromptDelay
from fuseline.engine.schedule.queue import WaitingQueue
from fuseline.engine.state.rows import RequestRows
from fuseline.engine.state.scheduled_batch import ScheduledBatch
from fuseline.engine.state.sequence import Sequence

SCORED_COST = 2
"""Tokens that one of a prompt counts as if its log-probability is wanted: with a row of logits, a softmax and the best
tokens of it a step takes about twice as long, and whoever comes waits for that step."""
MOST_TURNS = 64
"""Prompts of bodies, behind their first ones, that start in a step: who comes during a step of hundreds of short ones
would wait for all of them."""


@dataclass(frozen=True)
class Limits:
    """The scheduler's configuration with its automatic values resolved."""

    num_tokens: int
    num_prefill_tokens: int
    """Token budget of the sequences that are more than one token behind."""
    num_seqs: int
    num_logits: int
    """Logits rows of a step: one for each sequence, and, as far as the model has memory, for each of its drafts."""
    num_partial: int
    num_long_partial: int
    long_threshold: int
    """A sequence with more tokens is long and computes at most this many a step; 0: nothing is long."""
    is_priority: bool
    is_chunked: bool
    delay_factor: float = 0.0

    @property
    def short_tokens(self) -> int:
        """A waiting prompt of at most so many tokens passes long ones: half of a step's prompts; 0: none does."""
        return self.num_prefill_tokens // 2 if self.is_chunked and not self.is_priority else 0

    @staticmethod
    def resolve(config: SchedulerConfig, max_model_len: int, num_drafts: int = 0, max_logits: int = 0) -> Limits:
        """`num_drafts`: most drafts of a sequence and step. `max_logits`: as ModelInfo has it."""
        threshold = config.long_prefill_token_threshold
        if threshold == 0 and config.max_num_partial_prefills > 1:
            threshold = max(1, int(0.04 * max_model_len))
        num_logits = config.max_num_seqs * (1 + num_drafts)
        return Limits(
            num_tokens=config.max_num_batched_tokens,
            num_prefill_tokens=config.chunked_prefill_size or config.max_num_batched_tokens,
            num_seqs=config.max_num_seqs,
            num_logits=min(num_logits, max_logits) if max_logits else num_logits,
            num_partial=config.max_num_partial_prefills,
            num_long_partial=config.max_long_partial_prefills,
            long_threshold=threshold,
            is_priority=config.scheduling_policy == "priority",
            is_chunked=config.enable_chunked_prefill,
            delay_factor=config.scheduler_delay_factor,
        )


class Scheduler:
    """May be asked for the next step while the last one runs: tokens that a started step will yield are counted."""

    def __init__(
        self, limits: Limits, rows: RequestRows, kv: KVManager, rope_switch: RopeSwitchSpec | None = None
    ) -> None:
        self.limits = limits
        self.rows = rows
        self.kv = kv
        self.rope_switch = rope_switch
        self.running: list[Sequence] = []
        self.waiting = WaitingQueue(limits.short_tokens)
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.host_queries = 0
        self.host_hits = 0
        self._delay = PromptDelay(limits.delay_factor) if limits.delay_factor else None
        self._no_drafts = np.zeros(limits.num_seqs, np.int64)
        self._free_rows = list(range(limits.num_seqs - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, seq: Sequence) -> None:
        self.waiting.push(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a finished or aborted sequence and free its blocks."""
        if seq.row >= 0:
            self._leave(seq)
        self.waiting.remove(seq)
        self.kv.discard_swapped(seq)

    def forget_computed(self, request_id: str) -> None:
        """The KV that a request has computed is faulty: nobody finds it, nor what was computed from it, from now on."""
        keys = self.kv.forget_request(request_id)
        for seq in (*self.running, *self.waiting):
            if not keys.isdisjoint(seq.keys):
                self.kv.stop_commits(seq)

    def schedule(self) -> ScheduledBatch:
        """The next step. Empty only when nothing waits or runs."""
        self._switch_ropes()
        self.waiting.resume(self.kv.in_flight)
        counts = np.zeros(self.limits.num_seqs, np.int64)
        num_drafts = np.zeros_like(counts) if self.rows.with_drafts else self._no_drafts
        spare_rows = self.limits.num_logits - len(self.running)
        scored_cost = SCORED_COST if self.limits.is_chunked else 1
        budget = StepBudget(self.limits.num_tokens, spare_rows, counts, num_drafts, scored_cost=scored_cost)
        remaining = self.rows.num_remaining()
        self._continue_streams(remaining, budget)
        budget.tokens_left = min(budget.tokens_left, self.limits.num_prefill_tokens)
        kept = self._tokens_for_short(budget)
        budget.tokens_left -= kept
        self._schedule_running(remaining, budget)
        if not budget.has_preempted and self._is_delay_over():
            self._admit_waiting(budget, kept)
            if self._delay and budget.started:
                self._delay.started()
        batch = make_batch(budget, self.rows, self.kv.swap)
        # An empty batch is not computed: its copies wait for the next one.
        if not batch.num_tokens:
            return batch
        forks, states = self.kv.take_forks(), self.kv.take_state_copies()
        return replace(batch, forks=forks, state_copies=states) if forks or states is not None else batch

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Let `child`, whose last token alone is not computed for its parent, run with that one's KV. False where there
        is no row or block for it.
        """
        num_computed = len(child.stored) - 1
        if len(self._free_rows) <= self.waiting.num_deferred or not self.kv.fork(parent, child, num_computed):
            return False
        child.row = self._free_rows.pop()
        self.running.append(child)
        self.rows.load(child, num_computed)
        self.kv.load_table(child)
        return True

    def preempt_all(self) -> None:
        """Everything is computed anew, what was swapped out too."""
        for seq in list(self.running):
            self._requeue(seq)
        for seq in self.waiting:
            self.kv.discard_swapped(seq)
        if self.kv.swap:
            self.kv.swap.copies.clear()
        self.kv.take_forks()
        self.kv.take_state_copies()

    def _is_delay_over(self) -> bool:
        return self._delay is None or self._delay.is_over(self.waiting, bool(self.running))

    def _switch_ropes(self) -> None:
        if self.rope_switch is None:
            return
        rows = self.rows
        for row in np.flatnonzero((rows.variant == 0) & (rows.num_tokens > self.rope_switch.threshold)):
            seq = rows.sequences[row]
            self._requeue(seq)
            seq.switch_rope()

    def _continue_streams(self, remaining: np.ndarray, budget: StepBudget) -> None:
        """Schedule the sequences that are one token behind if blocks are free for all: most steps are just that."""
        is_stream = remaining == 1
        if self.rows.with_drafts:
            is_stream &= self.rows.num_drafts == 0
        streams = is_stream.nonzero()[0]
        if len(streams) > budget.tokens_left:
            return
        is_full = self.rows.num_computed[streams] == self.kv.num_slots[streams]
        full = streams[is_full]
        if self.kv.grow_streams(full, [self.rows.sequences[row] for row in full.tolist()]):
            budget.add_rows(streams)
        else:
            budget.add_rows(streams[~is_full])

    def _tokens_for_short(self, budget: StepBudget) -> int:
        """Tokens, up to half of those left, that long prompts leave to short ones that wait: so a prompt of a few
        tokens does not wait for all of a long one that runs, nor for a crowd of them that has come before."""
        has_row = min(budget.spare_rows, len(self._free_rows)) > self.waiting.num_deferred
        if not has_row or self.waiting.peek_short() is None:
            return 0
        return min(self.waiting.num_short_tokens(), budget.tokens_left // 2)

    def _schedule_running(self, remaining: np.ndarray, budget: StepBudget) -> None:
        rows = ((remaining > 0) & (budget.counts == 0)).nonzero()[0]
        behind = [(self.rows.sequences[row], int(remaining[row])) for row in rows.tolist()]
        # Sequences one token behind go first, so that a long prompt never makes a stream of tokens wait.
        for seq, num_remaining in sorted(behind, key=lambda pair: (pair[1] > 1, pair[0].order)):
            if seq.row < 0:
                continue
            count = _to_border(seq, seq.num_computed, self._chunk(seq, num_remaining, budget))
            if count and self._add_with_drafts(seq, count, budget):
                continue
            if count and self._make_room(seq, seq.num_computed + count, budget):
                budget.add(seq, count)

    def _add_with_drafts(self, seq: Sequence, count: int, budget: StepBudget) -> bool:
        """Schedule the drafts of a sequence too, as far as there is room without preempting anyone."""
        num_drafts = int(min(self.rows.num_drafts[seq.row], budget.tokens_left - count, budget.spare_rows))
        if num_drafts <= 0 or not self.kv.grow(seq, seq.num_computed + count + num_drafts):
            return False
        budget.add(seq, count + num_drafts, num_drafts)
        return True

    def _chunk(self, seq: Sequence, num_remaining: int, budget: StepBudget) -> int:
        """How many of its remaining tokens a sequence may compute in this step; 0: none."""
        left = max(0, budget.tokens_left)
        count = min(num_remaining, max(left // budget.cost(seq), min(left, 1)))
        if self._is_long(seq):
            count = min(count, self.limits.long_threshold)
        if not self.limits.is_chunked and count < num_remaining:
            return 0
        if seq.wants_every_row:
            count = min(count, budget.spare_rows + (seq.row >= 0))
        return count

    def _is_long(self, seq: Sequence) -> bool:
        return self.limits.is_chunked and 0 < self.limits.long_threshold < seq.num_tokens

    def _make_room(self, seq: Sequence, num_tokens: int, budget: StepBudget) -> bool:
        """Preempt the last in order until `seq` fits. False when that was `seq` itself."""
        while not self.kv.grow(seq, num_tokens):
            victim = max(self.running, key=lambda s: s.order)
            self._preempt(victim, budget)
            if victim is seq:
                return False
        return True

    def _admit_waiting(self, budget: StepBudget, kept: int) -> None:
        """Start those that wait, in their order, until a long one finds no place in the step; from then on short ones.

        `kept`: tokens beyond the budget for short ones, from the first one that is to start.
        """
        passed_over: list[Sequence] = []
        is_passing = False
        while budget.tokens_left + kept > 0:
            is_passing |= budget.tokens_left <= 0
            seq = self.waiting.peek_short() if is_passing else self.waiting.peek()
            if seq is None:
                break
            if kept and self.waiting.is_short(seq):
                budget.tokens_left, kept = budget.tokens_left + kept, 0
            if seq.num_pending:
                self.waiting.remove(seq)
                passed_over.append(seq)
                continue
            if (seq.request.turn and budget.num_turns >= MOST_TURNS) or not self._has_row(seq, budget):
                break
            if self.rope_switch and seq.variant == 0 and seq.num_tokens > self.rope_switch.threshold:
                # It lost its row while a step kept several of its drafts.
                self.kv.discard_swapped(seq)
                seq.switch_rope()
            begin = self.kv.find_start(seq)
            awaited = None if seq.swapped else self.kv.find_in_flight(seq, begin // self.kv.block_size)
            if awaited is not None:
                if self.kv.states:
                    self._keep_state(seq, awaited, budget)
                self.waiting.defer(seq, awaited)
                continue
            num_remaining = seq.num_tokens - begin
            count = self._chunk(seq, num_remaining, budget)
            if count < num_remaining and self._is_long(seq) and not self._has_long_place(budget):
                self.waiting.remove(seq)
                passed_over.append(seq)
                continue
            if count == 0 or (count < num_remaining and not self._has_partial_place(budget)):
                if is_passing:
                    break
                is_passing = True
                continue
            self.kv.choose_borders(seq, begin)
            if not self._start(seq, begin, _to_border(seq, begin, count), budget):
                break
        for seq in passed_over:
            self.waiting.push(seq)

    def _keep_state(self, seq: Sequence, key: bytes, budget: StepBudget) -> None:
        """`seq` waits for the block `key`: whoever computes it ends a chunk there, and its state is kept."""
        other, border = self.kv.in_flight[key], (seq.keys.index(key) + 1) * self.kv.block_size
        if border not in other.borders:
            other.borders.append(border)
        budget.shorten(other, border - other.num_computed)

    def _has_row(self, seq: Sequence, budget: StepBudget) -> bool:
        # A deferred sequence keeps a row: those who pass cannot take it, and no more are deferred than there are rows.
        num_free = min(budget.spare_rows, len(self._free_rows))
        return num_free > self.waiting.num_deferred or self._preempt_lower(seq, budget)

    def _preempt_lower(self, seq: Sequence, budget: StepBudget) -> bool:
        """Preempt the last sequence, if it is one of a body of many prompts whose turn comes after that of `seq`, or,
        under the priority policy, one of a lower priority."""
        victim = max(self.running, key=lambda s: s.order, default=None)
        if victim is None or victim.order < seq.order:
            return False
        is_lower = self.limits.is_priority and victim.request.priority > seq.request.priority
        if victim.request.turn == 0 and not is_lower:
            return False
        self._preempt(victim, budget)
        return True

    def _is_partial(self, budget: StepBudget) -> np.ndarray:
        """[R] bool: rows whose prompt this step leaves unfinished, but for less than a block behind a kept state."""
        rest = self.kv.block_size if self.kv.states else 0
        return self.rows.num_remaining() > np.maximum(1, budget.counts) + rest

    def _has_partial_place(self, budget: StepBudget) -> bool:
        return np.count_nonzero(self._is_partial(budget)) < self.limits.num_partial

    def _has_long_place(self, budget: StepBudget) -> bool:
        is_long = self.rows.num_tokens > self.limits.long_threshold
        return np.count_nonzero(self._is_partial(budget) & is_long) < self.limits.num_long_partial

    def _start(self, seq: Sequence, begin: int, count: int, budget: StepBudget) -> bool:
        num_tokens = begin + count
        was_swapped = seq.swapped is not None
        while not self.kv.start(seq, begin, num_tokens):
            if not self._preempt_lower(seq, budget):
                return False
        self.waiting.remove(seq)
        seq.row = self._free_rows.pop()
        self.running.append(seq)
        self.rows.load(seq, begin)
        self.kv.load_table(seq)
        self.kv.grow(seq, num_tokens)
        budget.start(seq, count)
        self._count_hit(seq, begin)
        if self.kv.swap and seq.num_preemptions:
            self.host_queries += begin if was_swapped else seq.num_tokens - 1
            self.host_hits += begin if was_swapped else 0
        return True

    def _count_hit(self, seq: Sequence, num_found: int) -> None:
        """A request is looked up once: neither its further choices nor its restarts count."""
        if not seq.was_looked_up and seq.index == 0 and seq.reads_cache and seq.shares_prefix:
            seq.was_looked_up = True
            seq.num_cached = num_found
            self.prefix_queries += seq.prompt_len
            self.prefix_hits += seq.num_cached

    def _preempt(self, seq: Sequence, budget: StepBudget) -> None:
        budget.drop(seq)
        budget.has_preempted = True
        self.num_preemptions += 1
        seq.num_preemptions += 1
        self.kv.swap_out(seq)
        self._requeue(seq)

    def _requeue(self, seq: Sequence) -> None:
        self._leave(seq)
        self.waiting.push(seq)

    def _leave(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._free_rows.append(seq.row)
        self.rows.leave(seq)
        self.kv.free(seq)


def _to_border(seq: Sequence, begin: int, count: int) -> int:
    """`count` tokens from `begin` on, or those up to the first border at which the state of the sequence is kept."""
    return min([count, *(border - begin for border in seq.borders if border > begin)])


def scheduler_class(path: str) -> type[Scheduler]:
    """The class of --scheduler-cls; empty: Scheduler. Raises ValueError for a path that leads to no subclass of it."""
    if not path:
        return Scheduler
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--scheduler-cls {path} cannot be imported ({error}); give module.Class") from error
    if not (isinstance(found, type) and issubclass(found, Scheduler)):
        raise ValueError(f"--scheduler-cls {path} is no subclass of {Scheduler.__module__}.Scheduler")
    return found
