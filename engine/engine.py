"""Requests to tokens: schedule, run, update."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence as Seq
from itertools import chain, islice

from fuseline.engine.config import EngineConfig
from fuseline.engine.memory.kv_manager import KVManager
from fuseline.engine.messages import EngineRequest, StepOutputs, TokenOutput
from fuseline.engine.outputs import Ending, find_ending, make_outputs
from fuseline.engine.request import Sequence, make_sequences
from fuseline.engine.run.runner import Model, Runner, StepResult
from fuseline.engine.run.sampler import SampleOps
from fuseline.engine.schedule.plan import Plan
from fuseline.engine.schedule.scheduler import Limits, Scheduler
from fuseline.engine.stats import make_stats

logger = logging.getLogger("fuseline.engine")


class Engine:
    """Not thread-safe: one loop calls everything. `num_blocks`: usable blocks per cache group."""

    def __init__(self, config: EngineConfig, model: Model, num_blocks: Seq[int], ops: SampleOps) -> None:
        info = model.info
        scheduler = config.scheduler
        self.config = config
        self.max_model_len = config.compile.max_model_len or info.max_model_len
        self.num_blocks = tuple(num_blocks)
        windows = [group.window for group in info.cache_groups]
        block_size = config.cache.block_size
        self.kv = KVManager(windows, num_blocks, block_size, scheduler.max_num_seqs, self.max_model_len)
        limits = Limits.resolve(scheduler, self.max_model_len)
        self.scheduler = Scheduler(limits, self.kv, info.rope_switch)
        self.runner = Runner(model, ops, limits.num_seqs, limits.num_tokens, self.max_model_len, block_size)
        self.is_asleep = False
        self._live: dict[str, list[Sequence]] = {}  # the unfinished choices of each request
        self._pending: list[TokenOutput] = []
        self._num_added = 0
        self._rng = random.Random(config.seed)

    @property
    def has_work(self) -> bool:
        return bool(self._pending) or (self.scheduler.has_work and not self.is_asleep)

    def step(self) -> StepOutputs:
        outputs, self._pending = self._pending, []
        if self.is_asleep:
            return StepOutputs(outputs=tuple(outputs), stats=make_stats(self.scheduler, 0, 0))
        plan = self.scheduler.schedule()
        num_prompt_tokens = self._note_start(plan)
        if plan.sequences:
            self._update(plan, self.runner.execute(plan), outputs)
        stats = make_stats(self.scheduler, plan.num_tokens, num_prompt_tokens)
        return StepOutputs(outputs=tuple(outputs), stats=stats)

    def add(self, request: EngineRequest) -> None:
        """Queue a request. One that cannot be served fails alone, with the next step's outputs.

        An id in use is dropped without a word: outputs under it would be taken for the first request's.
        """
        error = self._find_fault(request)
        if error:
            if request.request_id not in self._live:
                self._pending += [
                    TokenOutput(request_id=request.request_id, index=i, finish_reason="error", error=error)
                    for i in range(request.params.n)
                ]
            return
        seed = request.params.seed if request.params.seed is not None else self._rng.getrandbits(62)
        switch = self.runner.model.info.rope_switch
        caching = self.config.cache.enable_prefix_caching
        threshold = switch.threshold if switch else None
        sequences = make_sequences(request, self._order(request), seed, caching, threshold)
        self._live[request.request_id] = sequences
        self.scheduler.add(sequences[0])

    def abort(self, request_id: str) -> None:
        """End a request's unfinished choices and free their blocks; unknown ids are ignored."""
        for seq in list(self._live.get(request_id, ())):
            self._finish(seq, Ending("abort"), (), (), self._pending)

    def reset_prefix_cache(self) -> None:
        self.kv.reset_prefix_cache()

    def pause(self) -> None:
        """Stop computing; what ran waits and will be computed anew."""
        self.scheduler.preempt_all()
        self.kv.reset_prefix_cache()
        self.is_asleep = True

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
        if any(live[0].params.logprobs_mode != params.logprobs_mode for live in islice(self._live.values(), 1)):
            return "logprobs_mode must be the same for all requests of a server"
        return ""

    def _note_start(self, plan: Plan) -> int:
        """Queue times of what runs for the first time; the number of prompt tokens in the step."""
        num_prompt_tokens = 0
        for seq, count in zip(plan.sequences, plan.counts, strict=True):
            num_prompt_tokens += max(0, min(count, seq.prompt_len - seq.num_computed))
        for seq in plan.started:
            if not seq.was_scheduled:
                seq.was_scheduled = True
                arrival = seq.request.arrival_time
                seq.queue_seconds = max(0.0, time.time() - arrival) if arrival else 0.0
        return num_prompt_tokens

    def _update(self, plan: Plan, result: StepResult, outputs: list[TokenOutput]) -> None:
        for seq, count in zip(plan.sequences, plan.counts, strict=True):
            seq.num_computed += count
            self.kv.remember(seq)
            if seq.children and seq.num_computed >= seq.prompt_len:
                self._release_children(seq)
        self._store_prompt_scores(result)
        for seq in plan.sequences:
            if seq.params.max_tokens == 0 and seq.num_remaining == 0:
                self._finish(seq, Ending("length"), (), (), outputs)
        for row, seq in enumerate(result.sampling):
            try:
                self._take_token(seq, result, row, outputs)
            except Exception as error:
                # DESIGN contract 14: what goes wrong with one request's token is that request's alone.
                logger.exception("request %s failed", seq.request.request_id)
                self._finish(seq, Ending("error", error=f"internal error: {type(error).__name__}"), (), (), outputs)

    def _store_prompt_scores(self, result: StepResult) -> None:
        row = 0
        for seq, positions in result.scoring:
            for position in positions:
                token = seq.tokens[position]
                seq.prompt_scores[position] = result.scores.position(row, token, seq.params.prompt_logprobs)
                row += 1

    def _take_token(self, seq: Sequence, result: StepResult, row: int, outputs: list[TokenOutput]) -> None:
        sampled = result.sampled
        if not sampled.ok[row]:
            # Blocks that hold such values must not reach anyone else.
            self.kv.reset_prefix_cache()
            error = "the model's output is not finite for this request"
            self._finish(seq, Ending("error", error=error), (), (), outputs)
            return
        token = sampled.tokens[row]
        seq.tokens.append(token)
        count = seq.params.logprobs
        logprobs = () if count is None else (sampled.scores.position(row, token, count),)
        ending = find_ending(seq, self.max_model_len)
        if ending:
            self._finish(seq, ending, (token,), logprobs, outputs)
        else:
            outputs.extend(make_outputs(seq, (token,), logprobs, None))

    def _finish(self, seq: Sequence, ending: Ending, tokens, logprobs, outputs: list[TokenOutput]) -> None:
        self._release_children(seq)
        seq.is_finished = True
        self.scheduler.remove(seq)
        outputs.extend(make_outputs(seq, tokens, logprobs, ending))
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
