"""Steps of a model in the shape of an 8B Llama with random weights: decode, prompts, host time, graphs."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fuseline.compile.backends.cuda.executable import CudaExecutable
from fuseline.compile.backends.cuda.graph_api import GraphApi
from fuseline.compile.backends.cuda.model import CudaModel
from fuseline.compile.compiler import optimize
from fuseline.compile.config import CompileConfig, GraphConfig
from fuseline.compile.graph_inputs import StepInputs, make_step
from fuseline.compile.kernels.triton.sampling import sample
from fuseline.compile.specs import WeightSource
from fuseline.compile.target import Target
from fuseline.compile.tuning.kernels import tune_kernels
from fuseline.compile.tuning.limits import Limits
from fuseline.compile.tuning.runs import tune_runs
from gpu_check.kernels import sampling_arguments
from gpu_check.table import Table, share_of

BLOCK = 16
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Load:
    """Sizes to measure; small() shrinks it for trials without a GPU."""

    batches: tuple[int, ...] = (1, 32, 128, 256)
    context: int = 512
    steps: int = 30
    prompts: tuple[int, ...] = (2048, 8192)
    max_seqs: int = 256
    graphs: GraphConfig = GraphConfig(is_mixed_whole=True)


class Runner:
    """A model and its caches; each sequence owns consecutive blocks."""

    def __init__(
        self, folder: Path, target: Target, load: Load, shape: dict = LLAMA_8B, is_tuned: bool = False,
        **settings: str,
    ) -> None:  # fmt: skip
        """`settings`: more fields of the CompileConfig."""
        (folder / "config.json").write_text(json.dumps(shape))
        config = CompileConfig(
            str(folder), max_num_batched_tokens=max(load.prompts), max_num_seqs=load.max_seqs, dtype="bfloat16",
            **settings,
        )  # fmt: skip
        captured, result = optimize(config, target)
        weights = random_weights(captured, result, target.device)
        if is_tuned:
            for tune in (tune_kernels, tune_runs):
                tune(captured.graph, weights, config, target, lambda *_: None)
        self._loaded = config, captured, result, weights
        self.model = self.make_model(target, load.graphs)
        self.width = -(-(load.context + load.steps) // BLOCK)
        self.num_blocks = max(load.max_seqs * self.width, -(-max(load.prompts) // BLOCK)) + 1
        self.model.allocate_caches([self.num_blocks])
        self.device = target.device
        self.weight_bytes = sum(t.nbytes for name, t in weights.items() if "embed" not in name)
        self.bytes_per_token = sum(spec.bytes_per_token() for spec in self.model.info.cache_specs)

    def make_model(self, target: Target, graphs: GraphConfig) -> CudaModel:
        """Builds a model with these weights, without caches."""
        config, captured, result, weights = self._loaded
        executable = CudaExecutable(captured.graph, weights, target)
        return CudaModel(config, captured, result, weights, executable, target.device, graphs)

    def parameters(self) -> dict[str, Tensor]:
        """The model's own parameters by name: views of the weights, some of which passes have joined."""
        _, captured, _, weights = self._loaded
        found: dict[str, Tensor] = {}
        for node in captured.graph.graph.nodes:
            if node.op != "get_attr" or ("weight" not in node.meta and "fqn" not in node.meta):
                continue
            source = node.meta.get("weight") or WeightSource((node.meta["fqn"],))
            names = [name for name in source.names if name in captured.parameters]
            if len(names) != len(source.names) or source.transpose or source.format != "rows":
                continue
            sizes = [captured.parameters[name][0][0] for name in names]
            found |= dict(zip(names, weights[str(node.target)].split(sizes), strict=True))
        return found

    @property
    def weights(self) -> dict[str, Tensor]:
        """By get_attr target."""
        return self._loaded[3]

    @property
    def kernels(self) -> Counter[str]:
        """Number of calls of each kernel, by label."""
        return Counter(kernel.label for kernel in self.model._executable.kernels.values())

    @property
    def rows_of_runs(self) -> int:
        """Rows up to which runs of ops are one launch; 0: none."""
        few = self.model._executable.few_rows
        return few.max_rows if few else 0

    def capture(self, api: GraphApi | None = None) -> float:
        """Seconds until all graphs are captured."""
        started = time.perf_counter()
        self.model.capture_graphs(api=api)
        if self.model.graphs is not None:
            self.model.graphs.wait()
        return time.perf_counter() - started

    def decode(self, num_seqs: int, context: int, steps: int) -> tuple[float, float]:
        """(seconds, host seconds) per step: of `steps` in a row whose tokens stay on the GPU, and of launches while the
        GPU has nothing to do."""
        sources = torch.arange(num_seqs, dtype=torch.int32)
        inputs = [self._step(num_seqs, context + k) for k in range(steps)]
        tokens = self._sampled(self.model.run(inputs[0]).logits)
        # As the steps that are timed: what feeds a step's tokens to the next one is compiled here.
        tokens = self._sampled(self.model.run(replace(inputs[1], sources=sources, sampled=tokens)).logits)
        self.wait()
        started = time.perf_counter()
        for step in inputs:
            tokens = self._sampled(self.model.run(replace(step, sources=sources, sampled=tokens)).logits)
        self.wait()
        seconds, launches = (time.perf_counter() - started) / steps, []
        for step in inputs[:10]:
            started = time.perf_counter()
            tokens = self._sampled(self.model.run(replace(step, sources=sources, sampled=tokens)).logits)
            launches.append(time.perf_counter() - started)
            self.wait()
        return seconds, statistics.median(launches)

    def first_token(self, length: int) -> float:
        """Seconds from the prompt to its first token on the host."""
        prompt, seconds = self.prompt(length), []
        for _ in range(3):
            self.wait()
            started = time.perf_counter()
            self._sampled(self.model.run(prompt).logits).tolist()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    def prompt(self, length: int) -> StepInputs:
        """A step of one sequence that starts at its first token."""
        blocks = torch.arange(1, 1 + -(-length // BLOCK), dtype=torch.int32)
        tokens = torch.arange(length) % self.model.info.vocab_size
        return make_step([length], [length], blocks[None, None], BLOCK, tokens)

    def _step(self, num_seqs: int, context: int) -> StepInputs:
        tables = torch.arange(1, 1 + num_seqs * self.width, dtype=torch.int32).reshape(1, num_seqs, self.width)
        tokens = torch.full((num_seqs,), context % 100)
        return make_step([1] * num_seqs, [context + 1] * num_seqs, tables, BLOCK, tokens)

    def _sampled(self, logits: Tensor) -> Tensor:
        arguments = sampling_arguments(logits, 0.0, 0, 1.0)
        sample(*arguments)
        return arguments[0]

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def random_weights(captured, result, device: str) -> dict[str, Tensor]:
    """Weights by get_attr target: the graph's values where it has them, else random ones made on the device: normal, or
    codes, none of which is a NaN, with scales that make them as large."""
    numbers = captured.constants | result.constants
    weights: dict[str, Tensor] = {}
    for node in captured.graph.graph.nodes:
        if node.op != "get_attr":
            continue
        like, value = node.meta["val"], numbers.get(node.meta.get("fqn"))
        made = torch.empty(tuple(like.shape), dtype=like.dtype, device=device)
        part = node.meta["weight"].part if "weight" in node.meta else ""
        if value is not None:
            made.copy_(value)
        elif part == "codes":
            made.random_().bitwise_and_(0x37373737)
        else:
            made.fill_(2.0**-10) if part == "scales" else made.normal_(std=0.02)
        weights[str(node.target)] = made
    return weights


def measure_model(runner: Runner, load: Load, limits: Limits, table: Table, api: GraphApi | None = None) -> None:
    seconds = runner.capture(api)
    steps = runner.model.graphs
    if steps is not None:
        done, wanted = (
            [len(getattr(part, of)) for part in (steps.decode, steps.whole_mixed, steps.mixed)]
            for of in ("captured", "sizes")
        )
        kinds = ("of decode steps", "of whole mixed steps", "piecewise")
        name = "graphs: " + ", ".join(f"{a} of {b} {kind}" for a, b, kind in zip(done, wanted, kinds, strict=True))
        table.add(name, f"{seconds:.1f} s", "", "15 s for 35")
    goals = {1: "85 %", 256: "75 %"}
    for num_seqs in load.batches:
        step, host = runner.decode(num_seqs, load.context, load.steps)
        moved = runner.weight_bytes + num_seqs * load.context * runner.bytes_per_token
        share = f"{share_of(limits.bandwidth, moved, step)} of bandwidth"
        name = f"decode {num_seqs} x {load.context}"
        table.add(name, f"{step * 1e3:.2f} ms a step, {num_seqs / step:.0f} token/s", share, goals.get(num_seqs, ""))
        table.add(f"{name}, host", f"{host * 1e6:.0f} us a step", f"{100 * host / step:.0f} % of the step")
    for length in load.prompts:
        step = runner.first_token(length)
        operations = runner.weight_bytes * length  # two bytes per weight, two operations
        table.add(f"first token of {length}", f"{step * 1e3:.0f} ms",
                  f"{share_of(limits.matrix_rate, operations, step)} of matrix rate")  # fmt: skip


def small(load: Load) -> Load:
    """Shrinks a load for trials without a GPU."""
    graphs = GraphConfig((2,), mixed_sizes=(4,), is_mixed_whole=True)
    return replace(load, batches=(1, 2), context=20, steps=2, prompts=(24,), max_seqs=2, graphs=graphs)
