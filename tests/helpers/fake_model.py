"""A model whose next token is a hash of what it can see through block tables and slots.

It writes each token into its cache by slot and reads the visible sequence back through the tables, so any mistake in
scheduling or memory changes the tokens. `next_logits` is the same function without any cache. With a recurrent state
the logits depend on a running digest of all tokens too, which the model keeps by state slot. A position that is fed by
an embedding holds the number that `embedded` gives it in place of its token.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import time
from collections.abc import Sequence

import numpy as np
import torch

from fuseline.compile.config import CompileConfig
from fuseline.compile.graph_inputs import BlockCopy, StepInputs, StepOutput
from fuseline.compile.residency.uploads import Layout
from fuseline.compile.specs import CacheGroup, CacheSpec, ModelInfo, RopeSwitchSpec, StateSpec
from fuseline.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from fuseline.engine.run.device import HostDevice, HostResults, SampleOps
from fuseline.engine.run.sampler_reference import reference_device

VOCAB_SIZE = 48
HIDDEN_SIZE = 8
BLOCK_SIZE = 4
KILL_TOKEN = 47
"""In a prompt: the fake model kills its own process."""
NAN_TOKEN = 46
"""Visible to a row: its logits are not finite."""


def next_logits(
    tokens: Sequence[int], windows: Sequence[int], threshold: int | None = None, with_state: bool = False
) -> np.ndarray:
    """Logits [V] after `tokens`, seen through one window per cache group, and by a recurrent state."""
    variant = int(threshold is not None and len(tokens) > threshold)
    views = [list(tokens[-w:]) if w else list(tokens) for w in windows]
    return _logits([*views, [state_after(tokens)]] if with_state else views, variant)


def state_after(tokens: Sequence[int], state: int = 0) -> int:
    """NAN_TOKEN for good once it is seen."""
    for token in tokens:
        is_faulty = NAN_TOKEN in (token, state)
        state = NAN_TOKEN if is_faulty else (state * 1_000_003 + int(token) + 1) % (2**31 - 1)
    return state


def embedded(row: np.ndarray) -> int:
    """The number that stands for an embedding [HIDDEN_SIZE]."""
    return 1000 + int(row[0])


def hidden_state(token: int, position: int) -> np.ndarray:
    """[HIDDEN_SIZE]: what the model gives for a token; of no meaning."""
    return np.cos(np.arange(1, HIDDEN_SIZE + 1) * (token + 1) + position).astype(np.float32)


def _logits(views: list[list[int]], variant: int) -> np.ndarray:
    digest = hashlib.sha256(repr((views, variant)).encode()).digest()
    logits = np.random.default_rng(np.frombuffer(digest, np.uint32)).normal(0, 2, VOCAB_SIZE).astype(np.float32)
    logits[[NAN_TOKEN, KILL_TOKEN]] = -30
    if any(NAN_TOKEN in view for view in views):
        logits[:] = np.nan
    return logits


class FakeModel:
    def __init__(
        self,
        windows: Sequence[int] = (0,),
        max_model_len: int = 64,
        block_size: int = BLOCK_SIZE,
        rope_switch: RopeSwitchSpec | None = None,
        step_seconds: float = 0.0,
        with_state: bool = False,
    ) -> None:
        self.block_size = block_size
        self.step_seconds = step_seconds
        self.num_runs = 0
        self.num_swaps = {True: 0, False: 0}  # out, in
        self.info = ModelInfo(
            architecture="FakeForCausalLM",
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            num_layers=len(windows),
            max_model_len=max_model_len,
            dtype="float32",
            eos_token_ids=(0,),
            weight_bytes=0,
            arena_bytes=0,
            rope_switch=rope_switch,
            cache_specs=tuple(CacheSpec(i, 1, 4, 4, "float32", w) for i, w in enumerate(windows)),
            cache_groups=tuple(CacheGroup(w, (i,)) for i, w in enumerate(windows)),
            state_specs=(StateSpec(len(windows), (4,), "float32"),) if with_state else (),
            embed_dim=HIDDEN_SIZE,
            hidden_dim=HIDDEN_SIZE,
        )

    def allocate_caches(self, num_blocks: Sequence[int]) -> None:
        # Per slot: token, position, rope variant.
        self.caches = [np.full((n * self.block_size, 3), -1, np.int64) for n in num_blocks]

    def allocate_states(self, num_slots: int) -> None:
        self.states = [-1] * num_slots  # nobody's

    def allocate_host_blocks(self, num_blocks: Sequence[int]) -> None:
        self.host = [np.full((n * self.block_size, 3), -1, np.int64) for n in num_blocks]

    def swap(self, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            self.num_swaps[copy.is_out] += 1
            for cache, host, (on_device, on_host) in zip(self.caches, self.host, copy.pairs, strict=True):
                assert (on_device > 0).all() and len(set(on_host.tolist())) == len(on_host)
                cache, host = (part.reshape(-1, self.block_size, 3) for part in (cache, host))
                if copy.is_out:
                    host[on_host] = cache[on_device]
                else:
                    cache[on_device] = host[on_host]

    def copy_states(self, pairs: np.ndarray) -> None:
        sources, targets = pairs.tolist()
        assert len(set(targets)) == len(targets), "a state gets two contents"
        for target, state in zip(targets, [self.states[source] for source in sources], strict=True):
            self.states[target] = state

    def copy_blocks(self, pairs: Sequence[np.ndarray]) -> None:
        for cache, (sources, targets) in zip(self.caches, pairs, strict=True):
            blocks = cache.reshape(-1, self.block_size, 3)
            assert (sources > 0).all() and (targets > 0).all() and len(set(targets.tolist())) == len(targets)
            assert not set(sources.tolist()) & set(targets.tolist())
            blocks[targets] = blocks[sources]

    def run(self, inputs: StepInputs) -> StepOutput:
        if inputs.sources is not None:
            is_sampled = inputs.sources >= 0
            inputs.token_ids[is_sampled] = inputs.sampled[inputs.sources[is_sampled].long()]
        time.sleep(self.step_seconds)
        self.num_runs += 1
        self._read(inputs)
        self._write(inputs)
        starts = inputs.query_start.numpy()
        assert starts[-1] == len(inputs.token_ids)
        rows = []
        for token_row in inputs.logits_rows.tolist():
            seq = int(np.searchsorted(starts, token_row, side="right")) - 1
            rows.append(self._row(inputs, seq, int(inputs.positions[token_row])))
        self._advance_states(inputs)
        logits = torch.from_numpy(np.array(rows, np.float32).reshape(len(rows), VOCAB_SIZE))
        return StepOutput(logits, self._hidden_states(inputs))

    def _write(self, inputs: StepInputs) -> None:
        if KILL_TOKEN in inputs.token_ids:
            os._exit(9)
        variants = (inputs.rope_rows - inputs.positions).numpy()
        if self.info.rope_switch is not None:
            variants = variants // self.info.rope_switch.table_rows
        for cache, slots in zip(self.caches, inputs.slot_mapping.numpy(), strict=True):
            assert len(set(slots.tolist())) == len(slots), "two tokens of a step share a slot"
            assert (slots >= self.block_size).all(), "a token is written to the null block"
            cache[slots] = np.stack([self._content, inputs.positions.numpy(), variants], 1)

    def _read(self, inputs: StepInputs) -> None:
        """The tokens, embeddings in their place."""
        self._content = inputs.token_ids.numpy().copy()
        if inputs.embeds is not None:
            self._content[inputs.embed_rows.numpy()] = [embedded(row) for row in inputs.embeds.numpy()]

    def _hidden_states(self, inputs: StepInputs) -> torch.Tensor:
        """[R, HIDDEN_SIZE] of the wanted rows."""
        wanted = inputs.logits_rows.numpy()
        pairs = zip(self._content[wanted].tolist(), inputs.positions.numpy()[wanted].tolist(), strict=True)
        states = [hidden_state(*pair) for pair in pairs]
        return torch.from_numpy(np.array(states, np.float32).reshape(len(states), HIDDEN_SIZE))

    def _state(self, inputs: StepInputs, seq: int, end: int) -> int:
        """State of a sequence after the tokens of the step up to `end`."""
        begin = int(inputs.query_start[seq])
        state = 0 if inputs.positions[begin] == 0 else self.states[inputs.state_slots[seq]]
        assert state >= 0, "a state is read that nobody has written"
        return state_after(self._content[begin:end], state)

    def _advance_states(self, inputs: StepInputs) -> None:
        if not self.info.state_specs:
            return
        slots = inputs.state_slots.tolist()
        assert len(set(slots)) == len(slots), "two sequences of a step share a state"
        ends = inputs.query_start[1:].tolist()
        after = [self._state(inputs, seq, end) for seq, end in enumerate(ends)]
        for slot, state in zip(slots, after, strict=True):
            self.states[slot] = state

    def _row(self, inputs: StepInputs, seq: int, position: int) -> np.ndarray:
        assert position < inputs.seq_lens[seq]
        views: list[list[int]] = []
        variants: set[int] = set()
        for group, cache in enumerate(self.caches):
            window = self.info.cache_groups[group].window
            first = max(0, position - window + 1) if window else 0
            positions = np.arange(first, position + 1)
            blocks = inputs.block_tables[group, seq].numpy()[positions // self.block_size]
            entries = cache[blocks * self.block_size + positions % self.block_size]
            assert (entries[:, 1] == positions).all(), f"group {group} shows other positions than {first}..{position}"
            views.append(entries[:, 0].tolist())
            variants |= set(entries[:, 2].tolist())
        assert len(variants) <= 1, "keys of two rope tables are mixed"
        if self.info.state_specs:
            begin = int(inputs.query_start[seq])
            views.append([self._state(inputs, seq, begin + position - int(inputs.positions[begin]) + 1)])
        return _logits(views, variants.pop() if variants else 0)


class QueueResults(HostResults):
    """Written at once, as no one can tell before reading them."""

    def __init__(self, tensors: dict[str, torch.Tensor], log: list[tuple[str, int]]) -> None:
        super().__init__(tensors)
        self.log, self.number = log, sum(kind == "sent" for kind, _ in log)

    def send(self) -> None:
        self.log.append(("sent", self.number))

    def read(self) -> dict[str, torch.Tensor]:
        self.log.append(("read", self.number))
        return {name: tensor.clone() for name, tensor in self.tensors.items()}


class FakeQueue(HostDevice):
    """A device that the host is ahead of. `log`: ("sent" | "read", number of the step)."""

    is_asynchronous = True

    def __init__(self, ops: SampleOps | None = None) -> None:
        super().__init__(ops or reference_device().ops, "fake queue")
        self.log: list[tuple[str, int]] = []

    def results(self, layout: Layout) -> QueueResults:
        return QueueResults(super().results(layout).tensors, self.log)


def find_queue(config: EngineConfig) -> FakeQueue:
    return FakeQueue()


def fake_config(**settings: object) -> EngineConfig:
    """An EngineConfig for the fake model; settings are fields of any of the nested configurations."""
    settings = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "block_size": BLOCK_SIZE, **settings}

    def pick(kind: type) -> dict[str, object]:
        return {name: value for name, value in settings.items() if name in kind.__dataclass_fields__}

    cache = CacheConfig(**{"num_gpu_blocks_override": 64, **pick(CacheConfig)})
    compile_config = CompileConfig(model="fake", max_model_len=int(settings.get("max_model_len", 64)))
    return EngineConfig(
        compile=compile_config, cache=cache, scheduler=SchedulerConfig(**pick(SchedulerConfig)),
        seed=int(settings.get("seed", 0)),
    )  # fmt: skip


def build_fake(config: EngineConfig, progress) -> FakeModel:
    progress("loading", 1, 2)
    progress("loading", 2, 2)
    return FakeModel(max_model_len=config.compile.max_model_len, block_size=config.cache.block_size)


def build_slow_fake(config: EngineConfig, progress) -> FakeModel:
    return FakeModel(max_model_len=config.compile.max_model_len, step_seconds=0.005)


class LostGpu(FakeModel):
    """Its GPU takes no more calls: the error of an earlier one comes back from each, from destructors too."""

    def run(self, *inputs: object) -> torch.Tensor:
        atexit.register(os.abort)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nFor debugging consider ...")


def build_lost_gpu(config: EngineConfig, progress) -> FakeModel:
    return LostGpu(max_model_len=config.compile.max_model_len, block_size=config.cache.block_size)


def build_broken(config: EngineConfig, progress) -> FakeModel:
    raise ValueError("no config.json in\nfake; give a checkpoint directory")
