"""Requests to tokens: schedule, run, update."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence as Seq
from itertools import chain

import numpy as np

from fuseline.engine.config import EngineConfig
from fuseline.engine.memory.kv_manager import KVManager
from fuseline.engine.messages import EngineRequest, PositionLogprobs, StepOutputs, TokenOutput
from fuseline.engine.outputs import Ending, Report, find_ending, goes_on_plainly, make_outputs
from fuseline.engine.request import Sequence, make_sequences
from fuseline.engine.run.device import Device
from fuseline.engine.run.request_rows import RequestRows
from fuseline.engine.run.runner import Batch, Model, Runner
from fuseline.engine.run.sampling import NOT_FINITE, OK, Launched, Sampled, StepResult
from fuseline.engine.schedule.overlap import order_of_stages
from fuseline.engine.schedule.plan import Plan
from fuseline.engine.schedule.scheduler import Limits, Scheduler
from fuseline.engine.stats import make_stats

logger = logging.getLogger("fuseline.engine")

NOTHING_LEFT_ERROR = (
    "no token is left to choose from: logit_bias, allowed_token_ids, bad_words, min_tokens, the penalties or the "
    "temperature of this request exclude all"
)


class Engine:
    """Not thread-safe: one loop calls everything.

    `num_blocks`: usable blocks per cache group; `num_host_blocks`: those to swap to, none if nothing is swapped.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: Model,
        num_blocks: Seq[int],
        device: Device,
        num_host_blocks: Seq[int] = (),
    ) -> None:
        info = model.info
        scheduler = config.scheduler
        self.config = config
        self.max_model_len = config.compile.max_model_len or info.max_model_len
        self.num_blocks = tuple(num_blocks)
        limits = Limits.resolve(scheduler, self.max_model_len)
        windows = [group.window for group in info.cache_groups]
        self.rows = RequestRows(limits.num_seqs, self.max_model_len)
        block_size = config.cache.block_size
        self.kv = KVManager(windows, num_blocks, block_size, limits.num_seqs, self.max_model_len, num_host_blocks)
        self.scheduler = Scheduler(limits, self.rows, self.kv, info.rope_switch)
        self.runner = Runner(model, device, self.rows, self.kv, limits.num_tokens, config.logprobs_mode)
        self.is_asleep = False
        self._steps = order_of_stages(device.is_queue, scheduler.async_scheduling)
        self._live: dict[str, list[Sequence]] = {}  # the unfinished choices of each request
        self._report = Report()
        self._num_added = 0
        self._num_sequences = 0
        self._rng = random.Random(config.seed)

    @property
    def has_work(self) -> bool:
        is_busy = self._steps.is_running or (self.scheduler.has_work and not self.is_asleep)
        return is_busy or bool(self._report)

    def step(self) -> StepOutputs:
        """One turn of the loop: the stages below, in the order that the configuration wants."""
        if not self.is_asleep:
            self._steps.step(self)
        report, self._report = self._report, Report()
        return report.message(make_stats(self.scheduler, report.num_step_tokens, report.num_prompt_tokens))

    def prepare(self) -> Batch | None:
        plan = self.scheduler.schedule()
        return self.runner.prepare(plan) if plan.num_tokens else None

    def launch(self, batch: Batch) -> None:
        plan, rows = batch.plan, self.rows
        self._note_start(plan)
        self.runner.fill(batch)
        rows.num_computed[plan.rows] += plan.counts
        rows.num_tokens[plan.rows[plan.sampling]] += 1

    def compute(self, batch: Batch) -> Launched:
        return self.runner.run(batch)

    def commit(self, batch: Batch) -> None:
        plan, rows, size = batch.plan, self.rows, self.kv.block_size
        is_filled = plan.num_computed // size != (plan.num_computed + plan.counts) // size
        for row in plan.rows[is_filled].tolist():
            self.kv.commit(rows.sequences[row])
        for row in plan.rows[rows.is_parent[plan.rows]].tolist():
            seq = rows.sequences[row]
            if seq.num_computed >= seq.prompt_len:
                self._release_children(seq)

    def store(self, batch: Batch, result: StepResult) -> None:
        plan, sampled = batch.plan, result.sampled
        if sampled is None:
            return
        places, tenancy = plan.rows[plan.sampling], plan.tenancy[plan.sampling]
        stays = self.rows.tenancy[places] == tenancy
        self.rows.append(places[stays], sampled.tokens[stays], plan.lengths[stays])
        for index in np.flatnonzero(~stays).tolist():
            seq = self.rows.departed.pop((int(places[index]), int(tenancy[index])))
            seq.stored.append(int(sampled.tokens[index]))
            seq.num_pending = 0
            batch.departed[index] = seq

    def report(self, batch: Batch, result: StepResult) -> None:
        plan, sampled = batch.plan, result.sampled
        self._store_prompt_scores(batch, result)
        for seq in batch.complete:
            self._finish(seq, Ending("length"))
        if sampled is None:
            return
        rows = plan.rows[plan.sampling]
        is_plain = goes_on_plainly(plan, sampled, self.rows)
        self._report.add_plain(self.rows.handle[rows[is_plain]], sampled.tokens[is_plain])
        others = [
            (i, batch.departed.get(i) or self.rows.sequences[rows[i]]) for i in np.flatnonzero(~is_plain).tolist()
        ]
        for index, seq in others:
            self._take_token(seq, sampled, index)

    def add(self, request: EngineRequest) -> None:
        """Queue a request. One that cannot be served fails alone, with the next step's outputs.

        An id in use is dropped without a word: outputs under it would be taken for the first request's.
        """
        error = self._find_fault(request)
        if error:
            if request.request_id not in self._live:
                self._report.outputs += [
                    TokenOutput(
                        request_id=request.request_id, index=i, finish_reason="error", error=error, is_bad_request=True
                    )
                    for i in range(request.params.n)
                ]
            return
        seed = request.params.seed if request.params.seed is not None else self._rng.getrandbits(62)
        switch = self.runner.model.info.rope_switch
        caching = self.config.cache.enable_prefix_caching
        threshold = switch.threshold if switch else None
        sequences = make_sequences(request, self._order(request), seed, caching, threshold, self._num_sequences)
        self._num_sequences += len(sequences)
        self._live[request.request_id] = sequences
        self.scheduler.add(sequences[0])
        self._report.has_news = True

    def abort(self, request_id: str) -> None:
        """End a request's unfinished choices and free their blocks; unknown ids are ignored."""
        for seq in list(self._live.get(request_id, ())):
            self._finish(seq, Ending("abort"))

    def abort_choice(self, request_id: str, index: int) -> None:
        """End one choice of a request; the others go on. Unknown ones are ignored."""
        for seq in list(self._live.get(request_id, ())):
            if seq.choices == [index]:
                self._finish(seq, Ending("abort"))
            elif index in seq.choices:
                seq.choices.remove(index)
                self._report.outputs.append(TokenOutput(request_id=request_id, index=index, finish_reason="abort"))

    def reset_prefix_cache(self) -> None:
        self.kv.reset_prefix_cache()

    def pause(self) -> None:
        """Stop computing; what ran waits and will be computed anew."""
        self._steps.drain(self)
        self.scheduler.preempt_all()
        self.kv.reset_prefix_cache()
        self.is_asleep = True
        self._report.has_news = True

    def resume(self) -> None:
        self.is_asleep = False

    def _order(self, request: EngineRequest) -> tuple[float, ...]:
        self._num_added += 1
        if self.scheduler.limits.is_priority:
            return (request.priority, request.arrival_time, self._num_added)
        return (self._num_added,)

    def _find_fault(self, request: EngineRequest) -> str:
        """Why a request cannot be served; the API has checked already, the engine must survive anyway."""
        num_prompt, params = len(request.prompt_token_ids), request.params
        if request.request_id in self._live:
            return f"request id {request.request_id} is in use"
        if num_prompt == 0:
            return "the prompt is empty"
        if num_prompt + min(1, params.max_tokens) > self.max_model_len:
            return f"the prompt has {num_prompt} tokens, the context only {self.max_model_len}"
        vocab_size = self.runner.model.info.vocab_size
        biased = tuple(token for token, _ in params.logit_bias)
        for token in chain(request.prompt_token_ids, biased, params.allowed_token_ids, *params.bad_words):
            if not 0 <= token < vocab_size:
                return f"token id {token} is out of vocabulary (0 to {vocab_size - 1})"
        return ""

    def _note_start(self, plan: Plan) -> None:
        """Queue times of what runs for the first time; the counts of the step."""
        num_left = np.maximum(self.rows.prompt_len[plan.rows] - plan.num_computed, 0)
        self._report.num_step_tokens += plan.num_tokens
        self._report.num_prompt_tokens += int(np.minimum(num_left, plan.counts).sum())
        for seq in plan.started:
            if seq.queue_seconds is None:
                arrival = seq.request.arrival_time
                seq.queue_seconds = max(0.0, time.time() - arrival) if arrival else 0.0

    def _store_prompt_scores(self, batch: Batch, result: StepResult) -> None:
        row = 0
        for seq, positions in batch.scoring:
            for position in positions if seq.prompt_scores is not None else ():
                scored = row + position - positions.start
                token = seq.tokens[position]
                seq.prompt_scores[position] = result.scores.position(scored, token, seq.params.prompt_logprobs)
            row += len(positions)

    def _take_token(self, seq: Sequence, sampled: Sampled, row: int) -> None:
        """The newest token of a sequence and whatever follows; one that has ended meanwhile has no use for it."""
        if seq.is_finished:
            return
        try:
            if sampled.status[row] == OK:
                self._tell_token(seq, sampled, row)
            else:
                self._fail(seq, sampled.status[row])
        except Exception as error:
            # DESIGN contract 14: what goes wrong with one request's token is that request's alone.
            logger.exception("request %s failed", seq.request.request_id)
            self._finish(seq, Ending("error", error=f"internal error: {type(error).__name__}"))

    def _tell_token(self, seq: Sequence, sampled: Sampled, row: int) -> None:
        token, count = seq.tokens[-1], seq.params.logprobs
        logprobs = () if count is None else (sampled.scores.position(row, token, count),)
        ending = find_ending(seq, self.max_model_len)
        if ending:
            self._finish(seq, ending, (token,), logprobs)
        else:
            self._report.outputs.extend(make_outputs(seq, (token,), logprobs, None))

    def _fail(self, seq: Sequence, status: int) -> None:
        """End a sequence without a token, with its cause: `status` as in Sampled."""
        if status == NOT_FINITE:
            # Its KV may hold such values: nobody else may read it, nor what was computed from it.
            self.scheduler.forget_computed(seq.request.request_id)
            self._finish(seq, Ending("error", error="the model's output is not finite for this request"))
        else:
            self._finish(seq, Ending("error", error=NOTHING_LEFT_ERROR, is_bad_request=True))

    def _finish(
        self,
        seq: Sequence,
        ending: Ending,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[PositionLogprobs, ...] = (),
    ) -> None:
        if seq.is_finished:
            return
        self._release_children(seq)
        seq.is_finished = True
        self.scheduler.remove(seq)
        self._report.outputs.extend(make_outputs(seq, tokens, logprobs, ending))
        live = self._live[seq.request.request_id]
        live.remove(seq)
        if not live:
            del self._live[seq.request.request_id]

    def _release_children(self, seq: Sequence) -> None:
        """The prompt is computed: the other choices find its blocks in the cache."""
        for child in seq.children:
            if not child.is_finished:
                self.scheduler.add(child)
        seq.children = []
        if seq.rows is not None:
            seq.rows.is_parent[seq.row] = False
