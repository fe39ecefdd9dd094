"""One choice of one request inside the engine. It has no phase, only counts."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fuseline.engine.messages import EngineRequest, StepTimes
from fuseline.engine.params import PoolingParams, SamplingParams
from fuseline.engine.state.block_keys import EmbedsDigest, root_key
from fuseline.engine.state.prompt_scores import PromptScores

if TYPE_CHECKING:
    from fuseline.engine.state.rows import RequestRows

SEED_MASK = (1 << 63) - 1


@dataclass(frozen=True)
class SwappedKV:
    """KV of a sequence in host memory: by cache group the host blocks of its blocks `first`, `first` + 1, ..."""

    num_computed: int
    first: tuple[int, ...]
    blocks: tuple[list[int], ...]


class TokenGrammar(Protocol):
    """Where a sequence is in its grammar (run/grammar). Masks are int32 [ceil(V / 32)], a bit for each token."""

    num_seen: int
    """Generated tokens taken so far."""
    matcher: Any
    """Of the grammar's backend, behind the tokens taken."""
    is_plain: bool
    """Whether `mask` is what xgrammar's matcher fills, and nothing else."""

    is_slow: bool
    """Whether masks are made beside the steps, by `prepare`."""

    def has_mask(self, num_tokens: int) -> bool:
        """Whether the mask behind so many generated tokens is made."""

    def prepare(self, begin: int, tokens: Seq[int]) -> None:
        """Take the generated tokens from number `begin` on, and make the mask behind them. For another thread."""

    def note_slow(self) -> None:
        """A step has waited for the masks of this sequence, or of those beside it."""

    def mask(self) -> np.ndarray:
        """[W]: tokens that may come next."""

    def advance(self, tokens: Seq[int]) -> None:
        """Take the generated tokens that follow those seen."""

    def masks(self, drafts: Seq[int]) -> np.ndarray:
        """[1 + D, W]: tokens that may come next, and after each of the drafts."""

    def forced(self, limit: int) -> list[int]:
        """The next tokens, at most `limit`, as far as only one may come and it does not end the sequence."""


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens so far and how many of them are computed; it runs while the second number catches up with the first.

    While it runs, its counts and new tokens are in the arrays of `rows`. Owners: `row` the scheduler; blocks, keys and
    the state slot the KV manager; tokens the engine.
    """

    request: EngineRequest
    index: int
    choices: list[int]
    """Unfinished choices it stands for, ascending (greedy n > 1 computes one sequence)."""
    order: tuple[float, ...]
    """Place in the queue; the largest is preempted first."""
    seed: int
    handle: int
    """Stands for the sequence in messages; no two sequences of an engine share one."""
    stored: array[int]
    """Its tokens when it last got a row or was asked for them."""
    cache_root: bytes | None
    """Root of its block keys; None when it neither reads nor fills the prefix cache."""
    shares_prefix: bool
    row: int = -1
    """Row of the running arrays; -1 while not running."""
    rows: RequestRows | None = None
    num_pending: int = 0
    """Tokens, at least, that a step still computes for a sequence that has lost its row meanwhile."""
    variant: int = 0
    """Rope table in use (longrope)."""
    is_finished: bool = False
    was_looked_up: bool = False
    """The prefix cache's counts include it."""
    has_output: bool = False
    num_preemptions: int = 0
    queue_seconds: float | None = None
    """From its request's arrival to its first step; None while it waits for that."""
    times: StepTimes | None = None
    """Sums over its steps, if they are timed."""
    num_cached: int = 0
    prompt_scores: PromptScores | None = None
    """Filled while the prompt is computed; None when not wanted or already sent."""
    children: list[Sequence] = field(default_factory=list)
    """Choices that wait until this one's prompt is computed."""
    blocks: list[list[int]] = field(default_factory=list)
    first_held: list[int] = field(default_factory=list)
    num_committed: int = 0
    cache_epoch: int = 0
    """Epoch of the prefix cache when it started; a sequence of another epoch commits no blocks."""
    keys: list[bytes] = field(default_factory=list)
    embeds: EmbedsDigest | None = None
    """Makes block keys depend on embeddings that stand in for tokens."""
    swapped: SwappedKV | None = None
    """Its KV in host memory, while it waits to go on."""
    state_slot: int = -1
    """Slot of its recurrent state; -1 while it has none."""
    borders: list[int] = field(default_factory=list)
    """Numbers of tokens behind which its state is kept: chunks end there."""
    newest_snapshot: bytes | None = None
    """Key of the last state that was kept behind its prompt."""
    processors: tuple[Callable[..., Any], ...] = ()
    """Logits processors of its request."""
    grammar: TokenGrammar | None = None
    """Where it is in its grammar, if its request has one."""
    group: Any = None
    """The other beams of its request (engine/beams.py); None before its first token, and for all other sequences."""

    @property
    def params(self) -> SamplingParams | PoolingParams:
        return self.request.params

    @property
    def tokens(self) -> array[int]:
        """All tokens that are known. Reading them costs a little; steps work on the arrays."""
        if self.rows is not None:
            self.rows.copy_new_tokens(self)
        return self.stored

    @property
    def num_tokens(self) -> int:
        """With the token that a step is about to yield for a running sequence, which `tokens` does not hold yet."""
        return len(self.stored) if self.rows is None else int(self.rows.num_tokens[self.row])

    @property
    def num_computed(self) -> int:
        return 0 if self.rows is None else int(self.rows.num_computed[self.row])

    @property
    def num_settled(self) -> int:
        """Computed tokens that are known: without drafts that have yet to be verified."""
        return 0 if self.rows is None else int(min(self.rows.num_computed[self.row], self.rows.num_known[self.row]))

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_remaining(self) -> int:
        return len(self.stored) if self.rows is None else int(self.rows.num_remaining(self.row))

    @property
    def reads_cache(self) -> bool:
        """A sequence that wants the outputs of all its prompt computes all of it."""
        return self.cache_root is not None and not self.wants_every_row

    @property
    def wants_every_row(self) -> bool:
        """Prompt scores and mean pooling need the output of every position of the prompt."""
        return self.prompt_scores is not None or self.pools_mean

    @property
    def is_pooled(self) -> bool:
        return isinstance(self.params, PoolingParams)

    @property
    def pools_mean(self) -> bool:
        return isinstance(self.params, PoolingParams) and self.params.pooling == "mean"

    def switch_rope(self) -> None:
        """Use the long table from now on. Its KV must have been given back."""
        self.variant = 1
        self.keys = []
        if self.cache_root is not None:
            self.cache_root = _root(self.request, 1, self.shares_prefix)


@dataclass(frozen=True)
class SequenceOptions:
    """How sequences are made: the same for all requests of an engine."""

    is_caching: bool
    """--enable-prefix-caching."""
    rope_threshold: int | None = None
    """Longer prompts use the long rope table."""


def make_sequences(
    request: EngineRequest, order: tuple[float, ...], seed: int, options: SequenceOptions, first_handle: int = 0
) -> list[Sequence]:
    """One sequence per choice, or a single one when all choices must come out equal (greedy, or nothing generated)."""
    choices = _shared_choices(request.params)
    tokens = array("i", request.prompt_token_ids)
    is_long = options.rope_threshold is not None and len(request.prompt_token_ids) > options.rope_threshold
    has_root = options.is_caching or len(choices) > 1
    sequences = [
        Sequence(
            request=request,
            index=index,
            choices=shared,
            order=(*order, index),
            seed=(seed + index) & SEED_MASK,
            handle=first_handle + index,
            stored=tokens[:],
            variant=int(is_long),
            cache_root=_root(request, int(is_long), options.is_caching) if has_root else None,
            shares_prefix=options.is_caching,
            embeds=EmbedsDigest(request.embeds) if request.embeds else None,
        )
        for index, shared in enumerate(choices)
    ]
    if isinstance(request.params, SamplingParams) and request.params.prompt_logprobs is not None:
        sequences[0].prompt_scores = PromptScores(len(request.prompt_token_ids), request.params.prompt_logprobs)
    sequences[0].children = sequences[1:]
    return sequences


def forked(parent: Sequence, generated: Seq[int], handle: int) -> Sequence:
    """Another sequence of the same request, with those tokens behind the prompt. It has no KV yet."""
    return Sequence(
        request=parent.request,
        index=parent.index,
        choices=list(parent.choices),
        order=(*parent.order[:-1], handle),
        seed=parent.seed,
        handle=handle,
        stored=array("i", parent.request.prompt_token_ids) + array("i", generated),
        variant=parent.variant,
        cache_root=parent.cache_root,
        shares_prefix=parent.shares_prefix,
        embeds=EmbedsDigest(parent.request.embeds) if parent.request.embeds else None,
        was_looked_up=True,
        queue_seconds=parent.queue_seconds,
        times=parent.times,
    )


def _shared_choices(params: SamplingParams | PoolingParams) -> list[list[int]]:
    """The choices that each sequence of a request stands for."""
    if isinstance(params, PoolingParams):
        return [[0]]
    if params.temperature == 0 or params.max_tokens == 0:
        return [list(range(params.n))]
    return [[index] for index in range(params.n)]


def _root(request: EngineRequest, variant: int, is_caching: bool) -> bytes:
    return root_key(request.cache_salt, variant, "" if is_caching else request.request_id)
