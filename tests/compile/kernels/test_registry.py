"""The registry of kernels: every declaration is whole, and what is found follows from declarations alone."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from fake_gpu import GPU

from fuseline.compile.kernels.choice import default_choices
from fuseline.compile.kernels.plan_call import native, plan_call
from fuseline.compile.kernels.registry import ANY, FOLDERS, LAST, Implementation, OpCall, Tuning, implementations
from fuseline.compile.kernels.select import Kernels
from fuseline.compile.ops.library import DECODE, PREFILL
from fuseline.compile.ops.registry import op_of, registry

ALL = [(device, one) for device in FOLDERS for each in implementations(device).values() for one in each]
RMS_NORM = registry()["rms_norm"]
X = torch.empty(3, 64, device="meta")


@pytest.mark.parametrize(("device", "one"), ALL, ids=[f"{one.op} {one.label} {one.phases}" for _, one in ALL])
def test_declarations_are_whole(device: str, one: Implementation) -> None:
    assert one.device == device and one.phases and one.max_rows > 0
    assert (one.call if device == "cpu" else one.run or one.bind) is not None
    space = one.op.partition(".")[0]
    assert one.op in registry() or space in ("aten", "prims")
    if device == "cuda" and one.op in registry():
        declared = registry()[one.op]
        assert declared.calls.size and set(declared.weights) <= set(declared.arguments)
    assert not one.trial or one.library


def test_facts_of_ops_name_what_is_there() -> None:
    for op in registry().values():
        assert set(op.weights) <= set(op.arguments)
        assert not op.invariant or registry()[op.invariant].is_product == op.is_product
        assert op_of(op.target) is op
        assert len(op.arguments) == len(inspect.signature(op.reference).parameters) or op.name.endswith("_invariant")
    assert {name for name, op in registry().items() if op.written} == {
        "write_cache", "rope_cache", "write_latent", "rope_latent",
    }  # fmt: skip
    assert {name for name, op in registry().items() if op.reads_cache} == {
        "paged_attention", "paged_attention_invariant", "paged_latent_attention", "paged_latent_attention_invariant",
        "paged_relative_attention",
    }  # fmt: skip


def candidate(label: str, **fields: object) -> Implementation:
    return Implementation("rms_norm", label, "cuda", lambda *args: label, **fields)


def found(monkeypatch, *declared: Implementation, libraries: dict | None = None, args: tuple = (X, None, 1e-5, 0)):
    """Labels with phases of what can compute a norm when just these are declared."""
    ordered = tuple(sorted(declared, key=lambda one: one.order))
    monkeypatch.setitem(implementations("cuda"), "rms_norm", ordered)
    return Kernels(GPU, libraries or {}).candidates(OpCall(RMS_NORM.target, args, GPU))


def test_order_rows_and_arguments_decide(monkeypatch) -> None:
    few = candidate("few", max_rows=4, order=1)
    many, wide = candidate("many", order=2), candidate("wide", order=0, supports=lambda x, *_: x.shape[-1] > 64)
    other = candidate("other", order=0, isas=("sm_80",))
    labels = found(monkeypatch, many, few, wide, other)
    assert [one.label for one in labels] == ["few", "many"]
    assert default_choices(labels) == {"rows": [(4, "few"), (ANY, "many")]}


def test_tunings_come_last_and_only_for_phases_that_are_there(monkeypatch) -> None:
    tuned = candidate(
        "a", phases=(DECODE,), tunings=(Tuning("1", {}), Tuning("2", {}, (PREFILL,)), Tuning("3", {}, (DECODE,)))
    )  # fmt: skip
    labels = [one.label for one in found(monkeypatch, tuned, candidate("b", order=LAST))]
    assert labels == ["a", "b", "a 1", "a 3"]


def test_what_gives_other_bits_is_hidden_where_it_would_be_mixed(monkeypatch) -> None:
    both = candidate("both", phases=(DECODE, PREFILL))
    mixed = candidate("mixed", phases=(PREFILL,), hides=("both",), order=1)
    assert [(one.label, one.phases) for one in found(monkeypatch, both, mixed)] == [
        ("mixed", (PREFILL,)), ("both", (DECODE,)),
    ]  # fmt: skip
    gone = replace(mixed, library=lambda target: None)
    assert [(one.label, one.phases) for one in found(monkeypatch, both, gone)] == [("both", (DECODE, PREFILL))]


def test_a_library_is_tried_once_for_calls_that_are_alike(monkeypatch) -> None:
    tried = []

    def trial(call: OpCall, phases: tuple[str, ...]) -> tuple[tuple, dict]:
        tried.append(call.args[0].shape)
        return (torch.ones(2),), {}

    ours = Implementation("rms_norm", "ours", "cuda", lambda x: x)
    theirs = Implementation(
        "rms_norm", "theirs", "cuda", lambda factor, x: factor * x, order=0, library=lambda target: 1.0, trial=trial
    )  # fmt: skip
    monkeypatch.setitem(implementations("cuda"), "rms_norm", (theirs, ours))
    for factor, labels in ((1.0, ["theirs", "ours"]), (2.0, ["ours"])):
        kernels = Kernels(GPU, {"theirs": factor})
        for rows in (3, 7):
            call = OpCall(RMS_NORM.target, (torch.empty(rows, 64, device="meta"), None, 1e-5, 0), GPU)
            assert [one.label for one in kernels.candidates(call)] == labels
    assert len(tried) == 2, "once for each object: rows do not tell calls apart"


def test_a_native_call_names_its_arguments() -> None:
    """In any order of the op's schema; what the op has not is given by the declaration."""
    graph = torch.fx.Graph()
    x, panels = graph.placeholder("x"), graph.placeholder("panels")
    node = graph.call_function(registry()["linear_panels"].target, (x, panels, None, 33))
    found = plan_call(node, lambda arg: torch.empty(1, device="meta"))
    assert (found.kernel, found.inputs, found.ints) == ("linear", (x, panels, None), (33, 0))
    with pytest.raises(KeyError, match="choices"):
        native("linear_panels", "linear").call(node)
