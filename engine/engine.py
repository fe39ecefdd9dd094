"""Requests to tokens and vectors, a step at a time: schedule, prepare, launch, compute, commit, store, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Seq

import numpy as np

from fuseline.engine.beams import Beams
from fuseline.engine.config import EngineConfig
from fuseline.engine.memory.kv_manager import KVManager
from fuseline.engine.messages import AWAKE, EngineRequest, StepOutputs, StepTimes
from fuseline.engine.outputs import Ending, new_tokens, on_fast_path, pooled_output, store_prompt_scores
from fuseline.engine.requests import Requests
from fuseline.engine.run.device import Device
from fuseline.engine.run.grammar.compiler import GrammarCompiler
from fuseline.engine.run.grammar.masks import ForcedTokens
from fuseline.engine.run.grammar.slow_masks import SlowMasks
from fuseline.engine.run.runner import ForkingModel, Model, PreparedBatch, Runner
from fuseline.engine.run.sampling import NOT_FINITE, OK, PROCESSOR_FAILED, Launched, Sampled, StepResult
from fuseline.engine.run.speculate.drafting import Drafter, Drafting, kept_positions
from fuseline.engine.schedule.scheduler import Limits, scheduler_class
from fuseline.engine.schedule.stages import choose_stage_order
from fuseline.engine.state.rows import RequestRows
from fuseline.engine.state.scheduled_batch import ScheduledBatch
from fuseline.engine.state.sequence import Sequence
from fuseline.engine.stats import make_stats

logger = logging.getLogger("fuseline.engine")

NOT_FINITE_ERROR = "the model's output is not finite for this request"
NOTHING_LEFT_ERROR = (
    "no token is left to choose from: the grammar, logit_bias, allowed_token_ids, bad_words, min_tokens, the penalties "
    "or the temperature of this request exclude all"
)


PROCESSOR_ERROR = "a logits processor of this request failed; the server's log has the cause"


class Engine:
    """Not thread-safe: one loop calls everything.

    `num_blocks`: usable blocks per cache group; `num_host_blocks`: those to swap to, none if nothing is swapped;
    `num_states`: slots of recurrent states, 0 for a model without. `drafter`: proposes tokens that steps verify.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: Model,
        num_blocks: Seq[int],
        device: Device,
        num_host_blocks: Seq[int] = (),
        num_states: int = 0,
        drafter: Drafter | None = None,
    ) -> None:
        info = model.info
        if drafter is not None and info.state_specs:
            raise ValueError("a recurrent state cannot be taken back: no drafts for this model")
        self.config = config
        self.max_model_len = config.compile.max_model_len or info.max_model_len
        self.num_blocks = tuple(num_blocks)
        self._order = choose_stage_order(device.is_asynchronous, config.scheduler.async_scheduling)
        can_jump = not info.state_specs
        num_drafts = max(drafter.num_tokens if drafter else 0, ForcedTokens.num_tokens if can_jump else 0)
        limits = Limits.resolve(config.scheduler, self.max_model_len, num_drafts, info.max_logits)
        windows, num_seqs, block_size = [g.window for g in info.cache_groups], limits.num_seqs, config.cache.block_size
        self.rows = RequestRows(num_seqs, self.max_model_len, num_drafts > 0)
        self.kv = KVManager(
            windows, num_blocks, block_size, num_seqs, self.max_model_len, num_host_blocks, num_states
        )  # fmt: skip
        self.scheduler = scheduler_class(config.scheduler.scheduler_cls)(limits, self.rows, self.kv, info.rope_switch)
        self.runner = Runner(model, device, self.rows, self.kv, limits.num_tokens, config)
        self.grammars = GrammarCompiler(config.grammars, info.vocab_size)
        self.slow_masks = SlowMasks(self.rows)
        self._waits_for_masks = False  # nothing else can be computed
        self.requests = Requests(config, info, self.scheduler, self.max_model_len, self.grammars, self.slow_masks)
        self.beams = Beams(self.requests, self.scheduler, self.max_model_len, isinstance(model, ForkingModel))
        threshold = info.rope_switch.threshold if info.rope_switch else None
        self.drafting = Drafting(drafter, self.rows, info.vocab_size, threshold) if drafter else None
        self.forced = ForcedTokens(self.runner.sampler.masks, self.rows, threshold) if can_jump else None
        self.sleep_level = AWAKE

    @property
    def is_asleep(self) -> bool:
        return self.sleep_level != AWAKE

    @property
    def is_computing(self) -> bool:
        """Whether a thread computes a step."""
        return self._order.is_computing

    @property
    def has_work(self) -> bool:
        is_waiting = self._waits_for_masks and self.slow_masks.is_waiting
        is_busy = self._order.is_running or (self.scheduler.has_work and not self.is_asleep and not is_waiting)
        return is_busy or bool(self.requests.report)

    def step(self) -> StepOutputs:
        """One turn of the loop: the stages below, in the order that the configuration wants."""
        if not self.is_asleep:
            self._order.step(self)
        report = self.requests.take_report()
        return report.message(make_stats(self.scheduler, report, self.drafting, self.sleep_level))

    def waits_for_tokens(self) -> bool:
        return self.forced is not None and self.drafting is None and self.forced.is_due()

    def schedule(self) -> ScheduledBatch:
        if self.drafting:
            self.drafting.propose()
        is_held = bool(self.rows.has_grammar.any()) and self.slow_masks.hold()
        if self.forced:
            # Steps without a grammar cost nothing more than those of an engine that knows none.
            self.rows.with_drafts = self.drafting is not None or self.forced.is_possible()
            self.forced.propose()
        scheduled = self.scheduler.schedule()
        self._waits_for_masks = is_held and not scheduled.num_tokens
        return scheduled

    def prepare(self, scheduled: ScheduledBatch) -> PreparedBatch:
        return self.runner.prepare(scheduled)

    def launch(self, batch: PreparedBatch) -> None:
        scheduled, rows = batch.scheduled, self.rows
        self._note_start(scheduled)
        self.runner.fill(batch)
        rows.num_computed[scheduled.rows] += scheduled.num_new
        rows.num_tokens[scheduled.rows[scheduled.sampling]] += 1  # once for a row, whatever drafts it brings

    def compute(self, batch: PreparedBatch) -> Launched:
        return self.runner.run(batch)

    def commit(self, batch: PreparedBatch) -> None:
        scheduled, rows, size = batch.scheduled, self.rows, self.kv.block_size
        num_settled = scheduled.num_computed + scheduled.num_new
        if scheduled.num_drafts is not None:
            num_settled -= scheduled.num_drafts
        is_filled = scheduled.num_computed // size != num_settled // size
        for row, end in zip(scheduled.rows[is_filled].tolist(), num_settled[is_filled].tolist(), strict=True):
            self.kv.commit(rows.sequences[row], end)
        for row in scheduled.rows[rows.is_parent[scheduled.rows]].tolist() if rows.is_parent.any() else ():
            seq = rows.sequences[row]
            if seq.num_computed >= seq.prompt_len:
                self.requests.release_children(seq)

    def store(self, batch: PreparedBatch, result: StepResult) -> None:
        scheduled, sampled = batch.scheduled, result.sampled
        if batch.times is not None:
            self._note_times(scheduled, batch.times)
        self._waits_for_masks = False
        if sampled is None:
            return
        places, generation = scheduled.rows[scheduled.sampling], scheduled.generation[scheduled.sampling]
        tokens, lengths, stays = sampled.tokens, scheduled.lengths, self.rows.generation[places] == generation
        is_new = stays
        if batch.drafts is not None:
            batch.kept = kept_positions(scheduled, batch.drafts, tokens, sampled.status == OK)
            is_new = stays & batch.kept
        self.rows.append(places[is_new], tokens[is_new], lengths[is_new])
        for index in (~stays).nonzero()[0].tolist():
            seq = batch.evicted[index] = self.rows.evicted[int(places[index]), int(generation[index])]
            if batch.kept is None or batch.kept[index]:
                seq.stored.append(int(tokens[index]))
            seq.num_pending = 0
        for index in batch.evicted:
            self.rows.evicted.pop((int(places[index]), int(generation[index])), None)
        if batch.kept is not None:
            self._settle_drafts(batch, stays)

    def report(self, batch: PreparedBatch, result: StepResult) -> None:
        scheduled, sampled = batch.scheduled, result.sampled
        if batch.scoring:
            for seq in store_prompt_scores(batch.scoring, result.scores):
                self._fail(seq, NOT_FINITE)
        if batch.complete:
            self._report_complete(batch, result)
        if sampled is None:
            return
        rows = scheduled.rows[scheduled.sampling]
        is_fast = on_fast_path(batch, sampled, self.rows)
        self.requests.report.add_deltas(self.rows.handle[rows[is_fast]], sampled.tokens[is_fast])
        is_slow = ~is_fast if batch.kept is None else batch.kept & ~is_fast
        slow: dict[int, list[int]] = {}
        for index in is_slow.nonzero()[0].tolist():
            slow.setdefault(int(scheduled.sampling[index]), []).append(index)
        for positions in slow.values():
            first = positions[0]
            seq = batch.evicted.get(first) or self.rows.sequences[rows[first]]
            if seq is not None and not seq.is_finished:
                self._take_tokens(seq, sampled, positions, scheduled.lengths)
        self.beams.advance()

    def add(self, request: EngineRequest) -> None:
        """Queue a request. One that cannot be served fails alone, with the next step's outputs."""
        self.requests.add(request)

    def admit_compiled(self) -> None:
        """Queue the requests whose grammar has been compiled, refuse those whose grammar cannot be."""
        self.requests.admit_compiled()

    def abort(self, request_id: str) -> None:
        """End a request's unfinished choices and free their blocks; unknown ids are ignored."""
        self.requests.abort(request_id)

    def abort_choice(self, request_id: str, index: int) -> None:
        """End one choice of a request; the others go on. Unknown ones are ignored."""
        self.requests.abort_choice(request_id, index)

    def reset_prefix_cache(self) -> None:
        self.kv.reset_prefix_cache()

    def pause(self, level: int = 0) -> None:
        """Stop computing; what ran waits and will be computed anew. `level`: how deeply it sleeps, for the counts."""
        self._order.drain(self)
        self.scheduler.preempt_all()
        self.kv.reset_prefix_cache()
        self.sleep_level = max(self.sleep_level, level)
        self.requests.report.has_news = True

    def resume(self) -> None:
        self.sleep_level = AWAKE
        self.requests.report.has_news = True

    def _note_start(self, scheduled: ScheduledBatch) -> None:
        """Note queue times of sequences that run for the first time, and the counts of the step."""
        report = self.requests.report
        num_left = np.maximum(self.rows.prompt_len[scheduled.rows] - scheduled.num_computed, 0)
        report.num_step_tokens += scheduled.num_tokens
        report.num_prompt_tokens += int(np.minimum(num_left, scheduled.num_new).sum())
        for seq in scheduled.started:
            if seq.queue_seconds is None:
                arrival = seq.request.arrival_time
                seq.queue_seconds = max(0.0, time.time() - arrival) if arrival else 0.0

    def _note_times(self, scheduled: ScheduledBatch, times: StepTimes) -> None:
        """Add what a step took to its sequences, but for those that have lost their row meanwhile."""
        stays = self.rows.generation[scheduled.rows] == scheduled.generation
        for row in np.unique(scheduled.rows[stays]).tolist():
            seq = self.rows.sequences[row]
            seq.times = (seq.times or StepTimes()).plus(times)

    def _settle_drafts(self, batch: PreparedBatch, stays: np.ndarray) -> None:
        """Take back what was computed for drafts that are not kept, and commit the blocks of kept ones."""
        scheduled = batch.scheduled
        if self.drafting:
            num_accepted = int(batch.kept.sum()) - len(np.unique(scheduled.sampling))
            self.drafting.note(scheduled.num_drafts, num_accepted)
        rows = np.unique(scheduled.rows[scheduled.sampling[stays]])
        self.rows.settle(rows)
        for row in rows.tolist():
            self.kv.commit(self.rows.sequences[row], int(self.rows.num_computed[row]))

    def _report_complete(self, batch: PreparedBatch, result: StepResult) -> None:
        """Sequences that want no tokens: they are done, some with a vector."""
        vectors = iter(() if result.pooled is None else result.pooled)
        for seq in batch.complete:
            vector = next(vectors) if seq.is_pooled else None
            if seq.is_finished:
                continue
            if vector is None:
                self.requests.finish(seq, Ending("length"))
            elif np.isfinite(vector).all():
                self.requests.tell_vector(seq, pooled_output(seq, Ending("stop"), vector.tobytes()))
            else:
                self._fail(seq, NOT_FINITE)

    def _take_tokens(self, seq: Sequence, sampled: Sampled, positions: list[int], lengths: np.ndarray) -> None:
        """Tell the client of the newest tokens of a sequence, which may end by them."""
        try:
            if seq.params.beams is not None and sampled.status[positions[0]] == OK:
                self.beams.take(seq, sampled.position(positions[0], seq.params))
                return
            new, status = new_tokens(seq, sampled, positions, lengths, self.max_model_len)
            if new.token_ids:
                self.requests.tell(seq, new)
            if status != OK:
                self._fail(seq, status)
        except Exception as error:
            # DESIGN contract 14: what goes wrong with one request's token is that request's alone.
            logger.exception("request %s failed", seq.request.request_id)
            self.requests.finish(seq, Ending("error", error=f"internal error: {type(error).__name__}"))

    def _fail(self, seq: Sequence, status: int) -> None:
        """End a sequence for want of a token or a vector: `status` as in Sampled."""
        if status == NOT_FINITE:
            # Its KV may hold such values: nobody else may read it, nor what was computed from it.
            self.scheduler.forget_computed(seq.request.request_id)
            self.requests.finish(seq, Ending("error", error=NOT_FINITE_ERROR))
        else:
            error = PROCESSOR_ERROR if status == PROCESSOR_FAILED else NOTHING_LEFT_ERROR
            self.requests.finish(seq, Ending("error", error=error, is_bad_request=True))
