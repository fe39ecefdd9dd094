"""`fuseline bench offline`: the shapes it asks an engine for, and the speeds it makes of the times."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from fuseline.api.bench import offline
from fuseline.api.cli import main


class FakeLLM:
    """Every prompt token takes 1 s and every generated one after the first 10 s."""

    def __init__(self, **values) -> None:
        self.ready = SimpleNamespace(vocab_size=50)
        self.clock, self.shapes, self.prompts = 0.0, [], []
        FakeLLM.last = self

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass

    def generate(self, prompts, sampling) -> None:
        assert sampling["temperature"] == 0 and sampling["ignore_eos"]
        assert all(0 <= token < 50 for prompt in prompts for token in prompt)
        self.shapes.append((len(prompts), len(prompts[0]), sampling["max_tokens"]))
        self.prompts += [tuple(prompt) for prompt in prompts]
        self.clock += len(prompts) * len(prompts[0]) + 10 * (sampling["max_tokens"] - 1)


@pytest.fixture(autouse=True)
def fake(monkeypatch) -> None:
    monkeypatch.setattr("fuseline.api.llm.LLM", FakeLLM)
    monkeypatch.setattr(offline.time, "perf_counter", lambda: FakeLLM.last.clock)


def test_speeds_and_fresh_prompts(capsys, tmp_path) -> None:
    path = tmp_path / "r.json"
    flags = ["--input-lens", "20,40", "--output-len", "8", "--batches", "1,4", "--repeats", "2"]
    assert main(["bench", "offline", "demo", *flags, "--save-result", str(path)]) == 0
    speeds = json.loads(path.read_text())["speeds"]
    assert [(s["name"], s["batch"], s["input_len"]) for s in speeds] == [
        ("prefill", 1, 20), ("prefill", 1, 40), ("decode", 1, 20), ("throughput", 4, 20),
    ]  # fmt: skip
    assert [s["tokens_per_second"] for s in speeds] == [1.0, 1.0, 0.1, 32 / (80 + 70)]
    assert len(set(FakeLLM.last.prompts)) == len(FakeLLM.last.prompts)
    assert "throughput         4      20       8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, named",
    [(["--repeats", "0"], "--repeats"), (["--output-len", "0"], "--output-len"), (["--input-lens", "a"], "list of")],
)
def test_bad_options_are_named(flags: list[str], named: str, capsys) -> None:
    try:
        status = main(["bench", "offline", *flags])
    except SystemExit as error:
        status = error.code
    assert status in (1, 2) and named in capsys.readouterr().err
