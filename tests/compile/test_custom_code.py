"""Checkpoints that bring their own Python code: greedy tokens equal to those of the same class run eagerly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_model import AUTO_MAP, CONFIGURATION, MODELING, write_custom
from paged_driver import greedy
from quantized import edit_config
from transformers import PreTrainedModel

from fuseline.api.llm import LLM
from fuseline.compile.backends.cpu_plan.model import CpuModel
from fuseline.compile.cache.keys import cache_key, optimized_key
from fuseline.compile.capture.errors import CaptureError
from fuseline.compile.capture.export import capture_model
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target

NUM_TOKENS = 10
PROMPTS = [torch.randint(128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (31, 9, 20)]


@pytest.fixture(autouse=True, scope="module")
def modules_of_others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Transformers copies the code to a folder that lies in the home directory otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setenv("HF_MODULES_CACHE", folder)
        yield


def config_of(folder: Path, **settings: Any) -> CompileConfig:
    settings = {"level": 1, "cache_dir": str(folder / "cache"), "trust_remote_code": True, **settings}
    return CompileConfig(str(folder), **settings)


def compiled(folder: Path, **settings: Any) -> CpuModel:
    return compile_model(config_of(folder, **settings), detect_target(1))


def continued(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """The class has no cache: each token is computed from all before it."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(NUM_TOKENS):
            best, second = model(torch.tensor([tokens])).logits[0, -1].topk(2).values.tolist()
            assert best - second > 1e-3
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_tokens_equal_the_class_run_eagerly(tmp_path: Path, tied: bool) -> None:
    reference = write_custom(tmp_path, tied=tied)
    expected = [continued(reference, prompt) for prompt in PROMPTS]
    assert len(set(expected[0])) > 3
    model = compiled(tmp_path)
    assert model.verdict.startswith("checked: a copy of 3 layers")
    assert greedy(model, PROMPTS, NUM_TOKENS) == expected


def test_other_code_gives_another_graph(tmp_path: Path) -> None:
    """The caches of graphs know the files, those that are imported by others too."""
    config = config_of(tmp_path)
    first = write_custom(tmp_path)
    before = greedy(compiled(tmp_path), PROMPTS, NUM_TOKENS)
    keys = {(cache_key(config), optimized_key(config))}
    file = tmp_path / "parts_twist.py"
    file.write_text(file.read_text().replace("* bend", "* bend * 0.5"))
    keys.add((cache_key(config), optimized_key(config)))
    after = greedy(compiled(tmp_path), PROMPTS, NUM_TOKENS)
    assert before == [continued(first, prompt) for prompt in PROMPTS] != after
    file.rename(tmp_path / "parts_twist2.py")
    keys.add((cache_key(config), optimized_key(config)))
    assert len(keys) == 3
    edit_config(tmp_path, auto_map=AUTO_MAP | {"AutoModelForCausalLM": "some/where--modeling_twist.TwistForCausalLM"})
    assert cache_key(config) is None, "the code of another repository can change unseen"


def test_the_engine_process_takes_the_code(tmp_path: Path) -> None:
    """A process of its own, as a server has it."""
    expected = continued(write_custom(tmp_path), PROMPTS[0])
    settings = {
        "trust_remote_code": True, "cache_dir": str(tmp_path / "cache"), "max_model_len": 128, "enforce_eager": True,
    }  # fmt: skip
    with LLM(str(tmp_path), show_progress=False, disable_frontend_multiprocessing=False, **settings) as llm:
        found = llm.generate([{"prompt_token_ids": PROMPTS[0]}], {"temperature": 0, "max_tokens": NUM_TOKENS})
        assert list(found[0].outputs[0].token_ids) == expected


CONFIG_FILE, FILE, PARTS_FILE = "configuration_twist.py", "modeling_twist.py", "parts_twist.py"
BUILT, NOT_HOOKED = "twist cannot be built: ", "its attention does not go through Transformers' attention interface"
CHOICE = 'if self.config._attn_implementation != "eager":'
COUNTING = MODELING.replace("if position_ids is None:", "if True:").replace(
    "x = self.embed(input_ids)", "x = self.embed(input_ids) + 0.1 * position_ids[..., None]"
)
REFUSED: dict[str, tuple[str, str | None, str]] = {
    "raises": (FILE, MODELING + "\nraise RuntimeError('no such luck today')", f"{BUILT}no such luck today"),
    "exits": (FILE, MODELING + "\nraise SystemExit('goodbye to all of you')", f"{BUILT}goodbye"),
    "config exits": (CONFIG_FILE, CONFIGURATION + "\nraise SystemExit(1)", ".*config.json: SystemExit 1"),
    "needs a package": (FILE, MODELING + "\nimport no_such_package", f"{BUILT}.* packages .* no_such_package"),
    "has no such class": (FILE, MODELING.replace("TwistForCausalLM", "Other"), f"{BUILT}.*TwistForCausalLM"),
    "lacks a file": (PARTS_FILE, None, f"{BUILT}.*parts_twist"),
    "attends by itself": (FILE, MODELING.replace(CHOICE, "if False:"), f"twist: in 3 of 3 layers {NOT_HOOKED}"),
    "has a table of its own": (
        FILE, MODELING.replace("= ALL_ATTENTION_FUNCTIONS[", '= {"sdpa": eager}['), f"twist: {NOT_HOOKED}"),
    "counts positions": (
        FILE, COUNTING, "twist would answer wrongly: .* it counts positions from the first token of each step"),
}  # fmt: skip
"""File of the checkpoint, its content (None: it is missing), and what is said."""


@pytest.mark.parametrize("name", list(REFUSED))
def test_code_that_cannot_be_served_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    file, text, message = REFUSED[name]
    write_custom(tmp_path / "model")
    path = tmp_path / "model" / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(CaptureError, match=f"^{message}") as caught:
        compiled(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_code_that_is_not_trusted_is_refused_with_the_name_of_the_flag(tmp_path: Path) -> None:
    write_custom(tmp_path)
    message = f"^{tmp_path} needs the Python code it brings: trust it with --trust-remote-code$"
    with pytest.raises(CaptureError, match=message):
        capture_model(config_of(tmp_path, trust_remote_code=False))
    # A config that Transformers knows, with a model that it does not have.
    edit_config(tmp_path, model_type="clip", auto_map={"AutoModelForCausalLM": AUTO_MAP["AutoModelForCausalLM"]})
    with pytest.raises(CaptureError, match=message):
        capture_model(config_of(tmp_path, trust_remote_code=False))


def test_a_known_model_with_code_that_is_not_trusted_keeps_the_class_of_transformers(tmp_path: Path) -> None:
    """As from_pretrained has it: many checkpoints still bring files that Transformers has long had itself."""
    write_custom(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 128,'
        ' "num_attention_heads": 4, "auto_map": {"AutoModelForCausalLM": "modeling_twist.TwistForCausalLM"}}'
    )
    captured = capture_model(config_of(tmp_path, trust_remote_code=False))
    assert "model.layers.0.self_attn.q_proj.weight" in captured.parameters
