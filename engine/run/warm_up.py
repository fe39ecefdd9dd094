"""Steps of nothing, before the first request: they compile the kernels and show how much memory a step takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from fuseline.compile.config import Progress
from fuseline.compile.graph_inputs import StepInputs, make_step
from fuseline.engine.config import EngineConfig
from fuseline.engine.memory.sizing import ProfiledMemory
from fuseline.engine.run.device import Device
from fuseline.engine.run.histories import History, history_bytes, history_memory
from fuseline.engine.run.row_edits import RowEdit
from fuseline.engine.run.runner import Model
from fuseline.engine.run.sampling import LOGPROBS_MODES, SampleArguments, launch_sampling

FEW_ROWS = (1, 2, 3, 16, 17, 33, 65, 129)
"""Rows of steps that kernels may treat in ways of their own, or that -O3 may have given to others."""
GRAPH_BYTES = 8 << 20
"""Kept for what a captured graph takes outside the pool; an assumption, not a measurement."""


def warm_up(device: Device, model: Model, config: EngineConfig, progress: Progress) -> ProfiledMemory:
    """Leaves the model with caches of one block. Nothing is run where the device gains nothing by it."""
    trial = _Trial(device, model, config)
    num_seqs = config.scheduler.max_num_seqs
    steps = [trial.step(counts) for counts in trial_steps(config, trial.max_model_len)]
    first = [trial.allocate_caches, trial.step([1] * num_seqs)]
    runs = _told([*first, *steps, *trial.sampling_steps()], progress)
    decode = device.profile(runs[: len(first)])
    peak = device.profile(runs[len(first) :]) + history_bytes(num_seqs, trial.max_model_len)
    graphs, most = config.graphs, config.scheduler.max_num_batched_tokens
    sizes = (*graphs.resolved(num_seqs), *graphs.resolved_whole_mixed(most), *graphs.resolved_mixed(most))
    # The graphs' pool, and trial runs on the stream that captures, whose memory other streams do not get.
    largest = decode * max((1, *(size / num_seqs for size in sizes)))
    kept = int(2 * largest) + len(sizes) * GRAPH_BYTES if sizes else 0
    return ProfiledMemory(peak, kept)


def trial_steps(config: EngineConfig, max_model_len: int) -> list[list[int]]:
    """Tokens by sequence: the largest step, prompts of an even and of an odd length, steps of many and few rows: decode
    steps as far as there are sequences, prompts beyond."""
    num_tokens, num_seqs = config.scheduler.max_num_batched_tokens, config.scheduler.max_num_seqs
    total = min(num_tokens, num_seqs * max_model_len)
    spread = np.diff(np.linspace(0, total, num_seqs + 1).astype(int)).tolist()
    longest = min(num_tokens, max_model_len)
    few = [[1] * rows for rows in FEW_ROWS if rows < num_seqs]
    few += [[rows] for rows in FEW_ROWS if num_seqs < rows < longest - 1]
    return [spread, [longest], [max(1, longest - 1)], [1] * num_seqs, *few]


def _told(runs: list[Callable[[], None]], progress: Progress) -> list[Callable[[], None]]:
    def tell(done: int, run: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            run()
            progress("warming up", done, len(runs))

        return call

    return [tell(done, run) for done, run in enumerate(runs, 1)]


class _Trial:
    """Makes runs: steps that write no cache and read block 0 of it."""

    def __init__(self, device: Device, model: Model, config: EngineConfig) -> None:
        self.device, self.model, self.config = device, model, config
        self.max_model_len = config.compile.max_model_len or model.info.max_model_len
        self._mode = LOGPROBS_MODES.index(config.logprobs_mode)
        self._sampled: torch.Tensor | None = None

    def allocate_caches(self) -> None:
        self.model.allocate_caches([1] * len(self.model.info.cache_groups))
        if self.model.info.state_specs:
            self.model.allocate_states(self.config.scheduler.max_num_seqs)

    def step(self, counts: list[int], with_history: bool = False, **settings: object) -> Callable[[], None]:
        """Every sequence samples; tokens come from the run before, if there was one. Settings: trial_arguments."""

        def run() -> None:
            inputs = self._inputs(counts)
            if self._sampled is not None:
                inputs.sources = torch.zeros(sum(counts), dtype=torch.int32)
                inputs.sampled = self._sampled
            logits = self.model.run(inputs).logits
            # Prompt scores of the same rows, once more.
            logits = torch.cat((logits, logits)) if settings.get("with_scores") else logits
            arguments = trial_arguments(len(counts), self._mode, **settings)
            if with_history:
                arguments = self._with_history(arguments)
            self._sampled = launch_sampling(self.device, logits, arguments, self._sampled).tokens

        return run

    def sampling_steps(self) -> list[Callable[[], None]]:
        """With each set of kernels that sampling may launch."""
        counts = [1] * self.config.scheduler.max_num_seqs
        mask = -(-self.model.info.vocab_size // 32)
        return [
            self.step(counts, with_lists=True),
            self.step(counts, with_lists=True, with_history=True),
            self.step(counts, with_history=True),
            self.step(counts, mask_words=mask),
            self.step(counts, mask_words=mask, with_history=True),
            self.step(counts, with_edits=True),
            self.step([1], with_scores=True),
            self._score_prompt,
        ]

    def _with_history(self, arguments: SampleArguments) -> SampleArguments:
        """With penalties over a token each."""
        rows = torch.arange(arguments.num_rows)
        writes = {"known_places": rows, "known_tokens": rows.int(), "unknown_places": rows, "unknown_rows": rows * 0}
        history = History(history_memory(self.device, arguments.num_rows), writes)
        inputs = {"history_start": torch.stack((rows, rows + 1)), "repetition": arguments.inputs["repetition"] + 1}
        return replace(arguments, inputs=arguments.inputs | inputs, history=history)

    def _score_prompt(self) -> None:
        """A prompt's part without its end. Its logits lie where no sampled row's come first, which kernels may see."""
        logits = self.model.run(self._inputs([1])).logits
        launch_sampling(self.device, logits, replace(trial_arguments(0, self._mode), targets=torch.tensor([0])), None)

    def _inputs(self, counts: list[int]) -> StepInputs:
        """Whole sequences whose keys are written nowhere."""
        width = -(-self.max_model_len // self.config.cache.block_size)
        tables = torch.zeros((len(self.model.info.cache_groups), len(counts), width), dtype=torch.int32)
        inputs = make_step(counts, counts, tables, self.config.cache.block_size)
        inputs.slot_mapping.fill_(-1)
        if self.model.info.embed_dim:
            inputs.embed_rows = torch.arange(sum(counts))
            inputs.embeds = torch.zeros(sum(counts), self.model.info.embed_dim)
        inputs.state_slots = torch.arange(len(counts)) if self.model.info.state_specs else None
        return inputs


def trial_arguments(
    num_rows: int, mode: int = 0, with_lists: bool = False, with_scores: bool = False, mask_words: int = 0,
    with_edits: bool = False,
) -> SampleArguments:  # fmt: skip
    """Arguments for rows that draw; with a bias, with log-probabilities, with masks of `mask_words` words, with a row
    that is changed beforehand, for which all are widened."""

    def full(value: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full((num_rows,), value, dtype=dtype)

    f32 = torch.float32
    inputs = {
        "temperature": full(1, f32), "top_k": full(2), "top_p": full(0.5, f32), "min_p": full(0.1, f32),
        "repetition": full(1, f32), "frequency": full(0, f32), "presence": full(0, f32), "seed": full(1),
        "counter": full(0), "num_logprobs": full(0 if with_scores else -1), "prompt_len": full(1),
        "bias_values": torch.ones(num_rows * with_lists),
    }  # fmt: skip
    starts = torch.arange(num_rows + 1)
    for start, items, is_there in (
        ("history_start", "history", False), ("bias_start", "bias_ids", with_lists),
        ("banned_start", "banned_ids", False), ("allowed_start", "allowed_ids", False),
    ):  # fmt: skip
        inputs[start], inputs[items] = starts * is_there, full(0)[: num_rows * is_there]
    if mask_words:
        inputs["bitmask"] = torch.full((num_rows, mask_words), -1, dtype=torch.int32)
    targets = full(0) if with_scores else full(0)[:0]
    edits = (RowEdit(0, temperature=2.0),) if with_edits else ()
    return SampleArguments(num_rows, 0, mode, inputs, edits=edits, targets=targets)
