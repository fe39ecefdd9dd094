"""A model's serving graph against Transformers, before the graph is trusted.

Some models compute what a serving graph does not carry: values of the whole batch, masks of their own, sizes of a
cache. Their graph is captured without complaint and answers wrongly. So a copy of the model with few layers, small
sizes and random weights is captured and lowered like the model itself, runs two sequences in one batch, in chunks and
then token by token over a paged cache, and must give the logits of Transformers' eager model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fuseline.compile.capture.captured import CapturedModel
from fuseline.compile.capture.errors import CaptureError, LoadError, one_line
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph_inputs import StepInputs, StepOutput, make_step
from fuseline.compile.specs import ModelInfo

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fuseline.compile.capture.reference import RandomModel

LENGTHS = (48, 23)
"""Tokens of the two sequences; the first exceeds every window and length of a small config, the second only windows."""
NUM_DECODED = 6
"""Tokens at the end of each that come one by one."""
CHUNK = 9
"""Tokens of a prompt in a step."""
MAX_ROWS = CHUNK * len(LENGTHS)
"""Tokens of a step, and of each its logits; a plan has room for the logits of as many tokens as sequences."""
MAX_ERROR = 2e-3
"""Largest difference of a row of logits, relative to the row's standard deviation. Rounding gives about 1e-5."""
SPREADING = 10
"""So many times as much as rounding alone changes the logits is still rounding: layers that normalize small differences
(of recurrent states) spread it to 1e-2."""
MOST_ERROR = 2e-2
"""Largest error that counts as rounding however much a nudge changes: a graph that lacks something gives more."""
MAX_PARAMETERS = 50_000_000
"""Largest number of parameters of a copy that keeps the model's sizes."""
SETTINGS = {
    "dtype": "float32", "kv_cache_dtype": "auto", "level": 1, "max_model_len": 0, "max_num_batched_tokens": MAX_ROWS,
    "max_num_seqs": MAX_ROWS, "cpu_offload_gb": 0.0, "batch_invariant": False, "weight_format": "",
    "quantization": None,
    "gives_hidden": False, "takes_embeds": False,
}  # fmt: skip
"""The copy is compiled for this machine's CPU, in float32, for a few tokens."""
CASTS = ("aten.to.", "aten._to_copy", "prims.convert_element_type")
SKIP = "--skip-model-check serves it all the same"
logger = logging.getLogger(__name__)


class Runnable(Protocol):
    """Parts of a compiled model that the check needs."""

    info: ModelInfo

    def allocate_caches(self, num_blocks: Sequence[int]) -> None: ...

    def allocate_states(self, num_slots: int) -> None: ...

    def run(self, inputs: StepInputs) -> StepOutput: ...


Build = Callable[[CapturedModel, CompileConfig, "RandomModel"], Runnable]
"""Passes, lowering and weights for a captured model."""


class _NotComparable(Exception):
    """Transformers cannot build or run this copy of the model; the reason."""


def check_model(config: CompileConfig, captured: CapturedModel, build: Build) -> str:
    """The verdict in words. Raises CaptureError for a model whose serving graph computes something else."""
    from fuseline.compile.capture.hf_model import load_config

    hf_config = load_config(config)
    reasons: list[str] = []
    # Some configs take no other number of layers than their own.
    few, all_layers = captured.num_distinct_layers, captured.facts.num_layers
    for num_layers, narrow in dict.fromkeys(((few, True), (few, False), (all_layers, True))):
        try:
            small = _copy(hf_config, num_layers, narrow)
            error, missing = _compared(small, captured, replace(config, **SETTINGS), build)
        except _NotComparable as reason:
            reasons.append(str(reason))
            continue
        text = small.get_text_config()
        return (
            f"checked: a copy of {text.num_hidden_layers} layers, hidden size {text.hidden_size}, computes what "
            f"Transformers computes, to {error:.0e} of the logits' spread{missing}"
        )
    verdict = f"not checked: {reasons[0]}"
    name = captured.facts.model_type
    logger.warning("%s cannot be compared with Transformers before it is served: %s", name, verdict)
    return verdict


@contextmanager
def _needed(what_failed: str) -> Iterator[None]:
    """Raises errors inside, which the code of a model or its config may raise of any type, as _NotComparable."""
    try:
        yield
    except _NotComparable:
        raise
    except Exception as error:
        raise _NotComparable(f"{what_failed} ({one_line(error)})") from error


def _copy(hf_config: PreTrainedConfig, num_layers: int, narrow: bool) -> PreTrainedConfig:
    from fuseline.compile.capture.small_config import small_config

    with _needed("its config cannot be made small"):
        return small_config(hf_config, num_layers, narrow)


def _compared(small: PreTrainedConfig, whole: CapturedModel, config: CompileConfig, build: Build) -> tuple[float, str]:
    """(largest error, ops of the whole model that the copy lacks, in words). Raises CaptureError for a wrong copy."""
    reference, captured = _both(small, config)
    missing = sorted(_ops(whole) - _ops(captured))
    if missing:
        logger.warning("the model check of %s does not cover %s", small.model_type, ", ".join(missing))
    sequences = _sequences(captured)
    with _needed("Transformers cannot run a small copy"):
        expected = [reference.logits(tokens) for tokens in sequences]
    if not all(bool(torch.isfinite(logits).all()) for logits in expected):
        raise _NotComparable("a small copy of random weights has infinite logits")
    name = small.model_type
    # Asked before the passes, which change the graph in place.
    positions = captured.graph.graph.find_nodes(op="placeholder", target="positions")
    takes_positions = any(isinstance(user.meta.get("val"), Tensor) for node in positions for user in node.users)
    try:
        found = serve(build(captured, config, reference), sequences, config.block_size)
    except LoadError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{name}: its serving graph fails ({one_line(error)}); --skip-model-check tries it all the same"
        ) from error
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        wrong = first_wrong(ours, theirs)
        if wrong is not None:
            wrong = first_wrong(ours, theirs, allowed_error(reference, sequences[number], theirs))
        if wrong is not None:
            raise CaptureError(
                f"{name} would answer wrongly: a small copy of it gives other logits than Transformers from token "
                f"{wrong + 1} on, {_cause(number, wrong, takes_positions)}; {SKIP}"
            )
    error = max(float(row_errors(ours, theirs).max()) for ours, theirs in zip(found, expected, strict=True))
    return error, f"; not covered: {', '.join(missing)}" if missing else ""


def _ops(captured: CapturedModel) -> set[str]:
    """Names of the ops that compute tensors. Casts are left out: a copy computes in float32."""
    calls = (node for node in captured.graph.graph.nodes if node.op == "call_function")
    named = {str(node.target) for node in calls if isinstance(node.meta.get("val"), Tensor)}
    return {name for name in named if not name.startswith(CASTS)}


def _both(small: PreTrainedConfig, config: CompileConfig) -> tuple[RandomModel, CapturedModel]:
    from fuseline.compile.capture.export import capture_config
    from fuseline.compile.capture.hf_model import num_parameters
    from fuseline.compile.capture.reference import RandomModel

    with _needed("Transformers cannot build a small copy"):
        if num_parameters(small, config.trust_remote_code) > MAX_PARAMETERS:
            raise _NotComparable("no copy is small enough")
        reference = RandomModel(small, config.trust_remote_code)
    with _needed("a small copy cannot be captured"):
        return reference, capture_config(small, torch.float32, config)


def _sequences(captured: CapturedModel) -> list[Tensor]:
    """Random token ids; the smallest ids are left out, they often have a meaning of their own."""
    most = captured.facts.max_positions or max(LENGTHS)
    generator = torch.Generator().manual_seed(1)
    vocab = captured.facts.vocab_size
    return [torch.randint(min(8, vocab // 2), vocab, (min(n, most),), generator=generator) for n in LENGTHS]


def row_errors(found: Tensor, expected: Tensor) -> Tensor:
    """[T] the largest difference of each token's logits, relative to their standard deviation."""
    return (found - expected).abs().amax(-1) / expected.std(-1).clamp_min(1e-6)


def first_wrong(found: Tensor, expected: Tensor, allowed: float = MAX_ERROR) -> int | None:
    """The first token whose logits are wrong."""
    wrong = (~(row_errors(found, expected) <= allowed)).nonzero().flatten().tolist()
    return wrong[0] if wrong else None


def allowed_error(reference: RandomModel, tokens: Tensor, expected: Tensor) -> float:
    """Largest error that rounding explains, `expected` being the reference's logits of these tokens."""
    spread = SPREADING * float(row_errors(reference.nudged_logits(tokens), expected).max())
    return min(max(MAX_ERROR, spread), MOST_ERROR)


def _cause(number: int, wrong: int, takes_positions: bool) -> str:
    """The cause as far as sequence `number` and its first wrong token tell it; the first sequence starts alone."""
    if number == 0 and wrong < CHUNK:
        return "so it computes something that a graph for serving does not carry"
    if not takes_positions:
        return "because it counts positions from the first token of each step and does not take them as an input"
    if number > 0:
        return "because one sequence changes what it computes for another in the same step"
    return "because it needs more of a sequence's earlier steps than their keys and values"


@dataclass
class _Served:
    """A sequence on its way through the model."""

    tokens: Tensor
    blocks: list[int]
    slot: int
    """Of its recurrent states."""
    num_decoded: int
    """Tokens at the end that come one by one."""
    num_computed: int = 0

    def next_tokens(self) -> range:
        """Positions of the next step: a chunk of the prompt, or one token."""
        prompt = max(1, len(self.tokens) - self.num_decoded)
        end = min(self.num_computed + CHUNK, prompt) if self.num_computed < prompt else self.num_computed + 1
        return range(self.num_computed, min(end, len(self.tokens)))


def serve(
    model: Runnable, sequences: Sequence[Tensor], block_size: int, num_decoded: int = NUM_DECODED
) -> list[Tensor]:  # fmt: skip
    """The logits [T, V] of each sequence, all in one batch; sequence k joins at step k, its end comes token by token.

    Blocks are interleaved; a slot of recurrent states has been another sequence's.
    """
    count = len(sequences)
    blocks_each = -(-max(len(tokens) for tokens in sequences) // block_size)
    states = [
        _Served(tokens, list(range(1 + k, 1 + count * blocks_each, count)), k, num_decoded)
        for k, tokens in enumerate(sequences)
    ]
    model.allocate_caches([count * blocks_each + 1] * len(model.info.cache_groups))
    if model.info.state_specs:
        model.allocate_states(count)
        model.run(_inputs(model.info, states[::-1], block_size))
        for state in states:
            state.slot = count - 1 - state.slot
    rows: list[list[Tensor]] = [[] for _ in sequences]
    step = 0
    while any(len(state.next_tokens()) for state in states):
        batch = [k for k, state in enumerate(states) if k <= step and len(state.next_tokens())]
        counts = [len(states[k].next_tokens()) for k in batch]
        found = model.run(_inputs(model.info, [states[k] for k in batch], block_size)).logits
        logits = found.to(torch.float32, copy=True).split(counts)
        for k, part in zip(batch, logits, strict=True):
            rows[k].append(part)
            states[k].num_computed += len(part)
        step += 1
    return [torch.cat(parts) for parts in rows]


def _inputs(info: ModelInfo, batch: Sequence[_Served], block_size: int) -> StepInputs:
    """One step, with the logits of all its tokens."""
    steps = [state.next_tokens() for state in batch]
    tables = torch.tensor([state.blocks for state in batch]).expand(len(info.cache_groups), -1, -1)
    token_ids = torch.cat([state.tokens[step.start : step.stop] for state, step in zip(batch, steps, strict=True)])
    rows = torch.arange(len(token_ids))
    counts, lengths = [len(step) for step in steps], [step.stop for step in steps]
    inputs = make_step(counts, lengths, tables, block_size, token_ids, rows)
    if info.state_specs:
        inputs.state_slots = torch.tensor([state.slot for state in batch])
    switch = info.rope_switch
    if switch is None:
        return inputs
    shifts = torch.tensor([switch.table_rows * (len(state.tokens) > switch.threshold) for state in batch])
    return replace(inputs, rope_rows=inputs.positions + shifts.repeat_interleave(torch.tensor(counts)))
