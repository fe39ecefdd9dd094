"""Level 3 on a GPU measures its kernels once, by a clock that tests set, keeps what is fastest, and uses it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import fake_libraries as fakes
import pytest
import torch
import zoo
from cuda_target_cases import count_kernels
from fake_gpu import GPU
from paged_driver import greedy
from tune_gpu_cases import OURS, Clock, candidate, choices, config

from fuseline.compile.compiler import compile_model, optimize
from fuseline.compile.config import CompileConfig
from fuseline.compile.kernels.choice import dispatcher
from fuseline.compile.kernels.registry import ANY, Implementation
from fuseline.compile.kernels.select import Kernels
from fuseline.compile.ops.library import DECODE, PREFILL
from fuseline.compile.ops.registry import op_of
from fuseline.compile.tuning import clock as clocks
from fuseline.compile.tuning import kernels as tune_gpu
from fuseline.compile.tuning.calls import CallMaker, has_constants
from fuseline.compile.tuning.kernels import Problem, is_choice
from fuseline.compile.tuning.timer import Arguments, DeviceTimer

__all__ = ["config"]

FLASH_3 = {"flash_attn_3": fakes.flash_attn_with_kvcache}
LAYERS = 3


def stored(config: CompileConfig) -> list[Path]:
    return list(Path(config.cache_dir, "tuned").glob("*"))


def test_the_fastest_is_chosen_for_each_range_of_rows(config):
    """Ranges of one winner are one; rows beyond a step are not measured."""
    clock = Clock(lambda label, rows: 0.5 if label == "triton.linear" and 8 <= rows else None)
    found = choices(config, clock)
    want = [[1, "torch.linear"], [16, "triton.linear"], [ANY, "torch.linear"]]
    assert found["linear"] == [{"rows": want}] * 10
    assert (
        found["linear_act_mul"]
        == [{"rows": [[16, "triton.linear_act_mul"], [ANY, "torch.linear, triton.act_mul"]]}] * 3
    )
    assert found["paged_attention"] == [{DECODE: [[ANY, OURS]], PREFILL: [[ANY, OURS]]}] * 3
    assert {rows for label, rows in clock.seen if label == "torch.linear"} == {1, 8, 16, 32, 64, 128, 256, 300}
    assert {rows for label, rows in clock.seen if label == OURS} == {1, 8, 16, 20, 300}
    assert max(rows for label, rows in clock.seen if label.startswith("triton.linear")) == 16


def test_steps_and_prompts_of_attention_are_chosen_apart(config):
    clock = Clock(lambda label, rows: {"flash_attn_3": 0.5 if rows < 10 else 2.0, f"{OURS} 64r": 0.8}.get(label))
    found = choices(config, clock, FLASH_3)["paged_attention"]
    want = {DECODE: [[8, "flash_attn_3"], [ANY, OURS]], PREFILL: [[ANY, f"{OURS} 64r"]]}
    assert found == [want] * 3


def test_what_is_hardly_faster_is_not_chosen(config):
    found = choices(config, Clock(lambda label, rows: 0.98 if label.startswith("triton.linear ") else None))
    assert found["linear"] == [{"rows": [[ANY, "torch.linear"]]}] * 10


def test_measured_once(config):
    first = choices(config, Clock(lambda label, rows: 0.5 if label == "triton.linear" else None))
    again = Clock()
    assert choices(config, again) == first and again.seen == []
    assert len(stored(config)) == 1


def test_other_libraries_are_measured_anew(config):
    choices(config, Clock())
    again = Clock()
    choices(config, again, FLASH_3)
    assert ("flash_attn_3", 300) in again.seen and len(stored(config)) == 2


@pytest.mark.parametrize("damage", [b"nonsense", b""])
def test_a_damaged_file_is_reported_and_measured_again(config, damage, caplog):
    choices(config, Clock())
    stored(config)[0].write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        found = choices(config, Clock(lambda label, rows: 0.5 if label == "triton.linear" else None))
    assert "it is measured again" in caplog.text
    assert found["linear"][0] == {"rows": [[16, "triton.linear"], [ANY, "torch.linear"]]}


def test_a_candidate_that_raises_is_dropped_with_one_line(config, caplog):
    def broken(label: str, rows: int) -> float | None:
        if label == "triton.linear" and rows > 1:
            raise RuntimeError("out of resource: shared memory\nand a trace")
        return 0.5 if label.startswith("triton.linear") else None

    with caplog.at_level(logging.WARNING):
        found = choices(replace(config, hf_overrides=(("num_hidden_layers", 1),)), Clock(broken))
    lines = [record.getMessage() for record in caplog.records]
    shapes = {line.partition(": ")[0] for line in lines}
    assert lines and len(lines) == len(shapes), "one for each problem"
    assert all(line.startswith("triton.linear is not used for fuseline::linear") for line in lines)
    assert all(line.endswith("RuntimeError: out of resource: shared memory") for line in lines)
    ranges = found["linear"][0]["rows"]
    assert ranges[0] == [1, "triton.linear"] and ranges[1][0] == 16 and ranges[1][1].startswith("triton.linear ")


def test_when_all_fail_the_default_stays(config, caplog):
    def broken(label: str, rows: int) -> None:
        raise RuntimeError("no")

    with caplog.at_level(logging.CRITICAL):
        assert choices(config, Clock(broken))["linear"] == [{"rows": [[ANY, "torch.linear"]]}] * 10


def test_only_choices_of_this_problem_are_read():
    of = [candidate("a", print, max_rows=16), candidate("b", print)]
    assert is_choice(of, {"rows": [[16, "a"], [ANY, "b"]]}) and is_choice(of, {"rows": [[ANY, "b"]]})
    for wrong in (
        [], {}, {"rows": []}, {"rows": [[ANY, "a"]]}, {"rows": [[16, "b"]]}, {"rows": [[ANY, "c"]]},
        {"rows": [["b", ANY]]}, {"rows": [[ANY, "b"], [16, "a"]]}, {"prefill": [[ANY, "b"]]},
        {"rows": [[8, "b"], [8, "a"], [ANY, "b"]]},
    ):  # fmt: skip
        assert not is_choice(of, wrong), wrong


def test_norms_and_the_caches_write_are_measured(config):
    """Norms by lines, what works on heads by tokens; a choice for each shape."""
    faster = {"triton.add_rms_norm 8w": 32, "triton.rope_cache 2h": 1}
    clock = Clock(lambda label, rows: 0.5 if rows >= faster.get(label, ANY) else None)
    found = choices(config, clock)
    assert found["add_rms_norm"] == [{"rows": [[16, "triton.add_rms_norm"], [ANY, "triton.add_rms_norm 8w"]]}] * 6
    assert found["rms_norm"] == [{"rows": [[ANY, "triton.rms_norm"]]}]
    assert found["rope_cache"] == [{"rows": [[ANY, "triton.rope_cache 2h"]]}] * 3
    for label in faster:
        assert {rows for seen, rows in clock.seen if seen == label} == {1, 8, 16, 32, 64, 128, 256, 300}


def test_norms_that_must_not_depend_on_the_batch_have_no_choice(config):
    found = choices(replace(config, batch_invariant=True), Clock())
    assert "rope_cache" in found and not {"rms_norm", "add_rms_norm", "linear"} & set(found)


def test_a_norm_whose_weight_is_computed_is_left_alone(config):
    captured, _ = optimize(config, GPU)
    nodes = [node for node in captured.graph.graph.nodes if (op := op_of(node.target)) and op.name.endswith("_norm")]
    assert all(map(has_constants, nodes))
    nodes[1].args = (*nodes[1].args[:2], nodes[0], *nodes[1].args[3:])
    assert not has_constants(nodes[1])


@pytest.mark.parametrize("family", ("gpt_oss", "gemma3", "gpt2"))
def test_what_is_measured_are_calls_of_the_op(family, config, caplog):
    """Experts with biases, sinks, windows, norms between: each candidate but other tiles computes what it is given."""
    ran = set()

    class Running(Clock):
        def __call__(self, candidate: Implementation, arguments: Arguments) -> float:
            is_tried = "linear" not in candidate.label and "triton.matmul" not in candidate.label
            is_tried = is_tried or " " not in candidate.label
            if is_tried and (candidate.label, len(arguments.calls)) not in ran:
                assert len({tuple(map(id, args)) for args in arguments.calls}) == len(arguments.calls)
                for args in arguments.calls[:1]:
                    found = candidate.run(*args)
                    assert found is None or all(
                        x.shape[-1] > 0 for x in (found if isinstance(found, tuple) else [found])
                    )
                ran.add((candidate.label, len(arguments.calls)))
            return 1.0

    choices(replace(config, model=str(zoo.checkpoint(family, "bfloat16")), max_num_batched_tokens=20), Running())
    labels = {label for label, _ in ran}
    own = {
        "gpt_oss": {"triton.experts", "triton.rope_cache", "triton.rope_cache 2h", "triton.add_rms_norm 4w"},
        "gemma3": {"triton.linear_act_mul", "triton.rms_norm 8w", "triton.rope_cache 32h"},
        "gpt2": {"triton.add_layer_norm", "triton.add_layer_norm 16w"},
    }
    assert {"torch.linear", "triton.linear", OURS, *own[family]} <= labels
    assert "is not used" not in caplog.text


def test_a_result_is_written_where_it_is_wanted():
    """By the kernel of the call's rows, which may have to copy it there."""
    twice = candidate("twice", lambda x: 2 * x, max_rows=16, into=lambda out, x: out.copy_(2 * x))
    plain = candidate("plain", lambda x: x)
    found = dispatcher([twice, plain], {"rows": [[2, "twice"], [ANY, "plain"]]}, lambda x: ("rows", len(x)))
    assert found.label == "twice | plain"
    for x, want in ((torch.ones(2), 2.0), (torch.ones(3), 1.0)):
        out = torch.zeros(len(x))
        found.into(out, x)
        assert out.tolist() == found.run(x).tolist() == [want] * len(x)
    assert dispatcher([plain, candidate("b", print)], {"rows": [[ANY, "plain"]]}, len).into is None


def test_problems_tell_shapes_apart(config):
    captured, _ = optimize(config, GPU)
    problems = tune_gpu._problems(captured.graph, Kernels(GPU, {}), False)
    assert all(isinstance(problem, Problem) for problem in problems)
    linears = {problem.shapes for problem in problems if problem.op == "fuseline::linear"}
    assert len(linears) == 3, "the vocabulary is as wide as q, k and v"
    assert sum(len(calls.nodes) for calls in problems.values()) == 10 + 3 + 3 + 7 + 3


def test_a_model_runs_what_was_chosen(config, monkeypatch):
    """The same tokens, by kernels that are not the default; progress is told."""
    tuning = "triton.linear 32x512 4w 5s"
    others = {f"{OURS} 7s", "triton.rope_cache 4h", "triton.add_rms_norm 8w"}
    clock = Clock(lambda label, rows: 0.5 if label in {tuning, *others} else None)
    monkeypatch.setattr(tune_gpu, "DeviceTimer", lambda: clock)
    told = []
    model = compile_model(config, GPU, lambda *progress: told.append(progress))
    labels = {kernel.label for kernel in model._executable.kernels.values()}
    assert {f"{tuning} | torch.linear", *others} <= labels
    assert [phase for phase, *_ in told].count("tuning") > 1
    prompts = zoo.make_prompts((3, 9))
    assert greedy(model, prompts, 3) == zoo.truth(Path(config.model), prompts, 3)


def test_a_model_with_offloaded_weights_runs_what_was_chosen(config, monkeypatch):
    """Also for products whose weights are copied in every step."""
    tuning = "triton.linear 32x512 4w 5s"
    monkeypatch.setattr(tune_gpu, "DeviceTimer", lambda: Clock(lambda label, rows: 0.5 if label == tuning else None))
    model = compile_model(replace(config, cpu_offload_gb=1.0), GPU)
    assert len(model._executable.offload.layers) == LAYERS
    kernels = model._executable.kernels
    linears = [kernel.label for node, kernel in kernels.items() if "linear.default" in str(node.target)]
    assert linears and set(linears) == {f"{tuning} | torch.linear"}
    prompts = zoo.make_prompts((3, 9))
    assert greedy(model, prompts, 3) == zoo.truth(Path(config.model), prompts, 3)


def test_weights_that_are_away_are_measured_only_where_no_other_is_there(config, monkeypatch):
    """And then one: the GPU may have no room for more."""
    captured, _ = optimize(config, GPU)
    nodes = [node for node in captured.graph.graph.nodes if node.target is torch.ops.fuseline.linear_act_mul.default]
    names = [str(node.args[1].target) for node in nodes]
    monkeypatch.setattr(CallMaker, "_value", lambda self, arg: str(arg))
    for num_away in range(LAYERS + 1):
        held = {name: torch.empty(1, device="meta" if k < num_away else "cpu") for k, name in enumerate(names)}
        calls = CallMaker(held, "cpu").arguments(nodes, "rows", 2).calls
        here = [str(node.args[1]) for node in nodes[num_away:]]
        assert [call[1] for call in calls] == (here or [str(nodes[0].args[1])])


def test_the_default_needs_no_measurement(config):
    captured, _ = optimize(config, GPU)
    assert count_kernels(captured.graph)["torch.linear"] > 0 and not stored(config)


class FakeCuda:
    """The part of torch.cuda that a timer needs. `done` lists the calls in order; a replay takes `seconds` in turn."""

    def __init__(self, seconds: list[float]) -> None:
        self.done: list[str] = []
        self.seconds, self.now = iter(seconds), 0.0

    def graph(self) -> FakeCuda:
        return self

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        self.done.append(f"begin {capture_error_mode}")

    def capture_end(self) -> None:
        self.done.append("end")

    def replay(self) -> None:
        self.now += next(self.seconds)

    def wait_stream(self, stream: object) -> None:
        self.done.append("wait")

    def synchronize(self) -> None:
        self.done.append("synchronize")


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def record(self) -> None:
        self.at = self._cuda.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.at - self.at) * 1e3


def timer_on(cuda: FakeCuda, monkeypatch) -> DeviceTimer:
    monkeypatch.setattr(clocks, "FLUSHED_BYTES", 16)
    for name, value in {
        "Stream": lambda: cuda, "stream": lambda stream: nullcontext(), "current_stream": lambda: cuda,
        "CUDAGraph": cuda.graph, "graph_pool_handle": lambda: (0, 1), "Event": lambda enable_timing: FakeEvent(cuda),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return DeviceTimer("cpu")


def test_the_timer_captures_after_a_first_run_and_takes_the_median(monkeypatch):
    cuda = FakeCuda([9.0, 3.0, 8.0, 1.0, 4.0, 50.0, 2.0, 6.0])  # the first replay is not measured
    timer = timer_on(cuda, monkeypatch)
    tried = candidate("x", lambda *args: cuda.done.append(f"run {args}"), prepare=lambda host: cuda.done.append(host))
    assert timer(tried, Arguments([(1,), (2,)], "planned")) == 4.0 / 2
    assert cuda.done == [
        "wait", "planned", "run (1,)", "synchronize", "begin thread_local", "run (1,)", "run (2,)", "end",
        "synchronize",
    ]  # fmt: skip


def test_a_candidate_with_other_results_than_the_default_is_refused(monkeypatch):
    """Roundings aside; a number that is missing or not finite is another result."""
    cuda = FakeCuda([1.0] * 100)
    timer, x = timer_on(cuda, monkeypatch), torch.randn(4, 8)
    scale = x.abs().max()

    def tried(results: object, change: Callable[[torch.Tensor], torch.Tensor]) -> Implementation:
        return candidate("tried", lambda x: torch.utils._pytree.tree_map_only(torch.Tensor, change, results))

    for results in (x, (x, None, x * 2)):
        arguments = Arguments([(x,)])
        timer(candidate("default", lambda x, results=results: results), arguments)
        timer(tried(results, lambda y: y * (1 + 2**-9)), arguments)
        for change in (lambda y: y + scale / 50, lambda y: y.masked_fill(y == y.max(), float("nan"))):
            with pytest.raises(ValueError, match="differ from those of default"):
                timer(tried(results, change), arguments)
    timer(candidate("default of another problem", lambda x: x + scale), Arguments([(x,)]))


def test_a_capture_that_fails_is_ended(monkeypatch):
    cuda = FakeCuda([])
    timer = timer_on(cuda, monkeypatch)

    def run(*_: object) -> None:
        if "synchronize" in cuda.done:
            raise RuntimeError("not under capture")

    with pytest.raises(RuntimeError, match="not under capture"):
        timer(candidate("x", run), Arguments([(1,)]))
    assert cuda.done[-1] == "end"
