"""Inputs and output of one step: names, shapes, padding and construction (DESIGN contract 6).

Legend: T tokens in the step, S sequences in the step, R rows with logits, G cache groups,
M blocks in the longest table of the step, N blocks of a cache, L slots of recurrent states, E positions with given
embeddings, D features.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fuseline.compile.specs import CacheGroup


@dataclass(frozen=True)
class InputSpec:
    """An input of compiled graphs: its field of StepInputs, its placeholder, its shape."""

    field: str
    placeholder: str
    """For a grouped input the prefix: group g has placeholder `<placeholder>_<g>`."""
    shape: tuple[str, ...]
    """Symbols of the legend; S1 is S + 1. A grouped field has a leading dim of G."""
    dtype: torch.dtype
    padding: int = 0
    """Value of padding tokens and sequences: token 0 at position 0 without a slot, a sequence without keys."""
    is_grouped: bool = False
    is_batched: bool = False
    """Whether the placeholder has a leading dim of 1."""
    is_of_states: bool = False
    """Whether only graphs with recurrent states have it; steps of such graphs are not padded."""


INPUTS = (
    InputSpec("token_ids", "token_ids", ("T",), torch.int64, is_batched=True),
    InputSpec("positions", "positions", ("T",), torch.int64, is_batched=True),
    InputSpec("rope_rows", "rope_rows", ("T",), torch.int64),
    InputSpec("query_start", "query_start", ("S1",), torch.int32),
    InputSpec("seq_lens", "seq_lens", ("S",), torch.int32),
    InputSpec("logits_rows", "logits_rows", ("R",), torch.int64),
    InputSpec("slot_mapping", "slots", ("T",), torch.int64, padding=-1, is_grouped=True),
    InputSpec("block_tables", "block_table", ("S", "M"), torch.int32, is_grouped=True),
    InputSpec("state_slots", "state_slots", ("S",), torch.int64, is_of_states=True),
    InputSpec("embed_rows", "embed_rows", ("E",), torch.int64),
    InputSpec("embeds", "embeds", ("E", "D"), torch.float32),
)
"""Also the argument order of padding kernels. The last two are inputs of a graph that takes embeddings."""
BY_FIELD = {spec.field: spec for spec in INPUTS}
BY_PLACEHOLDER = {spec.placeholder: spec for spec in INPUTS}


@dataclass
class StepInputs:
    """Contiguous CPU tensors. Sequences follow each other in the token dimension.

    A token's key and value are written to slot = block * block_size + offset; slot -1 writes nothing.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    rope_rows: Tensor  # [T] int64, == positions unless the model has a RopeSwitchSpec
    query_start: Tensor  # [S + 1] int32, first token of each sequence; query_start[S] == T
    seq_lens: Tensor  # [S] int32, tokens computed after this step (past and this step's)
    slot_mapping: Tensor  # [G, T] int64
    block_tables: Tensor  # [G, S, M] int32; blocks before the window may have any valid id
    logits_rows: Tensor  # [R] int64, indices into T
    sources: Tensor | None = None  # [T] int32: where >= 0, the token is sampled[sources[t]], not token_ids[t]
    sampled: Tensor | None = None  # [rows] int64 on the device, tokens sampled by the previous step
    state_slots: Tensor | None = None  # [S] int64, for a StateSpec; a state at position 0 starts as zero
    embed_rows: Tensor | None = None  # [E] int64, indices into T: positions with given embeddings
    embeds: Tensor | None = None  # [E, D] float32

    def fields(self) -> dict[str, Tensor]:
        """The tensors of INPUTS by field name; without slots of states or embeddings if none are given."""
        found = {spec.field: getattr(self, spec.field) for spec in INPUTS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


GraphOutput = Tensor | tuple[Tensor, Tensor]
"""Logits [1, R, V] of a graph, with the hidden states [1, R, D] if it gives them."""


@dataclass(frozen=True)
class StepOutput:
    """Results of one step, on the device that computed them, valid until the next one."""

    logits: Tensor
    """[R, V], float32 or on a GPU the model's dtype, which sampling widens as it reads."""
    hidden: Tensor | None = None
    """[R, D] in the model's dtype, the input of the final linear; None unless the model was compiled to return it."""

    @staticmethod
    def of(found: GraphOutput, rows: Tensor | None) -> StepOutput:
        """From a graph's results; `rows` are selected if the graph has computed those of all tokens."""
        results = [result[0] for result in (found if isinstance(found, tuple) else (found,))]
        if rows is not None:
            results = [result.index_select(0, rows) for result in results]
        return StepOutput(*results)


@dataclass(frozen=True)
class BlockCopy:
    """Blocks to copy between the device's caches and host memory before a step computes."""

    is_out: bool
    """Whether blocks are copied from the device to the host."""
    pairs: tuple[np.ndarray, ...]
    """[2, N] int64 for each cache group: blocks of the device's caches and of the host's."""


def cache_name(kind: str, layer: int) -> str:
    """Placeholder of a layer's key (k) or value (v) cache."""
    return f"{kind}_cache_{layer}"


def cache_names(group: CacheGroup, caches: Collection[str]) -> list[str]:
    """Placeholders of a group's caches; a layer of latents has keys only."""
    return [name for layer in group.layers for kind in "kv" if (name := cache_name(kind, layer)) in caches]


def is_cache(placeholder: str) -> bool:
    return placeholder.startswith(("k_cache_", "v_cache_"))


def state_name(number: int) -> str:
    """Placeholder of a recurrent state."""
    return f"recurrent_state_{number}"


def is_state(placeholder: str) -> bool:
    return placeholder.startswith("recurrent_state_")


def group_placeholder(field: str, group: int) -> str:
    """Placeholder of a grouped field for cache group `group`."""
    return f"{BY_FIELD[field].placeholder}_{group}"


def graph_values(tensors: Mapping[str, Tensor], has_rope_switch: bool = False) -> dict[str, Tensor]:
    """Graph inputs by placeholder name, from the fields present.

    A model with two rope tables gets rope rows where others get positions.
    """
    values: dict[str, Tensor] = {}
    for spec in INPUTS:
        field = "rope_rows" if spec.field == "positions" and has_rope_switch else spec.field
        if field not in tensors:
            continue
        tensor = tensors[field]
        if spec.is_grouped:
            values |= {f"{spec.placeholder}_{group}": tensor[group] for group in range(tensor.shape[0])}
        else:
            values[spec.placeholder] = tensor[None] if spec.is_batched else tensor
    return values


def only_decodes(inputs: Mapping[str, Tensor]) -> bool:
    """Whether each sequence computes one token and the logits of all are wanted, in order.

    `inputs` of one step on the host, by field or by placeholder name.
    """
    rows, num_tokens = inputs["logits_rows"], inputs["token_ids"].shape[-1]
    is_even = inputs["seq_lens"].shape[0] == num_tokens == rows.shape[0]
    return is_even and np.array_equal(rows.numpy(), np.arange(num_tokens))


def padding(sizes: Mapping[str, int], num_groups: int, device: str = "cpu") -> dict[str, Tensor]:
    """Padding for the fields whose sizes are all known, by field name in the order of INPUTS."""
    return {
        spec.field: torch.full(
            (num_groups,) * spec.is_grouped + tuple(sizes[symbol] for symbol in spec.shape),
            spec.padding, dtype=spec.dtype, device=device,
        )
        for spec in INPUTS if set(spec.shape) <= set(sizes) and not spec.is_of_states
    }  # fmt: skip


def no_embeds(embed_dim: int, device: str = "cpu") -> dict[str, Tensor]:
    """Inputs of a step without embeddings, by field name: empty, or absent for a graph that takes none (0)."""
    return padding({"E": 0, "D": embed_dim}, 0, device) if embed_dim else {}


def narrowed(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Views of the first `sizes` entries along each named dimension, by field name."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        spec = BY_FIELD[name]
        for dim, symbol in enumerate(spec.shape, start=int(spec.is_grouped)):
            tensor = tensor.narrow(dim, 0, sizes[symbol]) if symbol in sizes else tensor
        found[name] = tensor
    return found


def meta_input(placeholder: str, like: Tensor, block_size: int, sizes: Mapping[str, int]) -> Tensor:
    """A meta tensor of the placeholder's shape; `like` is its traced value, `sizes` the value of each symbol."""
    if is_cache(placeholder):
        shape = (sizes["N"], like.shape[1], block_size, like.shape[3])
    elif is_state(placeholder):
        shape = (sizes["L"], *like.shape[1:])
    else:
        spec = BY_PLACEHOLDER.get(placeholder) or BY_PLACEHOLDER[placeholder.rpartition("_")[0]]
        sizes = {**sizes, "D": like.shape[-1]}
        shape = (1,) * spec.is_batched + tuple(sizes[symbol] for symbol in spec.shape)
    return torch.empty(shape, dtype=like.dtype, device="meta")


def make_step(
    counts: Sequence[int],
    lengths: Sequence[int],
    tables: Tensor,
    block_size: int,
    token_ids: Tensor | None = None,
    logits_rows: Tensor | None = None,
) -> StepInputs:
    """A step in which sequence s computes the last counts[s] of its lengths[s] tokens.

    `tables` [G, S, M] are the blocks of each sequence. By default token ids are 0, and the logits of each sequence's
    last token are wanted.
    """
    lens, num_new = torch.tensor(lengths), torch.tensor(counts)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), num_new.cumsum(0)))
    owners = torch.repeat_interleave(torch.arange(len(counts)), num_new)
    positions = torch.arange(len(owners)) - starts[owners] + (lens - num_new)[owners]
    slots = tables[:, owners, positions // block_size].long() * block_size + positions % block_size
    return StepInputs(
        token_ids=torch.zeros_like(positions) if token_ids is None else token_ids,
        positions=positions,
        rope_rows=positions,
        query_start=starts.int(),
        seq_lens=lens.int(),
        slot_mapping=slots,
        block_tables=tables.int(),
        logits_rows=starts[1:] - 1 if logits_rows is None else logits_rows,
    )
