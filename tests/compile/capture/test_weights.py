"""Weights loaded for the graph are what from_pretrained gives, in the asked layout, and no second copy is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo
from python_process import run_python
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers import core_model_loading as loading
from transformers.core_model_loading import WeightConverter
from weights_cases import assert_same, described, everything

from fuseline.compile.capture import conversions, lazy_tensor, reader
from fuseline.compile.capture.checkpoint import StoredTensor, open_checkpoint
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.capture.reader import NOT_FINITE, Reader, is_finite
from fuseline.compile.capture.weights import load_weights
from fuseline.compile.checkpoint_writer.plan import make_plan
from fuseline.compile.checkpoint_writer.write import write_quantized
from fuseline.compile.config import CompileConfig
from fuseline.compile.formats.panels import pack_block, pack_columns, panels_shape
from fuseline.compile.ops.linear import pack, unpack
from fuseline.compile.specs import WeightSource

SHARD = "100KB"
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """family -> a sharded checkpoint of random values, biases and norms included."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(zoo.config_of(family))
            for tensor in model.state_dict().values():
                tensor.normal_()
            model.save_pretrained(made[family], max_shard_size=SHARD)
        return made[family]

    return make


def load(path: Path, sources: dict[str, WeightSource] | None = None, **settings):
    config = CompileConfig(model=str(path), **settings)
    captured = described(config)
    return load_weights(sources or everything(captured), captured, config)


def truth(path: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    return model.state_dict() | dict(model.named_buffers())


def rewrite(path: Path, into: Path, change) -> Path:
    """A one-file checkpoint with the same config and changed tensors."""
    state = {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}
    (into / "config.json").write_text((path / "config.json").read_text())
    save_file({name: value.contiguous() for name, value in change(state).items()}, into / "model.safetensors")
    return into


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("family", list(zoo.FAMILIES))
def test_every_parameter_is_what_from_pretrained_gives(folder, family, dtype):
    found = load(folder(family), dtype=dtype)
    expected = truth(folder(family), dtype)
    assert set(found) == set(expected)
    assert_same(found, expected)


def test_reading_in_small_blocks_changes_nothing(folder, monkeypatch):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 100)
    assert_same(load(folder("mixtral")), truth(folder("mixtral")))


def test_names_without_the_prefix_of_the_base_model(folder, tmp_path):
    bare = rewrite(
        folder("gpt2"), tmp_path, lambda state: {k.removeprefix("transformer."): v for k, v in state.items()}
    )
    assert_same(load(bare), truth(folder("gpt2")))


def test_torch_files_are_read_in_place(folder, tmp_path):
    state = {name: value for file in folder("llama").glob("*.safetensors") for name, value in load_file(file).items()}
    names = sorted(state)
    state[names[0]] = torch.cat([state[names[0]]] * 2)[len(state[names[0]]) :]  # a view into a larger storage
    for number, part in enumerate((names[:5], names[5:])):
        torch.save({name: state[name] for name in part}, tmp_path / f"part-{number}.bin")
    index = {name: f"part-{int(at >= 5)}.bin" for at, name in enumerate(names)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text((folder("llama") / "config.json").read_text())
    assert_same(load(tmp_path, load_format="pt"), truth(folder("llama")))
    assert_same(load(tmp_path), truth(folder("llama")))


def test_ignored_files_are_not_read(folder, tmp_path):
    for path in folder("llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = {name: value for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()}
    torch.save({name: value + 1 for name, value in state.items()}, tmp_path / "pytorch_model.bin")
    assert_same(load(tmp_path), truth(folder("llama")))
    assert_same(load(tmp_path, ignore_patterns=("original/**/*", "*.bin")), truth(folder("llama")))
    other = load(tmp_path, ignore_patterns=("*.safetensors*",))
    assert torch.equal(other[f"{Q}.weight"], truth(folder("llama"))[f"{Q}.weight"] + 1)
    with pytest.raises(LoadError, match="holds no weights"):
        load(tmp_path, ignore_patterns=("*.safetensors*", "*.bin"))


Q, K, V = (f"model.layers.0.self_attn.{p}_proj" for p in "qkv")


@pytest.mark.parametrize("block_bytes", (200, 4 << 20))
def test_layouts(folder, monkeypatch, block_bytes):
    monkeypatch.setattr(reader, "BLOCK_BYTES", block_bytes)
    found = load(
        folder("qwen2"),
        {
            "rows": WeightSource((f"{Q}.weight", f"{K}.weight", f"{V}.weight")),
            "panels": WeightSource((f"{Q}.weight", "absent", f"{V}.weight"), format="panels", pads=(0, 5, 0)),
            "transposed": WeightSource((f"{Q}.weight",), format="panels", transpose=True),
            "bias": WeightSource((f"{Q}.bias", "absent", f"{V}.bias"), pads=(0, 32, 0), dtype="bfloat16"),
        },
    )
    w = truth(folder("qwen2"))
    q, k, v = (w[f"{name}.weight"] for name in (Q, K, V))
    assert torch.equal(found["rows"], torch.cat([q, k, v]))
    assert torch.equal(found["panels"], pack(torch.cat([q, torch.zeros(5, 64), v])))
    assert torch.equal(found["transposed"], pack(q.T))
    bias = torch.cat([w[f"{Q}.bias"], torch.zeros(32), w[f"{V}.bias"]])
    assert torch.equal(found["bias"], bias.bfloat16())


@pytest.mark.parametrize("block_bytes", (200, 4 << 20))
@pytest.mark.parametrize(("family", "transpose"), [("mixtral", False), ("gpt_oss", True)])
def test_layouts_of_experts(folder, monkeypatch, family, transpose, block_bytes):
    monkeypatch.setattr(reader, "BLOCK_BYTES", block_bytes)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    found = load(folder(family), {"w": WeightSource((name,), transpose, "panels")})
    weight = truth(folder(family))[name]
    assert torch.equal(found["w"], pack(weight.mT if transpose else weight))


def test_conv1d_is_packed_transposed(folder):
    name = "transformer.h.0.attn.c_attn.weight"
    found = load(folder("gpt2"), {"w": WeightSource((name,), True, "panels", "bfloat16")})
    assert torch.equal(found["w"], pack(truth(folder("gpt2"))[name].T.bfloat16()))


@pytest.mark.parametrize("rows", (1, 15, 16, 17, 50))
@pytest.mark.parametrize("row", (0, 3, 16, 29))
@pytest.mark.parametrize("num_cols", (24, 23))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_packing_in_torch_is_that_of_the_kernel(rows, row, num_cols, dtype):
    block = torch.randn(rows, num_cols).bfloat16()
    native, plain, parts = (torch.zeros(panels_shape((90, num_cols)), dtype=dtype) for _ in range(3))
    pack_block(native, block, row, 0)
    pack_columns(plain, block, row)
    for begin, end in ((0, 5), (5, 6), (6, 22), (22, num_cols)):
        pack_block(parts, block[:, begin:end], row, begin)
    assert torch.equal(native, plain) and torch.equal(native, parts)
    assert torch.equal(unpack(native, 90)[row : row + rows], block.to(dtype))


def test_values_are_rounded_to_the_dtype_of_the_model(folder):
    """A float32 checkpoint served in bfloat16: what is stored in float32 is still what the model computes with."""
    found = load(folder("llama"), {"w": WeightSource((f"{Q}.weight",), dtype="float32")}, dtype="bfloat16")
    assert torch.equal(found["w"], truth(folder("llama"), "bfloat16")[f"{Q}.weight"].float())


def test_equal_sources_and_tied_names_share_one_tensor(folder):
    first, second = WeightSource(("model.embed_tokens.weight",)), WeightSource(("lm_head.weight",))
    found = load(folder("gemma2"), {"a": first, "b": second, "c": second, "d": WeightSource(second.names, True)})
    assert found["a"] is found["b"] is found["c"] is not found["d"]


def test_a_tied_name_may_be_the_one_that_is_stored(folder, tmp_path):
    renamed = rewrite(
        folder("gemma2"),
        tmp_path,
        lambda state: {k.replace("model.embed_tokens", "lm_head"): v for k, v in state.items()},
    )
    assert_same(load(renamed), truth(folder("gemma2")))


def test_tied_names_with_different_values_are_refused(folder, tmp_path):
    def untie(state, factor):
        return state | {"lm_head.weight": factor * state["model.embed_tokens.weight"]}

    assert_same(load(rewrite(folder("gemma2"), tmp_path, lambda s: untie(s, 1))), truth(folder("gemma2")))
    path = rewrite(folder("gemma2"), tmp_path, lambda s: untie(s, 2))
    with pytest.raises(LoadError, match=r"lm_head.weight differ in .* config.json ties them: set tie_word_embeddings"):
        load(path)
    found = load(path, hf_overrides=(("tie_word_embeddings", False),))
    assert torch.equal(found["lm_head.weight"], 2 * found["model.embed_tokens.weight"])


RULES = (
    (["a.*.x", "a.*.y"], ["b"], [loading.MergeModulelist(0), loading.Concatenate(1)]),
    (["a.*.x"], ["b"], [loading.MergeModulelist(1)]),
    (["a.*.x"], ["b"], [loading.MergeModulelist(0), loading.Transpose(1, 2)]),
    (["a"], ["p", "q", "r"], [loading.Chunk(1)]),
    (["a"], ["p", "q"], [loading.Split(0)]),
    (["a"], ["b"], [loading.Transpose(0, 1)]),
    (["a"], ["b"], [loading.Transpose(0, 1, check_dims=True)]),
    (["a"], ["p", "q"], [loading.Transpose(0, 1), loading.Chunk(0)]),
    (["a"], ["p", "q"], [loading.Interleave(0), loading.Chunk(0)]),
    (["x", "y"], ["b"], [loading.Concatenate(1)]),
)


class TwoParts(torch.nn.Module):
    config = None

    def __init__(self):
        super().__init__()
        self.p, self.q = torch.nn.Parameter(torch.zeros(4, 6)), torch.nn.Parameter(torch.zeros(8, 6))
        self.b = torch.nn.Parameter(torch.zeros(6, 12))


@pytest.mark.parametrize(("sources", "targets", "operations"), RULES)
def test_conversions_are_those_of_transformers(tmp_path, sources, targets, operations):
    count = 3 if "*" in sources[0] else 1
    values = {name: [torch.randn(12, 6) for _ in range(count)] for name in sources}
    save_file({f"{n}.{i}": v for n, many in values.items() for i, v in enumerate(many)}, tmp_path / "model.safetensors")
    stored = open_checkpoint(tmp_path, "auto")
    taken = {n: [lazy_tensor.whole(stored[f"{n}.{i}"]) for i in range(count)] for n in values}
    rule, model = WeightConverter(list(sources), list(targets), operations), TwoParts()
    with Reader() as read:
        made = {n: read.value(u) for n, u in conversions.convert(rule, taken, targets[0], model).items()}
    for operation in operations:
        values = operation.convert(
            values,
            source_patterns=sources,
            target_patterns=targets,
            full_layer_name=targets[0],
            model=model,
            config=None,
        )
    assert set(made) == set(values)
    assert all(torch.equal(made[name], value) for name, value in values.items())


def test_dummy_weights_depend_on_name_and_seed_alone(folder):
    first, again = (load(folder("llama"), load_format="dummy", seed=5) for _ in range(2))
    other = load(folder("llama"), load_format="dummy", seed=6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[f"{Q}.weight"], other[f"{Q}.weight"])
    assert not torch.equal(first[f"{K}.weight"], first[f"{V}.weight"])
    assert abs(first[f"{Q}.weight"].std() - 0.1) < 0.01  # initializer_range
    assert torch.equal(first["model.norm.weight"], torch.ones(64))
    assert torch.equal(load(folder("qwen2"), load_format="dummy")[f"{Q}.bias"], torch.zeros(64))


def test_dummy_weights_need_no_checkpoint(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder("llama") / "config.json").read_text())
    assert load(tmp_path, load_format="dummy")
    with pytest.raises(LoadError, match=r"holds no weights: no model.safetensors or pytorch_model.bin"):
        load(tmp_path)


def drop(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", lambda s: drop(s, f"{Q}.weight"), rf"{Q}.weight is not in the weights of .*: the checkpoint is not"),
        ("llama", lambda s: s | {f"{Q}.weight": torch.zeros(64, 8)},
         rf"{Q}.weight in .*model.safetensors has shape \[64, 8\], but config.json makes it \[64, 64\]"),
        ("mixtral", lambda s: drop(s, "model.layers.0.block_sparse_moe.experts.2.w1.weight"),
         r"model.layers.0.mlp.experts.gate_up_proj cannot be made from .*w1.*: cannot join"),
        ("mixtral", lambda s: drop(s, "model.layers.0.block_sparse_moe.experts.3.w2.weight"),
         r"model.layers.0.mlp.experts.down_proj .*has shape \[3, 64, 96\], but config.json makes it \[4, 64, 96\]"),
    ],
)  # fmt: skip
def test_incomplete_checkpoints(folder, tmp_path, family, change, message):
    path = rewrite(folder(family), tmp_path, change)
    with pytest.raises(LoadError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_damaged_files(folder, tmp_path):
    path = rewrite(folder("llama"), tmp_path, lambda state: state) / "model.safetensors"
    whole = path.read_bytes()
    for damaged, message in [
        (whole[:-10], r" in .*model.safetensors ends at byte \d+, the file at \d+: it is cut off"),
        (whole[:300], r"is not a safetensors file, or is cut off within its header"),
        (b"", r"is not a safetensors file"),
        (whole[:8] + b"#" + whole[9:], r"has a damaged header"),
        (b"<html>not found</html>" * 9, r"is not a safetensors file"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(LoadError, match=message):
            load(tmp_path)
    path.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"junk" * 50)
    with pytest.raises(LoadError, match="pytorch_model.bin is not a file of tensors"):
        load(tmp_path)


def test_code_in_a_torch_file_is_not_run(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder("llama") / "config.json").read_text())
    torch.save({"w": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match="is not a file of tensors"):
        load(tmp_path)


def test_a_missing_shard_is_named(folder, tmp_path):
    for file in folder("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(LoadError, match=rf"{gone.name} is missing \(1 of \d+ files"):
        load(tmp_path)


def test_a_file_cut_off_while_it_is_read(tmp_path):
    save_file({"w": torch.zeros(100)}, tmp_path / "model.safetensors")
    whole = open_checkpoint(tmp_path, "safetensors")["w"]
    moved = StoredTensor(whole.name, whole.path, whole.begin + 8, whole.meta)
    with pytest.raises(LoadError, match=r"w in .*model.safetensors is cut off at byte"), Reader() as read:
        read.value(lazy_tensor.whole(moved))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", f"{Q}.weight"])
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8", "tpu_int8"])
def test_a_value_that_is_not_finite_is_refused(folder, tmp_path, name, quantization):
    def change(state):
        state[name].flatten()[-1] = torch.nan
        return state

    path = rewrite(folder("llama"), tmp_path, change)
    with pytest.raises(LoadError, match=rf"^{name} in .*model.safetensors has a value that is not finite: get the"):
        load(path, quantization=quantization)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, *NOT_FINITE], ids=str)
def test_numbers_of_any_type_that_are_not_finite_are_found(dtype):
    kinds = torch.arange(256, dtype=torch.uint8).view(dtype) if dtype in NOT_FINITE else None
    values = [1.0, -2.0, torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal, torch.nan, torch.inf, -torch.inf]
    values = torch.tensor(values).to(dtype) if kinds is None else kinds
    finite = values.float().isfinite() if values.dtype != torch.float64 else values.isfinite()
    assert is_finite(values[finite]) and 0 < finite.sum() < len(values)
    for bad in (~finite).nonzero().flatten().tolist():
        assert not is_finite(torch.cat([values[finite].view(BITS[dtype.itemsize]),
                                        values[bad : bad + 1].view(BITS[dtype.itemsize])]).view(dtype))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool], ids=str)
def test_integers_are_finite(dtype):
    assert is_finite(torch.full((9,), 255 if dtype == torch.uint8 else 1, dtype=dtype))


PEAK = """
import sys
from weights_cases import described
from fuseline.compile.capture.layouts import layouts_of
from fuseline.compile.capture.weights import load_weights
from fuseline.compile.config import CompileConfig
from fuseline.compile.formats.registry import format_named
from fuseline.compile.specs import WeightSource

config = CompileConfig(model=sys.argv[1], dtype=sys.argv[2])
captured = described(config)
layouts = layouts_of(captured, config)
shapes = {name: shape for name, (shape, _) in captured.parameters.items()}
formats = {n: layouts.get(n) or ("panels" if len(s) > 1 else "rows") for n, s in shapes.items()}
requests = {
    f"{name} {part}": WeightSource((name,), format=form, part=part)
    for name, form in formats.items()
    for part in format_named(form).shapes(shapes[name], captured.dtype)
}
def kb(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
open("/proc/self/clear_refs", "w").write("5")
before = kb("VmRSS")
loaded = load_weights(requests, captured, config)
print((kb("VmHWM") - before) * 1024, sum(value.nbytes for value in loaded.values()))
"""


def test_memory_stays_near_the_size_of_the_weights(tmp_path):
    config = zoo.config_of("mixtral")
    config.update(dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, vocab_size=8192))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    peak, size = map(int, run_python(PEAK, str(tmp_path), "bfloat16").split())
    assert size > 40 << 20
    assert peak < 1.15 * size + (25 << 20)  # the buffer, and what the import of kernels takes


def test_memory_stays_near_the_size_of_codes(tmp_path):
    config = zoo.config_of("llama")
    config.update(dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, vocab_size=1024))
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    write_quantized(make_plan(CompileConfig(model=str(tmp_path / "plain")), "int4"), tmp_path / "int4")
    peak, size = map(int, run_python(PEAK, str(tmp_path / "int4"), "bfloat16").split())
    assert 15 << 20 < size < 40 << 20
    assert peak < 1.15 * size + (25 << 20)
