"""Every causal language model of the installed Transformers, made small, served and compared with Transformers.

    python3 tools/sweep_architectures.py                   # all: about a quarter of an hour on one core
    python3 tools/sweep_architectures.py llama phimoe      # these
    python3 tools/sweep_architectures.py --part 1/4        # a quarter of them

One line a model: equal, unchecked (equal, but the model check had to pass it unseen), refused (in one line of words),
WRONG (served without complaint, other logits), crash (an error that is not in words), or none (Transformers itself has
no small model of it). Exit status 1 if there is a WRONG or a crash. The weights and sequences are not those of the
model check.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from fuseline.compile.capture.errors import CaptureError, LoadError
from fuseline.compile.capture.hf_model import build_on_meta
from fuseline.compile.capture.reference import RandomModel
from fuseline.compile.capture.repeat import num_distinct_layers
from fuseline.compile.capture.small_config import small_config
from fuseline.compile.check import MAX_ERROR, allowed_error, row_errors, serve
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target

LENGTHS = (57, 30, 11)
MAX_ROWS = 64
FEW_LAYERS = 4
SECONDS = 90


def small_default(model_type: str) -> PreTrainedConfig:
    """The type's default config, made small. Raises whatever Transformers raises."""
    config = CONFIG_MAPPING[model_type]()
    try:
        layers = num_distinct_layers(build_on_meta(config, torch.float32, False))
    except Exception:  # whatever fuseline refuses is told when it is served
        layers = FEW_LAYERS
    return small_config(config, layers)


def try_model(model_type: str, folder: Path, level: int) -> tuple[str, str]:
    """(outcome, detail)."""
    try:
        reference = RandomModel(small_default(model_type), False, seed=5)
        vocab = reference.vocab_size
        sequences = [torch.randint(8, vocab, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
        expected = [reference.logits(tokens) for tokens in sequences]
        reference.save(folder)
    except Exception as error:
        return "none", f"{type(error).__name__}: {error}"
    sizes = {"max_num_batched_tokens": MAX_ROWS, "max_num_seqs": MAX_ROWS}
    config = CompileConfig(str(folder), level=level, cache_dir=str(folder), **sizes)
    try:
        model = compile_model(config, detect_target())
        found = serve(model, sequences, config.block_size)
    except (CaptureError, LoadError) as error:
        return "refused", str(error)
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    errors = [float(row_errors(a, b).max()) for a, b in zip(found, expected, strict=True)]
    worst = max(errors)
    if not worst <= MAX_ERROR and not all(
        error <= allowed_error(reference, *pair) for error, *pair in zip(errors, sequences, expected, strict=True)
    ):
        return "WRONG", f"error {worst:.2g}; {model.verdict}"
    return ("equal" if model.verdict.startswith("checked") else "unchecked"), f"error {worst:.0e}; {model.verdict}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all if none is given")
    parser.add_argument("--part", default="1/1", help="K/N: each N-th model, beginning with the K-th")
    parser.add_argument("--level", type=int, default=1)
    options = parser.parse_args(arguments)
    part, parts = map(int, options.part.split("/"))
    types = options.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[part - 1 :: parts]
    quiet()
    counts = Counter(sweep_one(model_type, options.level) for model_type in types)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    return int(bool(counts["WRONG"] or counts["crash"]))


def quiet() -> None:
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def sweep_one(model_type: str, level: int) -> str:
    """Prints the line of a model; its outcome."""
    started = time.monotonic()
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            outcome, detail = try_model(model_type, Path(folder), level)
    except TimeoutError:
        outcome, detail = "crash", f"not done after {SECONDS} s"
    finally:
        signal.alarm(0)
    seconds = time.monotonic() - started
    print(f"{outcome:<10}{model_type:<28}{seconds:5.1f} s  {' '.join(detail.split())[:300]}", flush=True)
    return outcome


def _stop(signum: int, frame: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    sys.exit(main())
