"""Greedy answers of the demo at fewer bits against those at bf16, on its held-out questions.

python benchmarks/agreement.py

A token agrees if all before it do, too: after the first other one the contexts differ.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from fuseline.api.cli import main as fuseline
from fuseline.api.llm import LLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from demo_corpus import facts  # noqa: E402

SETTINGS = {"temperature": 0, "max_tokens": 40}


def answers(model: str, questions: list[str], quantization: str | None = None) -> list[list[int]]:
    """Token ids of the greedy answers."""
    with LLM(model, max_model_len=512, show_progress=False, quantization=quantization) as llm:
        found = llm.chat([[{"role": "user", "content": question}] for question in questions], SETTINGS)
    return [list(one.outputs[0].token_ids) for one in found]


def common(one: list[int], two: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((k for k, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def main() -> None:
    questions = [question for question, _ in facts.held_out()]
    plain = answers("demo", questions)
    total = sum(map(len, plain))
    print(f"{len(questions)} questions, {total} tokens at bf16")
    with tempfile.TemporaryDirectory() as folder:
        for bits in ("int8", "int4", "fp8"):
            path = f"{folder}/{bits}"
            fuseline(["quantize", "demo", "--to", bits, "--output", path])
            for name, found in (
                (f"--quantization {bits}", answers("demo", questions, bits)), ("quantize", answers(path, questions)),
            ):  # fmt: skip
                agree = sum(common(one, two) for one, two in zip(plain, found, strict=True))
                same = sum(one == two for one, two in zip(plain, found, strict=True))
                print(f"{bits}, {name}: {agree / total:.1%} of tokens, {same} of {len(questions)} answers")


if __name__ == "__main__":
    main()
