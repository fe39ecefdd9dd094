"""One architecture: greedy generation of Transformers, and ours along the same tokens, in float32 and bfloat16.

Weights are random numbers that bfloat16 holds exactly, written as a checkpoint. Transformers (eager attention, its own
cache) continues each prompt greedily. We compute all prompts in one batch, in chunks, then token by token along the
same tokens, so that one comparison covers all tokens, also those behind a tie (compare.py).

A model that chooses (experts, tokens to attend to) turns rounding into another choice where two are equally good, which
no bound covers, and in some weights rounding grows beyond what check.MOST_ERROR takes for it. A model that differs for
one of these reasons is tried with two other sets of weights, and is wrong if it differs again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from fuseline.compile.capture.errors import CaptureError, LoadError
from fuseline.compile.capture.errors import one_line as told
from fuseline.compile.capture.hf_classes import auto_class
from fuseline.compile.capture.reference import RandomModel, with_eager_experts
from fuseline.compile.check import MAX_ERROR, MOST_ERROR, allowed_error, serve
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target
from sweep_architectures.architectures import is_text_decoder, small_default
from sweep_architectures.compare import Difference, check_bfloat16, check_float32, lost_token
from sweep_architectures.results import OURS, Result, one_line

SEEDS = (5, 6, 7)
"""Of random weights."""
CHOOSING = {"experts", "route_topk", "aten.topk"}
PROMPTS = (48, 21, 3)
"""Tokens of each prompt."""
NUM_GENERATED = 10
MAX_ROWS = 64


def quiet() -> None:
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def try_model(model_type: str, folder: Path, level: int) -> Result:
    """Never raises."""
    first, *others = (_Trial(model_type, folder / str(seed), level, seed) for seed in SEEDS)
    result = first.run()
    if result.kind != "WRONG" or not (first.ops & CHOOSING or first.is_sensitive):
        return result
    again = [trial.run() for trial in others]
    if any(other.kind != "equal" for other in again):
        return result
    return replace(again[0], detail=f"{again[0].detail}; with other weights rounding decides")


@dataclass
class _Expected:
    """What Transformers computes."""

    model: RandomModel
    sequences: list[Tensor]
    """Each prompt and its greedy tokens."""
    logits: list[Tensor]
    """[T, V] of each sequence, float32, computed at once and without a cache."""
    note: str = ""


def _generated(model: RandomModel, use_cache: bool) -> _Expected:
    """Raises ValueError if the logits cannot be compared; if they are not those of the tokens, the note tells."""
    vocab, sequences = model.vocab_size, []
    for count in PROMPTS:
        prompt = torch.randint(min(8, vocab // 2), vocab, (count,), generator=torch.Generator().manual_seed(count))
        tokens = model.generate(prompt.tolist(), NUM_GENERATED, use_cache)
        sequences.append(torch.cat([prompt, torch.tensor(tokens)]))
    logits = [model.logits(tokens) for tokens in sequences]
    if not all(bool(rows.isfinite().all()) for rows in logits):
        raise ValueError("a small copy of random weights has infinite logits")
    made = zip(PROMPTS, sequences, logits, strict=True)
    lost = (lost_token(rows[count - 1 : -1], tokens[count:], 2 * MAX_ERROR) for count, tokens, rows in made)
    first = next(filter(None, lost), "")
    note = f"; Transformers itself generates others than the highest of all tokens' logits: {first}" if first else ""
    return _Expected(model, sequences, logits, note)


class _Trial:
    """One set of weights."""

    def __init__(self, model_type: str, folder: Path, level: int, seed: int) -> None:
        self.ops: set[str] = set()
        """Ops of the captured graph, once it is served."""
        self.is_sensitive = False
        """Whether rounding may explain more than counts as equal."""
        self._torch_ops: set[str] = set()
        self._model_type = model_type
        self._folder = folder
        self._level = level
        self._seed = seed

    def run(self) -> Result:
        try:
            config = small_default(self._model_type)
            expected = self._generate(config)
        except Exception as error:
            return Result(self._model_type, "none", one_line(f"{type(error).__name__}: {error}"))
        kind, detail = self._outcome(expected)
        speed = ", ".join(sorted(self._torch_ops)) or OURS
        is_decoder = is_text_decoder(self._model_type, config)
        return Result(self._model_type, kind, one_line(detail), is_decoder, speed if kind == "equal" else "")

    def _generate(self, config: PreTrainedConfig) -> _Expected:
        model = RandomModel(config, False, seed=self._seed)
        model.round_to(torch.bfloat16)
        try:
            expected = _generated(model, use_cache=True)
        except Exception as error:
            expected = _generated(model, use_cache=False)
            expected.note += f"; Transformers' own cache fails: {told(error)}"
        model.save(self._folder)
        return expected

    def _outcome(self, expected: _Expected) -> tuple[str, str]:
        """(kind, detail)."""
        try:
            return "equal", self._compare(expected)
        except Difference as difference:
            return "WRONG", str(difference)
        except (CaptureError, LoadError) as error:
            return "refused", str(error)
        except Exception as error:
            return "crash", f"{type(error).__name__}: {error}"

    def _compare(self, expected: _Expected) -> str:
        """What was found, in words. Raises Difference, and whatever serving raises."""
        found, verdict = self._serve(expected.sequences, "float32")
        pairs = zip(expected.sequences, expected.logits, strict=True)
        allowed = [allowed_error(expected.model, *pair) for pair in pairs]
        self.is_sensitive = max(allowed) >= MOST_ERROR
        note = check_float32(found, expected.logits, allowed)
        halved, _ = self._serve(expected.sequences, "bfloat16")
        try:
            theirs = self._halved(expected.sequences)
        except Exception as error:
            more = f"not compared in bfloat16, in which Transformers itself fails ({told(error)})"
        else:
            more = check_bfloat16(halved, theirs, expected.logits)
        return "; ".join([note, more, *([] if verdict.startswith("checked") else [verdict])]) + expected.note

    def _serve(self, sequences: list[Tensor], dtype: str) -> tuple[list[Tensor], str]:
        """(logits of each sequence, verdict of the model check); the check is made once, for both dtypes."""
        config = CompileConfig(
            str(self._folder), level=self._level, dtype=dtype, cache_dir=str(self._folder),
            skip_model_check=dtype != "float32", max_num_batched_tokens=MAX_ROWS, max_num_seqs=MAX_ROWS,
        )  # fmt: skip
        model = compile_model(config, detect_target())
        self.ops |= {name for counts in model.report.stage_ops.values() for name in counts}
        self._torch_ops |= model.torch_ops
        return serve(model, sequences, config.block_size, NUM_GENERATED), model.verdict

    def _halved(self, sequences: list[Tensor]) -> list[Tensor]:
        """Logits of Transformers in bfloat16."""
        settings = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
        auto = auto_class(AutoConfig.from_pretrained(self._folder))
        model = with_eager_experts(auto.from_pretrained(self._folder, **settings).eval())
        with torch.no_grad():
            return [model(input_ids=tokens[None], use_cache=False).logits[0].float() for tokens in sequences]
