"""docs/MODELS.md, made of the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from sweep_architectures.results import OURS, UNTRIED, Result

PAGE = Path(__file__).resolve().parents[2] / "docs" / "MODELS.md"
WORDS = {"equal": "equal", "refused": "refused", "WRONG": "**wrong**", "crash": "**crash**", "none": "not tried"}
HEAD = """# Models

Written by `python3 tools/sweep_architectures --page`. Do not edit it by hand.

Every architecture for which Transformers {transformers} has a causal language model, each with random weights and a
config made small, served with torch {torch} on a CPU and compared with Transformers on the same weights: greedy, in
float32 and in bfloat16, three prompts in one batch, in chunks, then token by token. `trial.py` in that folder says
what counts as equal: each row of logits, and each greedy token whose margin is above what rounding explains.

{summary}

"all ours" means that every op of the plan has a kernel of ours; otherwise the ops are named that torch computes, which
`-O2` compiles. A refused model is refused before it is served, with these words.

## Other versions of Transformers

The sweep takes whatever Transformers is installed; it names no architecture that must exist. The oldest and the newest
of the range of `pyproject.toml` are tried in environments of their own; without `--page` this page stays:

    python3 -m venv .venv-oldest
    .venv-oldest/bin/pip install --no-build-isolation -e . "transformers==5.20.*"
    .venv-oldest/bin/python tools/sweep_architectures

An architecture takes about 8 s of a core. `--part 1/4` tries a quarter, names try those, `--results FILE` keeps
results so that a sweep goes on where it was ended.
"""


def page(results: Sequence[Result]) -> str:
    decoders = [result for result in results if result.is_decoder and result.kind != "none"]
    untried = sum(result.detail == UNTRIED for result in results)
    others = [result for result in results if result not in decoders]
    head = HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        summary=_summary(decoders, untried),
    )
    parts = [head, "## Text decoders\n", _table(decoders), ""]
    parts += [
        "## Others\n",
        "Decoders of encoder-decoders, encoders that are told to be decoders, models that attend in both directions,\n"
        "and types of which Transformers has no small model that runs on text.\n",
        _table(others),
        "",
    ]
    return "\n".join(parts)


def _summary(decoders: Sequence[Result], untried: int) -> str:
    counts = Counter(result.kind for result in decoders)
    ours = sum(result.speed == OURS for result in decoders)
    rows = [("text decoders", len(decoders)), ("equal", counts["equal"]), ("of these, all ops ours", ours)]
    rows += [("refused in words", counts["refused"]), ("silently wrong", counts["WRONG"]), ("crash", counts["crash"])]
    rows += [("not swept yet, of all", untried)] if untried else []
    return "\n".join(["| | architectures |", "|---|---|", *(f"| {name} | {count} |" for name, count in rows)])


def _table(results: Sequence[Result]) -> str:
    rows = (f"| `{r.model_type}` | {WORDS[r.kind]} | {_speed(r)} | {_reason(r)} |" for r in results)
    return "\n".join(["| architecture | result | ops | reason |", "|---|---|---|---|", *rows])


def _speed(result: Result) -> str:
    if result.kind != "equal":
        return ""
    return "all ours" if result.speed == OURS else f"torch: {result.speed.replace('aten.', '')}"


def _reason(result: Result) -> str:
    return "" if result.kind == "equal" else result.detail.replace("|", "\\|")
