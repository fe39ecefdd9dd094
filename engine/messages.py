"""Everything that crosses the border between API and engine, as typed msgspec structs. A request's parameters are in
params.py, and part of it.
"""

from __future__ import annotations

import struct
from array import array
from typing import overload

import msgspec

from fuseline.engine.params import PoolingParams, SamplingParams

_INT, _FLOAT = struct.Struct("=q"), struct.Struct("=f")

AWAKE = -1
"""In place of a sleep level."""


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True, tag="vocabulary"):
    """The tokens as text, which grammars need: sent before the first request with one."""

    tokens: tuple[bytes, ...]
    """UTF-8 bytes by id; empty for special tokens, which no text has."""
    eos_token_ids: tuple[int, ...]
    vocab_size: int = 0
    """Logits of the model; tokens beyond the list are never allowed."""


class PromptEmbeds(msgspec.Struct, frozen=True, array_like=True):
    """Embeddings that take the place of those of the prompt's tokens from position `start` on."""

    start: int
    count: int
    data: bytes
    """float32, [count, hidden size]."""


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """A validated request. `request_id` is unique in the engine and made by the server, never by a client."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams | PoolingParams
    priority: int = 0
    arrival_time: float = 0.0
    turn: int = 0
    """Prompts of the same body that come before it: it stands back behind others that come in the next moments."""
    cache_salt: str = ""
    embeds: tuple[PromptEmbeds, ...] = ()
    """Within the prompt, whose token ids are placeholders there."""


class AbortRequests(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="abort"):
    """Whole requests, and single choices as (request id, index). Unknown ones are ignored."""

    request_ids: tuple[str, ...] = ()
    choices: tuple[tuple[str, int], ...] = ()


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset_prefix_cache"):
    """Forget all cached blocks. Answered by CallDone."""

    call_id: int


class Sleep(msgspec.Struct, frozen=True, tag="sleep"):
    """Stop serving and give back memory: at level 0 none, at 1 the KV cache's and on a GPU the weights' too, at 2 the
    weights are discarded. What ran is computed anew after WakeUp. Answered by CallDone or CallFailed.
    """

    call_id: int
    level: int


class WakeUp(msgspec.Struct, frozen=True, tag="wake_up"):
    """Bring back what the tags name; without tags, everything. Answered by CallDone or CallFailed."""

    call_id: int
    tags: tuple[str, ...] = ()


class IsSleeping(msgspec.Struct, frozen=True, tag="is_sleeping"):
    """Answered by SleepState."""

    call_id: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    pass


class PositionLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities at one position: the token itself first, then the best ones in descending order.

    Not tracked by the garbage collector: a prompt has thousands, and they refer to numbers only.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of a prompt's tokens, as a sequence of PositionLogprobs: None for the first token, and for
    those that have not been computed. Packed, as a long prompt has millions of numbers: N positions from the second on.
    """

    num_tokens: int
    num_top: int
    token_ids: bytes = b""
    """int64 [N], as are the ranks; log-probabilities are float32."""
    logprobs: bytes = b""
    ranks: bytes = b""
    top_ids: bytes = b""
    """int64 [N, num_top]."""
    top_logprobs: bytes = b""

    def __len__(self) -> int:
        return self.num_tokens

    @overload
    def __getitem__(self, at: int) -> PositionLogprobs | None: ...

    @overload
    def __getitem__(self, at: slice) -> list[PositionLogprobs | None]: ...

    def __getitem__(self, at: int | slice) -> PositionLogprobs | None | list[PositionLogprobs | None]:
        if isinstance(at, slice):
            return [self._position(k) for k in range(*at.indices(self.num_tokens))]
        return self._position(range(self.num_tokens)[at])

    def _position(self, at: int) -> PositionLogprobs | None:
        row, num_top = at - 1, self.num_top
        if not 0 <= row < len(self.token_ids) // 8:
            return None
        (token,) = _INT.unpack_from(self.token_ids, 8 * row)
        (logprob,) = _FLOAT.unpack_from(self.logprobs, 4 * row)
        (rank,) = _INT.unpack_from(self.ranks, 8 * row)
        begin, end = row * num_top, (row + 1) * num_top
        ids, values = array("q", self.top_ids[8 * begin : 8 * end]), array("f", self.top_logprobs[4 * begin : 4 * end])
        return PositionLogprobs(token, logprob, rank, tuple(ids), tuple(values))


class StepTimes(msgspec.Struct, frozen=True, array_like=True):
    """Seconds in steps of the engine; None for what is not measured (--collect-detailed-traces)."""

    forward: float | None = None
    """In the model's forward passes."""
    execute: float | None = None
    """In steps as a whole, sampling included."""

    def plus(self, other: StepTimes) -> StepTimes:
        """Sums of what `other` has."""
        pairs = ((self.forward, other.forward), (self.execute, other.execute))
        return StepTimes(*(one if more is None else (one or 0.0) + more for one, more in pairs))


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="tokens"):
    """New tokens of one choice of one request. A choice ends with exactly one output that has a finish_reason."""

    request_id: str
    index: int = 0
    """Index among the n choices."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    """One per token of token_ids when asked for, else empty."""
    prompt_logprobs: PromptLogprobs | None = None
    """With the first output of choice 0, when asked for."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache (with the first output)."""
    finish_reason: str | None = None
    """stop, length, abort, error."""
    stop_token_id: int | None = None
    """The stop_token_id that ended the choice; None for EOS and length."""
    error: str = ""
    """With finish_reason error: a message fit for the client."""
    is_bad_request: bool = False
    """With finish_reason error: the request's own settings are the cause."""
    queue_seconds: float | None = None
    """With the first output, if a step has computed for the choice: time from arrival to its first step."""
    num_preemptions: int = 0
    """With the last output: how often the choice has been preempted."""
    times: StepTimes | None = None
    """With the last output, if steps are timed: of those that had the choice."""
    handle: int | None = None
    """With the first output and with the last: what stands for the choice in TokenDeltas."""


class PooledOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="pooled"):
    """The one output of a pooling request."""

    request_id: str
    vector: bytes = b""
    """float32, [hidden size]; empty unless the finish_reason is stop."""
    finish_reason: str
    """stop, abort, error."""
    error: str = ""
    """With finish_reason error: a message fit for the client."""
    is_bad_request: bool = False
    num_cached_tokens: int = 0
    queue_seconds: float | None = None
    """As in TokenOutput."""


Output = TokenOutput | PooledOutput


class StepStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    num_running: int = 0
    num_waiting: int = 0
    num_deferred: int = 0
    """Of those: how many wait for a block of their prompt that a running sequence computes."""
    num_swapped: int = 0
    """Waiting too, but with their KV in host memory."""
    num_preemptions: int = 0
    """Since start."""
    kv_usage: float = 0.0
    swap_usage: float = 0.0
    prefix_queries: int = 0
    """Tokens looked up since start."""
    prefix_hits: int = 0
    host_queries: int = 0
    """Tokens of preempted sequences that were looked up in host memory since start."""
    host_hits: int = 0
    num_drafts: int = 0
    """Draft tokens computed since start."""
    num_accepted: int = 0
    """Draft tokens kept since start."""
    num_emitted: int = 0
    """Tokens that the sequences with drafts got in those steps: the accepted ones, and one more each time."""
    block_lifetimes: tuple[float, ...] = ()
    """Seconds for which blocks have kept their content that have lost it since the last message."""
    sleep_level: int = AWAKE
    num_step_tokens: int = 0
    num_prompt_tokens: int = 0
    """Prompt tokens computed in this step."""


class TokenDeltas(msgspec.Struct, frozen=True, array_like=True):
    """Compact token deltas: what most of a step's outputs are, one more token of a choice that goes on. A choice that
    gets several tokens is there several times.
    """

    handles: bytes = b""
    """int64, of choices whose first output has told their handle."""
    token_ids: bytes = b""
    """int64, in parallel to the handles."""


class StepOutputs(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """Outputs of a step: `deltas` come before `outputs`."""

    outputs: list[Output] = []
    deltas: TokenDeltas = msgspec.field(default_factory=TokenDeltas)
    stats: StepStats = msgspec.field(default_factory=StepStats)


class StepExpander:
    """Turns compact token deltas into outputs again, on the receiving side. It sees all steps of one engine, in
    order.
    """

    def __init__(self) -> None:
        self._choices: dict[int, tuple[str, int]] = {}

    def expand(self, step: StepOutputs) -> StepOutputs:
        """The same step with all of it in `outputs`."""
        pairs = zip(array("q", step.deltas.handles), array("q", step.deltas.token_ids), strict=True)
        outputs = [self._output(handle, token) for handle, token in pairs]
        for output in step.outputs:
            if isinstance(output, PooledOutput):
                continue
            if output.finish_reason is not None:
                self._choices.pop(output.handle, None)
            elif output.handle is not None:
                self._choices[output.handle] = (output.request_id, output.index)
        return StepOutputs(outputs=outputs + step.outputs, stats=step.stats)

    def _output(self, handle: int, token: int) -> TokenOutput:
        request_id, index = self._choices[handle]
        return TokenOutput(request_id=request_id, index=index, token_ids=(token,))


class CallDone(msgspec.Struct, frozen=True, tag="call_done"):
    call_id: int


class CallFailed(msgspec.Struct, frozen=True, tag="call_failed"):
    """`error`: one line for the caller."""

    call_id: int
    error: str


class SleepState(msgspec.Struct, frozen=True, tag="sleep_state"):
    call_id: int
    is_sleeping: bool


class EngineReady(msgspec.Struct, frozen=True, tag="ready"):
    """First message of a started engine: what the API must know, and the start-up table as (label, value) rows."""

    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    dtype: str
    kv_cache_dtype: str
    eos_token_ids: tuple[int, ...]
    architecture: str
    table: tuple[tuple[str, str], ...] = ()
    num_host_blocks: int = 0
    """Blocks of host memory to swap to."""
    wants_vocabulary: bool = False
    """The vocabulary is to be sent before a request needs it: its machine prepares for grammars then."""


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    """Start-up failed; `message` is one line with cause and cure."""

    message: str


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Start-up progress of one phase: loading, capturing, compiling."""

    phase: str
    done: int
    total: int


Call = ResetPrefixCache | Sleep | WakeUp | IsSleeping
CallResult = CallDone | CallFailed | SleepState
ToEngine = EngineRequest | AbortRequests | Vocabulary | Call | Shutdown
FromEngine = StepOutputs | CallResult | EngineReady | EngineFailed | Progress
