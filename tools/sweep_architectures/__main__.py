"""Every causal language model of the installed Transformers, made small, served and compared with Transformers.

    python3 tools/sweep_architectures --page            # all, and writes docs/MODELS.md
    python3 tools/sweep_architectures llama phimoe      # these
    python3 tools/sweep_architectures --part 1/4        # a quarter of them
    python3 tools/sweep_architectures --results FILE    # keeps results there; what it holds already is not tried again

One line an architecture: equal, refused (in one line of words), WRONG (served without complaint, other tokens or
logits), crash (an error that is not in words, or the end of its process), or none (Transformers itself has no small
model of it). Exit status 1 if there is a WRONG or a crash.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

# Python puts this folder here; modules of it are imported by their package's name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from sweep_architectures.architectures import all_types  # noqa: E402
from sweep_architectures.page import PAGE, page  # noqa: E402
from sweep_architectures.processes import Limits, run_all  # noqa: E402
from sweep_architectures.results import UNTRIED, Result, append, read  # noqa: E402
from sweep_architectures.trial import quiet, try_model  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all if none is given")
    parser.add_argument("--part", default="1/1", help="K/N: each N-th model, beginning with the K-th")
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--seconds", type=int, default=100, help="limit of one architecture, in CPU time")
    parser.add_argument("--gib", type=float, default=8, help="limit of one architecture's memory")
    parser.add_argument("--results", type=Path, help="file of results, one a line, that is read and added to")
    parser.add_argument("--page", action="store_true", help="write docs/MODELS.md")
    options = parser.parse_args(arguments)
    quiet()
    results = sweep(options)
    counts = Counter(result.kind for result in results.values())
    print(", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    if options.page:
        missing = Result("", "none", UNTRIED)
        PAGE.write_text(page([results.get(name) or replace(missing, model_type=name) for name in all_types()]))
        print(f"wrote {PAGE}")
    return int(bool(counts["WRONG"] or counts["crash"]))


def sweep(options: argparse.Namespace) -> dict[str, Result]:
    """Tries what has no result yet and prints its line; all results by type."""
    part, parts = map(int, options.part.split("/"))
    types = options.types or all_types()[part - 1 :: parts]
    known = read(options.results) if options.results else {}
    limits = Limits(options.jobs, options.seconds, int(options.gib * 2**30))
    with tempfile.TemporaryDirectory() as folder:
        for result in run_all(try_model, [t for t in types if t not in known], Path(folder), options.level, limits):
            known[result.model_type] = result
            print(result.line(), flush=True)
            if options.results:
                append(options.results, result)
    return known


if __name__ == "__main__":
    sys.exit(main())
