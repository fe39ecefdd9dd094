"""Unfinished requests: how they come in, end, and are told of."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from fuseline.compile.specs import ModelInfo
from fuseline.engine.config import EngineConfig
from fuseline.engine.messages import EngineRequest, Output, PooledOutput, TokenOutput
from fuseline.engine.outputs import Ending, NewTokens, Report, make_outputs
from fuseline.engine.params import PoolingParams, SamplingParams
from fuseline.engine.run.grammar.backends.interface import Grammar
from fuseline.engine.run.grammar.compiler import GrammarCompiler, GrammarError
from fuseline.engine.run.grammar.matcher import GrammarState
from fuseline.engine.run.grammar.slow_masks import SlowMasks
from fuseline.engine.run.grammar.thinking import BudgetState
from fuseline.engine.run.logits_processors import for_sequence, make_processor
from fuseline.engine.schedule.scheduler import Scheduler
from fuseline.engine.state.sequence import Sequence, SequenceOptions, make_sequences

TURN_SECONDS = 0.25
"""By so much later a prompt counts as coming than the one before it in the same body, so that a body of a thousand does
not keep others waiting. One that is served faster loses nothing."""


class Requests:
    """The requests of one engine, and the report that is being written for their client."""

    def __init__(
        self,
        config: EngineConfig,
        info: ModelInfo,
        scheduler: Scheduler,
        max_model_len: int,
        grammars: GrammarCompiler,
        slow_masks: SlowMasks,
    ) -> None:
        self.report = Report()
        self.live: dict[str, list[Sequence]] = {}  # the unfinished sequences of each request
        self._info, self._scheduler = info, scheduler
        self._max_model_len = max_model_len
        self._grammars, self._slow_masks = grammars, slow_masks
        self._compiling: dict[bytes, list[Sequence]] = {}  # by key of the grammar that they wait for
        switch = info.rope_switch
        self._options = SequenceOptions(
            is_caching=config.cache.enable_prefix_caching,
            rope_threshold=switch.threshold if switch else None,
        )
        self._num_added = 0
        self._num_sequences = 0
        self._rng = random.Random(config.seed)

    def take_report(self) -> Report:
        report, self.report = self.report, Report()
        return report

    def add(self, request: EngineRequest) -> None:
        """Queue a request. One that cannot be served fails alone, with the next step's outputs.

        An id in use is dropped without a word: outputs under it would be taken for the first request's.
        """
        if request.request_id in self.live:
            return
        try:
            error, made = self._find_fault(request), _make_processors(request)
        except ValueError as failure:
            error, made = f"a logits processor cannot be used: {failure}", []
        if error:
            self.report.outputs += _refusals(request, error)
            return
        sequences = make_sequences(
            request, self._order(request), self._seed(request), self._options, self._num_sequences
        )
        for seq in sequences if made else ():
            seq.processors = tuple(map(for_sequence, made))
        self._num_sequences += len(sequences)
        self.live[request.request_id] = sequences
        self._queue(sequences[0])
        self.report.has_news = True

    def admit_compiled(self) -> None:
        """Queue the sequences whose grammar has been compiled, refuse those whose grammar cannot be."""
        for seq in self._slow_masks.take_first():
            if not seq.is_finished:
                self._scheduler.add(seq)
        for key, result in self._grammars.take_finished():
            for seq in self._compiling.pop(key, ()):
                if seq.is_finished:
                    continue
                if isinstance(result, GrammarError):
                    seq.children = []
                    for other in list(self.live[seq.request.request_id]):
                        self.finish(other, Ending("error", error=str(result), is_bad_request=True))
                else:
                    self._add(seq, result)

    def _queue(self, seq: Sequence) -> None:
        """The scheduler takes a sequence once its grammar, if it has one, is compiled."""
        spec = None if isinstance(seq.params, PoolingParams) else seq.params.grammar
        if spec is None:
            self._add(seq, None)
        elif (compiled := self._grammars.find(spec)) is not None:
            self._add(seq, compiled)
        else:
            self._compiling.setdefault(spec.key, []).append(seq)
            self._grammars.start(spec)

    def _add(self, seq: Sequence, grammar: Grammar | None) -> None:
        """Hand a sequence to the scheduler, with what follows its tokens."""
        if grammar is not None:
            seq.grammar = GrammarState(grammar, seq.params, self._info.vocab_size)
        if not isinstance(seq.params, PoolingParams) and seq.params.thinking is not None:
            seq.grammar = BudgetState(seq.params.thinking, self._grammars.vocabulary, seq.grammar)
        if seq.grammar is not None and seq.grammar.is_slow:
            self._slow_masks.add(seq)
        else:
            self._scheduler.add(seq)

    def abort(self, request_id: str) -> None:
        """End a request's unfinished choices and free their blocks; unknown ids are ignored."""
        for seq in list(self.live.get(request_id, ())):
            self.finish(seq, Ending("abort"))

    def abort_choice(self, request_id: str, index: int) -> None:
        """End one choice of a request; the others go on. Unknown ones are ignored, and beams, which end together."""
        for seq in list(self.live.get(request_id, ())):
            if seq.group is not None:
                return
            if seq.choices == [index]:
                self.finish(seq, Ending("abort"))
            elif index in seq.choices:
                seq.choices.remove(index)
                self.report.outputs.append(TokenOutput(request_id=request_id, index=index, finish_reason="abort"))

    def tell(self, seq: Sequence, new: NewTokens) -> None:
        """Tell the client of new tokens; the sequence is finished if they end it."""
        if new.ending:
            self.retire(seq)
        self.report.outputs.extend(make_outputs(seq, new))

    def finish(self, seq: Sequence, ending: Ending) -> None:
        """End a sequence without a new token. One that has ended already stays as it is."""
        if seq.is_finished:
            return
        if seq.group is None:
            self.tell(seq, NewTokens(ending=ending))
            return
        for member in list(self.live[seq.request.request_id]):
            self.retire(member)
        outputs = make_outputs(seq, NewTokens(ending=ending))
        self.report.outputs.extend(outputs)

    def new_handle(self) -> int:
        """Stands for a further sequence."""
        self._num_sequences += 1
        return self._num_sequences - 1

    def tell_vector(self, seq: Sequence, output: PooledOutput) -> None:
        """Finish a pooling request."""
        self.retire(seq)
        self.report.outputs.append(output)

    def release_children(self, seq: Sequence) -> None:
        """The prompt is computed: the other choices find its blocks in the cache."""
        for child in seq.children:
            if not child.is_finished:
                self._queue(child)
        seq.children = []
        if seq.rows is not None:
            seq.rows.is_parent[seq.row] = False

    def retire(self, seq: Sequence) -> None:
        """A sequence ends without a word."""
        self.release_children(seq)
        seq.is_finished = True
        self._scheduler.remove(seq)
        live = self.live[seq.request.request_id]
        live.remove(seq)
        if not live:
            del self.live[seq.request.request_id]

    def _seed(self, request: EngineRequest) -> int:
        if isinstance(request.params, PoolingParams):
            return 0
        return self._rng.getrandbits(62) if request.params.seed is None else request.params.seed

    def _order(self, request: EngineRequest) -> tuple[float, ...]:
        self._num_added += 1
        delay = TURN_SECONDS * request.turn
        if self._scheduler.limits.is_priority:
            return (request.priority, request.arrival_time + delay, self._num_added)
        return (time.monotonic() + delay, self._num_added)

    def _find_fault(self, request: EngineRequest) -> str:
        """Why a request cannot be served; the API has checked already, the engine must survive anyway."""
        num_prompt, params = len(request.prompt_token_ids), request.params
        is_pooling = isinstance(params, PoolingParams)
        if num_prompt == 0:
            return "the prompt is empty"
        if is_pooling and not self._info.hidden_dim:
            return "this model gives no pooled vectors"
        num_new = 0 if is_pooling else min(1, params.max_tokens)
        if num_prompt + num_new > self._max_model_len:
            return f"the prompt has {num_prompt} tokens, the context only {self._max_model_len}"
        return self._find_token_fault(request) or self._find_embeds_fault(request)

    def _find_token_fault(self, request: EngineRequest) -> str:
        params, vocab_size = request.params, self._info.vocab_size
        named = () if isinstance(params, PoolingParams) else tuple(_named_tokens(params))
        for tokens in filter(None, (request.prompt_token_ids, named)):
            for token in (min(tokens), max(tokens)):
                if not 0 <= token < vocab_size:
                    return f"token id {token} is out of vocabulary (0 to {vocab_size - 1})"
        return ""

    def _find_embeds_fault(self, request: EngineRequest) -> str:
        if request.embeds and not self._info.embed_dim:
            return "this model takes no embeddings"
        for span in request.embeds:
            end, size = span.start + span.count, 4 * span.count * self._info.embed_dim
            if not 0 <= span.start < end <= len(request.prompt_token_ids) or len(span.data) != size:
                shape = f"[{span.count}, {self._info.embed_dim}]"
                return f"embeddings at {span.start} must be float32 {shape} and lie within the prompt's tokens"
        return ""


def _named_tokens(params: SamplingParams) -> Iterator[int]:
    """Token ids in the settings of a request, stop tokens apart: those may be any."""
    biased = (token for token, _ in params.logit_bias)
    return chain(biased, params.allowed_token_ids, params.logprob_token_ids, *params.bad_words)


def _make_processors(request: EngineRequest) -> list[Callable[..., Any]]:
    """Raises ValueError."""
    if isinstance(request.params, PoolingParams):
        return []
    return [make_processor(spec) for spec in request.params.logits_processors]


def _refusals(request: EngineRequest, error: str) -> list[Output]:
    ending = {"finish_reason": "error", "error": error, "is_bad_request": True}
    if isinstance(request.params, PoolingParams):
        return [PooledOutput(request_id=request.request_id, **ending)]
    return [TokenOutput(request_id=request.request_id, index=index, **ending) for index in range(request.params.n)]
