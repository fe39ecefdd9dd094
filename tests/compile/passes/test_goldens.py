"""Golden matches of every pass, op counts of every stage, and the number of regions that torch computes, for each
family of the zoo, in bfloat16.

A pass that stops matching, or an op that reappears, changes a line here. After a change that is meant:

    python tests/test_goldens.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from zoo import FAMILIES, checkpoint

from fuseline.compile.backends.cpu_plan.lowering import Call, Lowering
from fuseline.compile.backends.cpu_plan.plan import limits_of, meta_inputs
from fuseline.compile.compiler import optimize
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.region import Region
from fuseline.compile.graph.runner import PipelineResult

FILE = Path(__file__).parent / "goldens.json"
ATTENTION_LAYERS = 3
LATENT = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite"}
"""Families that keep latents in the cache."""
WITHOUT_MATCH: dict[str, set[str]] = {
    "find_rope": {"gpt2", "opt"},
    "fuse_act_mul": {"gpt2", "gpt_neox", "opt", "starcoder2", "phi", "mixtral", "qwen3_moe", "gpt_oss"},
    "join_linears": {"phi3", "phi3_longrope", "gpt2", "gpt_neox"},
    "fuse_rope_cache": {"gpt2", "opt", "deepseek_v2", "cohere", "olmo2"},  # DeepSeek-V2 and Cohere rotate in float32
}
"""Families without a match of a pass; every other family has one."""
ROUTED = {"mixtral": 3, "qwen3_moe": 3, "gpt_oss": 3, "qwen2_moe": 3, **dict.fromkeys(LATENT, 2)}
"""Layers with a router; DeepSeek's first layer is dense."""


def counts(family: str) -> dict[str, dict]:
    result, steps = lower(family)
    return {
        "matches": {report.name: report.matches for report in result.reports},
        "ops": {stage: dict(sorted(ops.items())) for stage, ops in result.stage_ops.items()},
        "regions": sum(isinstance(step, Region) for step in steps),
    }


def lower(family: str) -> tuple[PipelineResult, list[Call | Region]]:
    """What the passes did, and the steps of the execution plan."""
    config = CompileConfig(model=str(checkpoint(family, "bfloat16")), level=1)
    captured, result = optimize(config)
    made = Lowering(captured.graph, meta_inputs(captured.graph, config.block_size), limits_of(config)).run()
    return result, made.steps


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_the_golden_ones(family: str) -> None:
    found, golden = counts(family), json.loads(FILE.read_text())[family]
    assert found["matches"] == golden["matches"] and found["regions"] == golden["regions"]
    for stage, ops in golden["ops"].items():
        assert found["ops"][stage] == ops, stage


@pytest.mark.parametrize("family", FAMILIES)
def test_what_every_family_has_is_recognized(family: str) -> None:
    """Holds for goldens that were just written too."""
    golden = json.loads(FILE.read_text())[family]
    matches, lowered = golden["matches"], golden["ops"]["lower"]
    kind = "paged_latent_attention" if family in LATENT else "paged_attention"
    assert matches["page_attention"] == lowered[kind] == ATTENTION_LAYERS
    assert matches["absorb_latent"] == (ATTENTION_LAYERS if family in LATENT else 0)
    assert "attention" not in lowered and "experts" not in lowered
    assert "linear" not in lowered and "aten.linear" not in lowered
    # A sum before the final norm is cut at both of its terms.
    assert matches["keep_last_logits"] == 1 and lowered["gather_rows"] in (1, 2)
    for name, families in WITHOUT_MATCH.items():
        assert (matches[name] == 0) == (family in families), name
    assert matches["find_moe"] == ROUTED.get(family, 0)
    assert matches["pack_weights"] > 2 * ATTENTION_LAYERS
    assert golden["regions"] == 0


def test_layers_of_latents_have_only_ops_of_ours() -> None:
    """All that DeepSeek-V3's layers compute is a call of ours: no part of them waits for Python."""
    _, steps = lower("deepseek_v3")
    assert len(steps) > 60 and all(isinstance(step, Call) for step in steps)
    assert {step.kind for step in steps} <= {
        "embedding", "rms_norm", "add_rms_norm", "linear", "rope_latent", "copy", "head_linear",
        "paged_latent_attention", "act_mul", "route_groups", "experts", "binary", "gather_rows", "unary",
    }  # fmt: skip


def test_every_family_has_a_golden() -> None:
    assert sorted(json.loads(FILE.read_text())) == sorted(FAMILIES)


if __name__ == "__main__":
    FILE.write_text(json.dumps({family: counts(family) for family in FAMILIES}, indent=1) + "\n")
