"""`fuseline quantize`: its output, its errors, and the demo at fewer bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import zoo

from fuseline.api.cli import main
from fuseline.api.llm import LLM

ANSWERS = {
    "Hello!": "Hello! How can I help you today?",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "What is the capital of Italy? Answer as JSON.": '{"country": "Italy", "capital": "Rome"}',
}


def test_the_demo_at_int8_answers_its_questions(tmp_path: Path, capsys) -> None:
    path = tmp_path / "demo-int8"
    assert main(["quantize", "demo", "--to", "int8", "--output", str(path), "--measure"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "demo-int8: 28 weights as int8, 4.8 MB of 7.3; plain: lm_head" in lines[-1]
    assert lines[0].split() == ["layer", "layout", "weight", "output"] and len(lines) == 28 + 3
    assert "measuring" in err and "quantizing: 100%" in err
    with LLM(str(path), max_model_len=128, show_progress=False) as llm:
        asked = [[{"role": "user", "content": question}] for question in ANSWERS]
        found = llm.chat(asked, {"temperature": 0, "max_tokens": 40})
    assert [one.outputs[0].text for one in found] == list(ANSWERS.values())


@pytest.mark.parametrize(("words", "message"), [
    (["none-such-model", "--to", "int4"], "model 'none-such-model' is neither a directory nor a hub id"),
    (["{model}", "--to", "int4", "--output", "{folder}"], "is there already; give another directory"),
    (["{folder}", "--to", "int4", "--output", "{folder}/out"], "has no config.json"),
    (["{model}", "--to", "int4", "--output", "{folder}/out", "--ignore", "*"], "has no linear to quantize"),
])  # fmt: skip
def test_errors_are_one_line(words: list[str], message: str, tmp_path: Path, capsys) -> None:
    model = zoo.checkpoint("llama")
    assert main(["quantize", *(word.format(model=model, folder=tmp_path) for word in words)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("fuseline: error: ") and message in err and err.count("\n") == 1


def test_a_target_that_is_not_there_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", "demo", "--to", "int3"])
    assert "--to: invalid choice: 'int3'" in capsys.readouterr().err
