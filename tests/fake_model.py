"""A model whose next token is a hash of what it can see through block tables and slots.

It writes each token into its cache by slot and reads the visible sequence back through the tables, so any mistake in
scheduling or memory changes the tokens. `next_logits` is the same function without any cache.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import time
from collections.abc import Sequence

import numpy as np
import torch

from fuseline.compile.backends.device_inputs import Layout
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph_inputs import BlockCopy, GraphInputs
from fuseline.compile.specs import CacheGroup, CacheSpec, ModelInfo, RopeSwitchSpec
from fuseline.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from fuseline.engine.run.device import HostDevice, HostResults, SampleOps
from fuseline.engine.run.sampler_reference import reference_device

VOCAB_SIZE = 48
BLOCK_SIZE = 4
KILL_TOKEN = 47
"""In a prompt: the fake model kills its own process."""
NAN_TOKEN = 46
"""Visible to a row: its logits are not finite."""


def next_logits(tokens: Sequence[int], windows: Sequence[int], threshold: int | None = None) -> np.ndarray:
    """Logits [V] after `tokens`, seen through one window per cache group."""
    variant = int(threshold is not None and len(tokens) > threshold)
    return _logits([list(tokens[-w:]) if w else list(tokens) for w in windows], variant)


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
    ) -> None:
        self.block_size = block_size
        self.step_seconds = step_seconds
        self.num_runs = 0
        self.num_swaps = {True: 0, False: 0}  # out, in
        self.info = ModelInfo(
            architecture="FakeForCausalLM",
            vocab_size=VOCAB_SIZE,
            hidden_size=8,
            num_layers=len(windows),
            max_model_len=max_model_len,
            dtype="float32",
            eos_token_ids=(0,),
            weight_bytes=0,
            arena_bytes=0,
            rope_switch=rope_switch,
            cache_specs=tuple(CacheSpec(i, 1, 4, 4, "float32", w) for i, w in enumerate(windows)),
            cache_groups=tuple(CacheGroup(w, (i,)) for i, w in enumerate(windows)),
        )

    def allocate_caches(self, num_blocks: Sequence[int]) -> None:
        # Per slot: token, position, rope variant.
        self.caches = [np.full((n * self.block_size, 3), -1, np.int64) for n in num_blocks]

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

    def run(
        self, inputs: GraphInputs, sources: torch.Tensor | None = None, sampled: torch.Tensor | None = None
    ) -> torch.Tensor:
        if sources is not None:
            inputs.token_ids[sources >= 0] = sampled[sources[sources >= 0].long()]
        time.sleep(self.step_seconds)
        self.num_runs += 1
        self._write(inputs)
        starts = inputs.query_start.numpy()
        assert starts[-1] == len(inputs.token_ids)
        rows = []
        for token_row in inputs.logits_rows.tolist():
            seq = int(np.searchsorted(starts, token_row, side="right")) - 1
            rows.append(self._row(inputs, seq, int(inputs.positions[token_row])))
        return torch.from_numpy(np.array(rows, np.float32).reshape(len(rows), VOCAB_SIZE))

    def _write(self, inputs: GraphInputs) -> None:
        if KILL_TOKEN in inputs.token_ids:
            os._exit(9)
        variants = (inputs.rope_rows - inputs.positions).numpy()
        if self.info.rope_switch is not None:
            variants = variants // self.info.rope_switch.table_rows
        for cache, slots in zip(self.caches, inputs.slot_mapping.numpy(), strict=True):
            assert len(set(slots.tolist())) == len(slots), "two tokens of a step share a slot"
            assert (slots >= self.block_size).all(), "a token is written to the null block"
            cache[slots] = np.stack([inputs.token_ids.numpy(), inputs.positions.numpy(), variants], 1)

    def _row(self, inputs: GraphInputs, seq: int, position: int) -> np.ndarray:
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
        assert len(variants) == 1, "keys of two rope tables are mixed"
        return _logits(views, variants.pop())


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


class LostCard(FakeModel):
    """Its card takes no more calls: the error of an earlier one comes back from each, from destructors too."""

    def run(self, *inputs: object) -> torch.Tensor:
        atexit.register(os.abort)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nFor debugging consider ...")


def build_lost_card(config: EngineConfig, progress) -> FakeModel:
    return LostCard(max_model_len=config.compile.max_model_len, block_size=config.cache.block_size)


def build_broken(config: EngineConfig, progress) -> FakeModel:
    raise ValueError("no config.json in\nfake; give a checkpoint directory")
