"""Start-up bars and the table after them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

from fuseline.api.config_resolve import resolve
from fuseline.api.progress import StartupProgress, startup_table
from fuseline.engine.messages import EngineReady


def test_a_bar_per_phase() -> None:
    out = io.StringIO()
    progress = StartupProgress(out)
    for phase, total in (("loading", 3), ("compiling", 2)):
        for done in range(total + 1):
            progress(phase, done, total)
    text = out.getvalue()
    progress.close()
    assert out.getvalue() == text and text.endswith("\n"), "what is logged next begins a line"
    assert "loading: 100%" in text and "3/3" in text and "compiling: 100%" in text and "2/2" in text


def test_table_names_memory_level_and_address(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = resolve({"model": str(tmp_path), "compilation_config": 3, "served_model_name": "m"})
    ready = EngineReady(
        vocab_size=9, max_model_len=512, num_blocks=10, block_size=16, dtype="float32", kv_cache_dtype="float32",
        eos_token_ids=(1,), architecture="LlamaForCausalLM", table=(("weights", "1.2 GiB"), ("dtype", "shown once")),
    )  # fmt: skip
    table = startup_table(config, ready, "http://127.0.0.1:8000")
    assert re.search(r"^\W*level +3\W*$", table, re.MULTILINE)
    assert "weights   1.2 GiB" in table and "http://127.0.0.1:8000/v1" in table
    assert "10 blocks of 16 = 160 tokens" in table and "shown once" not in table
    assert "http" not in startup_table(config, ready)
