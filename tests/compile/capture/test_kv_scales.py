"""Scales of fp8 caches: ops and kernels with them, where they come from, and that both ops of a layer have the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from cuda_target_cases import build, decode_step
from fake_gpu import GPU, FakeGraphs, no_host_sync
from native_fixtures import plain_keys
from ops_cases import assert_close
from pass_cases import case
from pass_serve_cases import K, Q, V, rope_case, turned_alike
from safetensors.torch import load_file, save_file
from triton_ops_cases import BY_NAME, make
from zoo import checkpoint

from fuseline.compile.backends.cuda.calibrate import scale_of
from fuseline.compile.capture.checkpoint import StoredTensor
from fuseline.compile.capture.kv_scales import find_scales
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig, GraphConfig
from fuseline.compile.ops.registry import registry
from fuseline.compile.ops.rope import FP8
from fuseline.compile.passes.fuse_rope_cache import fuse_rope_cache
from fuseline.compile.passes.page_attention import page_attention
from fuseline.compile.target import CPU

BY_FLAG = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
OPS = torch.ops.fuseline
SCALES = torch.tensor([0.013]), torch.tensor([2.7])
LAYERS = 3


@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_attention_reads_the_scaled_numbers(fp8: torch.dtype) -> None:
    op = registry()["paged_attention"]
    for q, k_cache, v_cache, *rest in op.inputs(make(torch.float32)):
        caches = k_cache.to(fp8), v_cache.to(fp8)
        wide = [cache.float() * scale for cache, scale in zip(caches, SCALES, strict=True)]
        want = op.reference(q, *wide, *rest)
        scaled = *caches, *rest[:7], *SCALES, *rest[9:]
        assert_close(op.reference(q, *scaled), want, 1.0)
        assert_close(BY_NAME["paged_attention"].run(q, *scaled), want, 8.0)


def on_gpu(found, kv_cache_dtype: str):
    config = dataclasses.replace(found.ctx.config, kv_cache_dtype=kv_cache_dtype)
    found.ctx = dataclasses.replace(found.ctx, config=config, target=GPU)
    return found


def test_both_ops_of_a_layer_read_the_same_scales() -> None:
    found = on_gpu(rope_case(turned_alike, torch.bfloat16), "fp8")
    found.apply(page_attention)
    layer = found.results[-1].specs[0].layer
    assert found.results[-1].constants == {f"{kind}_scale_{layer}": torch.ones(1) for kind in "kv"}
    assert found.apply(fuse_rope_cache) == 1
    nodes = {node.target: node for node in found.graph.graph.nodes}
    write, read = nodes[OPS.rope_cache.default], nodes[OPS.paged_attention.default]
    names = [f"k_scale_{layer}", f"v_scale_{layer}"]
    assert [node.meta["fqn"] for node in write.args[11:]] == names
    assert list(write.args[11:]) == list(read.args[10:])


def test_caches_of_other_numbers_have_no_scales() -> None:
    found = on_gpu(case(lambda q, k, v: OPS.attention(q, k, v, None, 0, 1.0, 0, 0.0, True), torch.bfloat16,
                         q=Q, k=K, v=V), "bfloat16")  # fmt: skip
    assert found.apply(page_attention) == 1 and found.results[-1].constants == {}
    nodes = {node.target: node for node in found.graph.graph.nodes}
    assert len(nodes[OPS.write_cache.default].args) == 5 and len(nodes[OPS.paged_attention.default].args) == 10


def test_names_of_scales_in_checkpoints() -> None:
    names = {
        "model.layers.0.self_attn.attn.k_scale": {"k_scale_0"},
        "model.layers.0.self_attn.v_proj.v_scale": {"v_scale_0"},
        "model.layers.1.self_attn.kv_scale": {"k_scale_1", "v_scale_1"},
        "model.layers.2.self_attn.k_proj.output_scale": {"k_scale_2"},
        "model.layers.2.self_attn.k_proj.weight_scale": set(),
        "model.layers.2.self_attn.o_proj.output_scale": set(),
        "model.layers.2.mlp.k_scaler": set(),
        "model.layers.7.self_attn.k_scale": set(),
    }
    for name, expected in names.items():
        stored = {name: StoredTensor(name, Path("x"), 0, torch.empty((), device="meta"))}
        assert set(find_scales(stored, range(LAYERS))) == expected
    pair = ["a.0.kv_scale", "a.0.k_proj.k_scale"]
    stored = {name: StoredTensor(name, Path("x"), 0, torch.empty((), device="meta")) for name in pair}
    assert {key: found.name for key, found in find_scales(stored, [0]).items()} == {
        "k_scale_0": "a.0.k_proj.k_scale", "v_scale_0": "a.0.kv_scale",
    }  # fmt: skip


def with_scales(into: Path, scales: dict[str, torch.Tensor]) -> Path:
    path = checkpoint("llama", "bfloat16")
    (into / "config.json").write_text((path / "config.json").read_text())
    save_file(load_file(path / "model.safetensors") | scales, into / "model.safetensors")
    return into


def scales_of(model) -> dict[str, float]:
    program = model._executable.program
    return {f"{kind}{layer}": float(getattr(program, f"{kind}_scale_{layer}")) for layer in range(3) for kind in "kv"}


PROMPT = dataclasses.replace(
    decode_step([3]), token_ids=torch.tensor([4, 5, 6]), positions=torch.arange(3), rope_rows=torch.arange(3),
    query_start=torch.tensor([0, 3], dtype=torch.int32), slot_mapping=torch.arange(16, 19)[None],
    logits_rows=torch.tensor([2]),
)  # fmt: skip


@pytest.mark.parametrize("flag", BY_FLAG)
def test_scales_of_the_checkpoint_are_used(flag: str, tmp_path, caplog) -> None:
    prefix = "model.layers.{}.self_attn."
    path = with_scales(tmp_path, {
        prefix.format(0) + "k_scale": torch.tensor(0.25), prefix.format(0) + "v_scale": torch.tensor([0.5]),
        prefix.format(1) + "kv_scale": torch.tensor(0.125), prefix.format(2) + "k_scale": torch.tensor(-1.0),
    })  # fmt: skip
    model = compile_model(CompileConfig(model=str(path), kv_cache_dtype=flag), GPU)
    assert scales_of(model) == {"k0": 0.25, "v0": 0.5, "k1": 0.125, "v1": 0.125, "k2": 1.0, "v2": 1.0}
    assert "layers.2.self_attn.k_scale" in caplog.text
    plain = build("llama")
    for built in (model, plain):
        built.allocate_caches([4])
        built.run(PROMPT)
    for kind, scale in (("k", 0.25), ("v", 0.5)):
        wide, coded = plain._caches[f"{kind}_cache_0"], model._caches[f"{kind}_cache_0"]
        assert torch.equal(coded.float(), (wide.float() / scale).to(BY_FLAG[flag]).float()) and coded.float().any()
    asked = compile_model(CompileConfig(model=str(path), kv_cache_dtype=flag, calculate_kv_scales=True), GPU)
    assert set(scales_of(asked).values()) == {1.0}, "they are to be computed"


def test_a_cpu_uses_the_scales_of_the_checkpoint(tmp_path) -> None:
    path = with_scales(tmp_path, {"model.layers.0.self_attn.k_scale": torch.tensor(0.25),
                                  "model.layers.0.self_attn.v_scale": torch.tensor([0.5])})  # fmt: skip
    coded, plain = (compile_model(CompileConfig(model=str(path), kv_cache_dtype=flag, skip_model_check=True), CPU)
                    for flag in ("fp8", "auto"))  # fmt: skip
    for built in (coded, plain):
        built.allocate_caches([4])
        built.run(PROMPT)
    for kind, scale in (("k", 0.25), ("v", 0.5)):
        wide, found = (model._caches[f"{kind}_cache_0"] for model in (plain, coded))
        wide, found = (plain_keys(wide), plain_keys(found)) if kind == "k" else (wide, found)
        assert torch.equal(found.float(), (wide.float() / scale).to(torch.float8_e4m3fn).float())
        assert found.float().any()


@pytest.mark.parametrize(("level", "flag", "top"), [(0, "fp8", 224.0), (1, "fp8", 224.0), (1, "fp8_e5m2", 28672.0)])
def test_scales_are_computed_from_the_first_step_that_is_kept(level: int, flag: str, top: float) -> None:
    """The largest number comes to lie at half of the cache's largest."""
    model = build("llama", graphs=GraphConfig((2,)), kv_cache_dtype=flag, calculate_kv_scales=True, level=level)
    plain = build("llama", level=level)
    for built in (model, plain):
        built.allocate_caches([16])
    model.capture_graphs(api=FakeGraphs())
    model.graphs.wait()
    model.run(dataclasses.replace(PROMPT, slot_mapping=torch.full((1, 3), -1)))
    assert set(scales_of(model).values()) == {1.0}, "a warm-up step says nothing"
    with no_host_sync(PROMPT.fields().values()):
        model.run(PROMPT)
    plain.run(PROMPT)
    found = scales_of(model)
    for kind in "kv":
        # Layers behind see what fp8 has made of the first.
        largest = plain._caches[f"{kind}_cache_0"].float().abs().max()
        assert found[f"{kind}0"] == pytest.approx(float(largest) / top)
        assert model._caches[f"{kind}_cache_0"].float().abs().max() == top
    model.run(decode_step([4]))
    assert scales_of(model) == found, "once"


def test_scales_of_nothing_and_of_no_numbers_are_one() -> None:
    for x in (torch.zeros(3), torch.tensor([1.0, float("inf")]), torch.tensor([float("nan")])):
        assert scale_of(x, torch.float8_e5m2).tolist() == [1.0]
    assert scale_of(torch.tensor([-448.0, 3.0]), torch.float8_e4m3fn).tolist() == [2.0]
