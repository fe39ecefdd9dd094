"""Storage formats: an int8 format is a file of its own and an op, and a model streams its weights through it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import zoo
from paged_driver import greedy
from safetensors.torch import load_file, save_file

from fuseline.compile import formats, ops
from fuseline.compile.capture import lazy_tensor, reader
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.capture.export import capture_model
from fuseline.compile.capture.sinks import DeviceSink, HostSink
from fuseline.compile.capture.weights import load_weights
from fuseline.compile.compiler import compile_model, optimize
from fuseline.compile.config import CompileConfig
from fuseline.compile.formats.format import part_range, rank_range
from fuseline.compile.formats.registry import formats_for
from fuseline.compile.formats.registry import registry as format_registry
from fuseline.compile.ops.linear import pack
from fuseline.compile.ops.registry import registry as op_registry
from fuseline.compile.specs import WeightSource
from fuseline.compile.target import CPU, Target, detect_target

OP = '''
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.ops.library import op


@op(
    fake=lambda x, values, scales, bias: x.new_empty(*x.shape[:-1], values.shape[0]),
    weights=("values", "scales", "bias"), is_product=True, by_reference=True,
)
def linear_int8_rows(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, values.to(x.dtype) * scales, bias)


@op(
    fake=lambda ids, values, scales: scales.new_empty(*ids.shape, values.shape[1]),
    weights=("values", "scales"), sums=False, by_reference=True,
)
def embedding_int8_rows(ids: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    return values[ids].to(scales.dtype) * scales[ids]
'''
FORMAT = '''
"""values [N, K] int8 times scales [N, 1]: symmetric, a scale an output."""
import torch

from fuseline.compile.formats.format import Format

OPS = torch.ops.fuseline


def shapes(shape, dtype):
    return {"values": (shape, torch.int8), "scales": ((*shape[:-1], 1), dtype)}


def rows(stored, block, start):
    return stored["scales"][start[0] : start[0] + block.shape[0]]


def scan(stored, block, start, put):
    found = rows(stored, block, start)
    largest = block.abs().amax(-1, keepdim=True) / 127
    put(stored["scales"], torch.maximum(found, largest.to(found.dtype)), (start[0], 0))


def write(stored, block, start, put):
    scales = rows(stored, block, start)
    values = torch.where(scales > 0, block / scales, 0).round().clamp(-127, 127)
    put(stored["values"], values.to(torch.int8), start)


def linear(args, pack):
    x, weight, bias = args
    return OPS.linear_int8_rows.default, (x, *pack(weight), bias)


def embedding(args, pack):
    weight, ids = args[:2]
    return OPS.embedding_int8_rows.default, (ids, *pack(weight))


FORMAT = Format(
    "int8_rows", shapes, write, scan,
    {OPS.linear.default: linear, torch.ops.aten.embedding.default: embedding},
    stored_as={"values": "weight", "scales": "weight_scale"},
)
'''
Q, K = (f"model.layers.0.self_attn.{p}_proj.weight" for p in "qk")


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The op and the format, as files of their folders."""
    folder = tmp_path_factory.mktemp("int8")
    for package, text in ((ops, OP), (formats, FORMAT)):
        path = folder / package.__name__.rpartition(".")[2] / "int8_rows.py"
        path.parent.mkdir()
        path.write_text(text)
        package.__path__.append(str(path.parent))
    forget()
    import_module("fuseline.compile.ops.int8_rows")
    yield
    for package in (ops, formats):
        package.__path__.pop()
    forget()


def forget() -> None:
    op_registry.cache_clear()
    format_registry.cache_clear()


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] as the int8 format keeps it."""
    scales = weight.abs().amax(-1, keepdim=True) / 127
    return torch.where(scales > 0, weight / scales, 0).round().clamp(-127, 127) * scales


def load(family: str, requests: dict[str, WeightSource]) -> dict[str, torch.Tensor]:
    config = CompileConfig(model=str(zoo.checkpoint(family)))
    return load_weights(requests, capture_model(config), config)


# The proof: tokens.


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2"))
def test_a_model_computes_with_the_weights_of_its_format(int8, tmp_path, family: str) -> None:
    """gemma2 and gpt2 tie their embedding with the head, gpt2 keeps its weights as [in, out]."""
    config = CompileConfig(str(zoo.checkpoint(family)), weight_format="int8_rows", cache_dir=str(tmp_path))
    model = compile_model(config, detect_target())
    reference = zoo.load(zoo.checkpoint(family))
    with torch.no_grad():
        for module in reference.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(dequantized(module.weight))
            elif type(module).__name__ == "Conv1D":
                module.weight.copy_(dequantized(module.weight.T).T)
    prompts = zoo.make_prompts([3, 11])
    want = [zoo.continue_greedily(reference, prompt, 12)[0] for prompt in prompts]
    assert greedy(model, prompts, 12) == want


def test_every_linear_reads_the_format_and_a_tied_weight_is_stored_once(int8) -> None:
    captured, _ = optimize(CompileConfig(str(zoo.checkpoint("gemma2")), weight_format="int8_rows"))
    targets = [str(node.target) for node in captured.graph.graph.nodes]
    assert not any("panels" in target or target == "fuseline.linear.default" for target in targets)
    assert targets.count("fuseline.embedding_int8_rows.default") == 1 and "aten.embedding.default" not in targets
    embedding = next(node for node in captured.graph.graph.nodes if "embedding_int8" in str(node.target))
    head = [node for node in captured.graph.graph.nodes if "linear_int8" in str(node.target)][-1]
    assert embedding.args[1:] == head.args[1:3]


# Loading.


@pytest.mark.parametrize("block_bytes", (200, 4 << 20))
@pytest.mark.parametrize("transpose", (False, True))
def test_a_weight_streams_into_its_stored_tensors(int8, monkeypatch, block_bytes: int, transpose: bool) -> None:
    """Joined, with absent rows, turned, in blocks that hold some of a row's columns."""
    monkeypatch.setattr(reader, "BLOCK_BYTES", block_bytes)
    names, pads = ((Q,), ()) if transpose else ((Q, "absent", K), (0, 5, 0))
    source = WeightSource(names, transpose, "int8_rows", pads=pads)
    found = load("llama", {part: replace(source, part=part) for part in ("values", "scales")})
    state = zoo.load(zoo.checkpoint("llama")).state_dict()
    want = state[Q].T if transpose else torch.cat([state[Q], torch.zeros(5, state[Q].shape[1]), state[K]])
    assert found["values"].dtype == torch.int8
    assert torch.equal(found["values"] * found["scales"], dequantized(want))


def test_a_weight_of_a_gpu_is_made_on_the_host_and_sent_part_by_part(int8) -> None:
    """The stored tensors lie where the host computes nothing."""
    sent: dict[torch.dtype, torch.Tensor] = {}

    class Copies:
        def buffer(self, num_bytes: int) -> torch.Tensor:
            return torch.empty(num_bytes, dtype=torch.uint8)

        def copy(self, target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
            sent[source.dtype] = source.clone()
            return lambda: None

    config = CompileConfig(model=str(zoo.checkpoint("llama")))
    source = WeightSource((Q,), format="int8_rows")
    sink = DeviceSink(torch.device("meta"), copies=Copies())
    requests = {part: replace(source, part=part) for part in ("values", "scales")}
    load_weights(requests, capture_model(config), config, sink=sink)
    weight = zoo.load(zoo.checkpoint("llama")).state_dict()[Q]
    assert torch.equal(sent[torch.int8] * sent[torch.float32], dequantized(weight))


# Checkpoints that hold the format already.

LEVELS = 100
"""Of the stored values: quantizing anew would give 127."""


def stored_int8(folder: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda state: None) -> Path:
    """The llama of the zoo with its projections as int8 rows and scales, under the names of compressed-tensors."""
    shutil.copytree(zoo.checkpoint("llama"), folder / "model")
    path = folder / "model" / "model.safetensors"
    state = load_file(path)
    for name in [name for name in state if name.endswith("_proj.weight")]:
        scales = state[name].abs().amax(-1, keepdim=True) / LEVELS
        state |= {name: (state[name] / scales).round().to(torch.int8), f"{name}_scale": scales}
    change(state)
    save_file(state, path, {"format": "pt"})
    return folder / "model"


def test_stored_rows_and_scales_are_read_as_they_are(int8, tmp_path, monkeypatch) -> None:
    """Joined projections too, in blocks; embedding and head are stored plainly."""
    path = stored_int8(tmp_path)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 1000)
    blocks, write = [], HostSink.write
    monkeypatch.setattr(HostSink, "write", lambda *args: (blocks.append(args[2]), write(*args)))
    config = CompileConfig(str(path), weight_format="int8_rows", cache_dir=str(tmp_path), skip_model_check=True)
    model = compile_model(config, detect_target())
    assert max(block.nbytes for block in blocks if block.dtype == torch.int8) <= 1000
    reference, state = zoo.load(zoo.checkpoint("llama")), load_file(path / "model.safetensors")
    with torch.no_grad():
        reference.lm_head.weight.copy_(dequantized(reference.lm_head.weight))
        for name in [name for name in state if name.endswith("_scale")]:
            weight = reference.get_parameter(name.removesuffix("_scale"))
            weight.copy_(state[name.removesuffix("_scale")] * state[name])
    prompts = zoo.make_prompts([3, 11])
    want = [zoo.continue_greedily(reference, prompt, 12)[0] for prompt in prompts]
    assert greedy(model, prompts, 12) == want
    assert greedy(compile_model(config, detect_target()), prompts, 12) == want, "from the remembered map"


@pytest.mark.parametrize(("change", "form", "message"), [
    (lambda s: s.pop(f"{K}_scale"), "int8_rows", f"{K}_scale is not in the checkpoint"),
    (lambda s: s.update({f"{K}_scale": s[f"{K}_scale"][:-1]}), "int8_rows", r"scales are torch.float32 \[95, 1\] in"),
    (lambda s: s.update({K: s[K].float()}), "int8_rows", r"values are torch.float32 \[96, 64\] in the check"),
    (lambda s: None, "rows", f"{Q} in .*safetensors is stored as integers, which format rows does not read"),
], ids=["missing", "shape", "floats", "format"])  # fmt: skip
def test_parts_that_do_not_fit_are_refused(int8, tmp_path, change: Callable, form: str, message: str) -> None:
    config = CompileConfig(str(stored_int8(tmp_path, change)))
    source = WeightSource((Q, K), format=form)
    parts = ("values", "scales") if form == "int8_rows" else ("",)
    with pytest.raises(LoadError, match=message):
        load_weights({part: replace(source, part=part) for part in parts}, capture_model(config), config)


@pytest.mark.parametrize("dim", (0, 1))
def test_the_stored_parts_of_ranks_are_parts_of_the_whole(int8, dim: int) -> None:
    """Ranks that share an output share its scale."""
    form, values, scales = format_registry()["int8_rows"], torch.randn(96, 40), torch.randn(96, 1)
    found = []
    for rank in range(2):
        whole = rank_range(form, values.shape[dim], dim, rank, 2)
        cut = (part.narrow(dim, (at := part_range(whole, values.shape[dim], part.shape[dim]))[0], at[1] - at[0])
               for part in (values, scales))  # fmt: skip
        found.append(torch.mul(*cut))
    assert torch.equal(torch.cat(found, dim), values * scales)


# Formats.


def test_a_target_reads_its_format() -> None:
    assert [form.name for form in formats_for(CompileConfig(""), CPU)] == ["panels"]
    assert [form.name for form in formats_for(CompileConfig(""), Target("cuda", "sm_90", 1))] == ["rows"]


@pytest.mark.parametrize(("name", "target"), [("int3", CPU), ("rows", CPU), ("panels", Target("cuda", "sm_90", 1))])
def test_a_format_that_the_target_has_not_is_refused(name: str, target: Target) -> None:
    with pytest.raises(ValueError, match=f"weight_format {name} is none of {target.kind}: take one of "):
        formats_for(CompileConfig("", weight_format=name), target)


@pytest.mark.parametrize("settings", ({"level": 0}, {"disabled_passes": ("pack_weights",)}))
def test_a_format_that_would_have_no_effect_is_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="weight_format panels has no effect without the pass pack_weights"):
        optimize(CompileConfig(str(zoo.checkpoint("llama")), weight_format="panels", **settings))


@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("name", ("rows", "panels"))
def test_the_parts_of_ranks_are_parts_of_the_whole(name: str, dim: int) -> None:
    weight, form = torch.randn(96, 40), format_registry()[name]
    parts = []
    for rank in range(2):
        begin, end = rank_range(form, weight.shape[dim], dim, rank, 2)
        part = lazy_tensor.narrow(lazy_tensor.computed(weight), dim, begin, end)
        (shape, dtype), = form.shapes(part.shape, weight.dtype).values()
        stored = {"": torch.zeros(shape, dtype=dtype)}
        for one in part.slices:
            form.write(stored, one.view, one.start, lambda target, block, start: target.copy_(block))
        parts.append(stored[""])
    # Panels are [N / 16, K, 16]: outputs and inputs are its first two dims too.
    assert torch.equal(torch.cat(parts, dim), weight if name == "rows" else pack(weight))


def test_ranks_do_not_share_a_panel() -> None:
    with pytest.raises(ValueError, match="80 outputs in format panels cannot be cut for 2 ranks: .* multiple of 32"):
        rank_range(format_registry()["panels"], 80, 0, 0, 2)
