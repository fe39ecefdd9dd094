"""Prints the TokenizerFiles of a checkpoint directory, packed: `python -m fuseline.api.prompt.auto_tokenizer DIR`.

The only place of the API that imports Transformers.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from fuseline.api.prompt.gguf_tokenizer import gguf_tokenizer
from fuseline.api.prompt.other_tokenizers import load_other
from fuseline.api.prompt.tokenizer_files import TokenizerFiles
from fuseline.compile.gguf.table import is_unpacked


def main() -> int:
    """The exit status; a failure is one line on stderr."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no part of the answer
    try:
        tokenizer = load(options.folder, options.trust_remote_code)
    except Exception as error:  # any reason means the same: there is no tokenizer
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    with out:
        out.write(msgspec.msgpack.encode(describe(tokenizer)))
    return 0


def load(folder: str, trust_remote_code: bool) -> Any:
    """A tokenizer of Transformers that runs on the `tokenizers` library.

    One whose class needs code that is not trusted, or a package that is not here, still has its tokenizer.json.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    if is_unpacked(Path(folder)):
        return gguf_tokenizer(Path(folder))
    has_file = (Path(folder) / "tokenizer.json").is_file()
    if not has_file and (found := load_other(Path(folder))):
        return found
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        if hasattr(found, "backend_tokenizer"):
            return found
        problem = f"{type(found).__name__} has no fast form"
    except Exception as error:  # custom code can raise anything
        if not has_file:
            raise
        problem = f"{type(error).__name__}: {error}"
    if not has_file:
        raise ValueError(problem)
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def describe(tokenizer: Any) -> TokenizerFiles:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    is_bpe = type(backend.model).__name__ == "BPE"
    forces = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    control = getattr(tokenizer, "chat_control_tokens", None)
    return TokenizerFiles(
        backend=backend.to_str(),
        special_tokens={
            name: str(value) for name, value in tokenizer.special_tokens_map.items() if not isinstance(value, list)
        },
        eos_id=tokenizer.eos_token_id,
        chat_template=tokenizer.chat_template,
        control_tokens=None if control is None else tuple(map(str, control)),
        cleans_up=bool(tokenizer.clean_up_tokenization_spaces) and (not is_bpe or forces),
        splits_special=bool(tokenizer.split_special_tokens),
    )


if __name__ == "__main__":
    sys.exit(main())
