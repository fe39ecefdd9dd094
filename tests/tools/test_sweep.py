"""Causal models of Transformers, one of each kind of outcome; tools/sweep_architectures.py tries all of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from sweep_architectures import try_model

OUTCOMES = {
    "flex_olmo": ("equal", "checked: "),
    "beam": ("refused", "beam would answer wrongly: .* from token 1 on, "),
    "minimax_m3_vl_text": ("refused", "minimax_m3_vl_text would answer wrongly: .* from token 1 on, "),
    "jetmoe": ("refused", "its code depends on values that are known only when it runs"),
    "roc_bert": ("refused", "^roc_bert cannot be captured .*eos_token_id"),
    "diffllama": ("refused", r"^diffllama attends \d+ times in \d layers "),
}


@pytest.mark.parametrize("model_type", OUTCOMES)
def test_models_are_equal_or_refused_in_words(model_type: str, tmp_path: Path) -> None:
    outcome, detail = try_model(model_type, tmp_path, level=1)
    expected, words = OUTCOMES[model_type]
    assert outcome == expected, detail
    assert re.search(words, detail)
