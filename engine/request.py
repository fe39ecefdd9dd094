"""State of one choice of one request inside the engine. No phase, only counts."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fuseline.engine.memory.prefix_cache import root_key
from fuseline.engine.messages import EngineRequest, PositionLogprobs, SamplingParams

if TYPE_CHECKING:
    from fuseline.engine.memory.swap import SwappedKV
    from fuseline.engine.run.request_rows import RequestRows

SEED_MASK = (1 << 63) - 1


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens so far and how many of them have their KV computed; it runs while the second catches up with the first.

    While it runs, its counts and new tokens are in the arrays of `rows`. Owners: `row` the scheduler; blocks and keys
    the KV manager; tokens the engine.
    """

    request: EngineRequest
    index: int
    choices: list[int]
    """Unfinished choices it stands for, ascending (greedy n > 1 computes one sequence)."""
    order: tuple[float, ...]
    """Place in the queue; the largest is preempted first."""
    seed: int
    handle: int
    """Stands for it in messages; no two sequences of an engine share one."""
    stored: array[int]
    """Its tokens when it last got a row or was asked for them."""
    cache_root: bytes | None
    shares_prefix: bool
    row: int = -1
    """Row of the running arrays; -1 while not running."""
    rows: RequestRows | None = None
    num_pending: int = 0
    """Tokens that a step still computes for a sequence that has lost its row meanwhile."""
    variant: int = 0
    """Rope table in use (longrope)."""
    is_finished: bool = False
    was_looked_up: bool = False
    """The prefix cache's counts include it."""
    has_output: bool = False
    queue_seconds: float | None = None
    """From its request's arrival to its first step; None while it waits for that."""
    num_cached: int = 0
    prompt_scores: list[PositionLogprobs | None] | None = None
    """Filled in while the prompt is computed; None when not wanted or already sent."""
    children: list[Sequence] = field(default_factory=list)
    """Choices that wait for this one's prompt to be computed."""
    blocks: list[list[int]] = field(default_factory=list)
    first_held: list[int] = field(default_factory=list)
    num_committed: int = 0
    cache_epoch: int = 0
    """Of the prefix cache when it started; a sequence of another epoch commits no blocks."""
    keys: list[bytes] = field(default_factory=list)
    swapped: SwappedKV | None = None
    """Its KV in host memory, while it waits to go on."""

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def tokens(self) -> array[int]:
        """All that are known. Reading it costs a little; steps work on the arrays."""
        if self.rows is not None:
            self.rows.copy_new_tokens(self)
        return self.stored

    @property
    def num_tokens(self) -> int:
        """Of a running sequence with the token that a step is about to yield, which `tokens` does not hold yet."""
        return len(self.stored) if self.rows is None else int(self.rows.num_tokens[self.row])

    @property
    def num_computed(self) -> int:
        return 0 if self.rows is None else int(self.rows.num_computed[self.row])

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def num_remaining(self) -> int:
        return len(self.stored) if self.rows is None else int(self.rows.num_remaining(self.row))

    @property
    def reads_cache(self) -> bool:
        """Prompt scores need every position's logits, so such a sequence computes its whole prompt."""
        return self.cache_root is not None and self.prompt_scores is None

    def switch_rope(self) -> None:
        """Use the long table from now on. Its KV must have been given back."""
        self.variant = 1
        self.keys = []
        if self.cache_root is not None:
            self.cache_root = _root(self.request, 1, self.shares_prefix)


def make_sequences(
    request: EngineRequest,
    order: tuple[float, ...],
    seed: int,
    caching: bool,
    long_threshold: int | None,
    first_handle: int = 0,
) -> list[Sequence]:
    """One sequence per choice, or a single one when all choices must come out equal (greedy, or nothing generated)."""
    params = request.params
    is_single = params.n == 1 or params.temperature == 0 or params.max_tokens == 0
    count = 1 if is_single else params.n
    is_long = long_threshold is not None and len(request.prompt_token_ids) > long_threshold
    has_root = caching or count > 1
    sequences = [
        Sequence(
            request=request,
            index=index,
            choices=list(range(params.n)) if is_single else [index],
            order=(*order, index),
            seed=(seed + index) & SEED_MASK,
            handle=first_handle + index,
            stored=array("i", request.prompt_token_ids),
            variant=int(is_long),
            cache_root=_root(request, int(is_long), caching) if has_root else None,
            shares_prefix=caching,
        )
        for index in range(count)
    ]
    if params.prompt_logprobs is not None:
        sequences[0].prompt_scores = [None] * len(request.prompt_token_ids)
    sequences[0].children = sequences[1:]
    return sequences


def _root(request: EngineRequest, variant: int, caching: bool) -> bytes:
    return root_key(request.cache_salt, variant, "" if caching else request.request_id)
