"""Everything that crosses the border between API and engine, as typed msgspec structs."""

from __future__ import annotations

import hashlib
import struct
from array import array
from typing import Any, Literal, overload

import msgspec

_INT, _FLOAT = struct.Struct("=q"), struct.Struct("=f")

AWAKE = -1
"""In place of a sleep level."""


class LogitsProcessor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A callable by its dotted name, or a factory of one with its arguments."""

    qualname: str
    is_factory: bool = False
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}


class GrammarSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The language that generated text must be in, as a grammar that is yet to be compiled."""

    kind: Literal["ebnf", "lark", "structural_tag", "regex", "json_schema"]
    """ebnf: GBNF with a rule `root`; lark: with a rule `start`; structural_tag: xgrammar's JSON. Other backends take
    regex and json_schema, an object with `schema` and `whitespace`, the regex between JSON's tokens."""
    text: str
    backend: str = "xgrammar"
    starts_after: tuple[int, ...] = ()
    """Token ids that follow each other in the answer before the grammar begins: the end of thinking. Until then every
    token but an ending one may come. Empty: from the first token on."""

    spelled: tuple[tuple[int, str], ...] = ()
    """Special tokens that the grammar reads as their text: the marks of a format."""
    is_slow: bool = False
    """Its masks may take long: no step waits for them."""
    is_free: bool = False
    """Text may end wherever the grammar has no more to say of it, and may hold special tokens there; the request's
    other settings say when it ends."""

    @property
    def key(self) -> bytes:
        """SHA-256 of what is compiled."""
        marks = (f"{token} {text}" for token, text in self.spelled)
        parts = (self.backend, self.kind, str(self.is_free), self.text, *marks)
        return hashlib.sha256(b"".join(len(p.encode()).to_bytes(8, "little") + p.encode() for p in parts)).digest()


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True, tag="vocabulary"):
    """The tokens as text, which grammars need: sent before the first request with one."""

    tokens: tuple[bytes, ...]
    """UTF-8 bytes by id; empty for special tokens, which no text has."""
    eos_token_ids: tuple[int, ...]
    vocab_size: int = 0
    """Logits of the model; tokens beyond the list are never allowed."""


class BeamParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Settings of a beam search, whose width is n."""

    length_penalty: float = 1.0
    keeps_eos: bool = False
    """An EOS that completes a hypothesis is among its tokens."""
    num_shown: int | None = None
    """As `logprobs` of other requests: how many alternatives are told; None = no log-probabilities."""


class ThinkingBudget(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bounds the tokens of reasoning, which is the text between marks at the begin of an answer."""

    num_tokens: int
    """Tokens behind the first mark; then the end is forced."""
    begins: tuple[str, ...]
    ends: tuple[str, ...]
    end_token_ids: tuple[int, ...]
    """Tokens of the end that is forced."""
    is_open: bool = False
    """The answer begins within reasoning."""
    may_resume: bool = False
    """Reasoning may begin again behind its end; the budget is for all of it."""
    spelled: tuple[tuple[int, str], ...] = ()
    """Special tokens that are part of marks, and their text."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="sampling"):
    """One request's sampling settings, validated and resolved by the API (SPEC 4.1, 6)."""

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    """0 = off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """None = unseeded. Choice i of n uses seed + i."""
    max_tokens: int = 16
    """Already capped by the context; 0 only scores the prompt."""
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end the sequence; also what min_tokens masks. Empty when ignore_eos."""
    masked_eos_token_ids: tuple[int, ...] = ()
    """EOS ids that min_tokens masks even under ignore_eos."""
    logprobs: int | None = None
    """None = none wanted; k = the sampled token's and the k best; the API turns -1 (all) into the vocabulary's size."""
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    """Empty = all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprob_token_ids: tuple[int, ...] = ()
    """With logprobs: the alternatives shown at each position, in place of the best ones."""
    logits_processors: tuple[LogitsProcessor, ...] = ()
    scores_temperature: float = 1.0
    """Temperature at which log-probabilities are taken; for beam search, whose steps are greedy."""
    grammar: GrammarSpec | None = None
    beams: BeamParams | None = None
    """Search for the n likeliest texts, with temperature 0 and `logprobs` of at least 2 n. All choices are told at the
    end, best first; before, one output of choice 0 tells of the prompt."""
    thinking: ThinkingBudget | None = None

    @property
    def has_masks(self) -> bool:
        """Whether the tokens so far say which may come next."""
        return self.grammar is not None or self.thinking is not None

    @property
    def is_structured(self) -> bool:
        """Whether a grammar alone says where the text ends."""
        return self.grammar is not None and not self.grammar.is_free

    @property
    def ending_token_ids(self) -> tuple[int, ...]:
        """Tokens that end the sequence. A grammar allows EOS only where it is complete, and then ignore_eos is void."""
        eos = self.masked_eos_token_ids if self.is_structured else ()
        return tuple(dict.fromkeys((*self.eos_token_ids, *self.stop_token_ids, *eos)))


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="pooling"):
    """How a request's one vector is made: from its last token, or as the mean over all its tokens."""

    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True
    """Divide the vector by its Euclidean length."""

    @property
    def n(self) -> int:
        return 1


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
