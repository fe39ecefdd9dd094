"""Tokenizers of checkpoints without a tokenizer.json: Mistral's tekken.json, or a model of SentencePiece alone.

Part of the process that imports Transformers (auto_tokenizer).
"""

from __future__ import annotations

import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TEKKEN, MODEL, PARAMS = "tekken.json", "tokenizer.model", "params.json"
VERSIONED = re.compile(r"tokenizer\.model\.v(\d+)")
"""Name of Mistral's model of SentencePiece."""


def load_other(folder: Path) -> Any | None:
    """A tokenizer of Transformers; None for a folder that AutoTokenizer reads. Raises ImportError, ValueError."""
    if (folder / TEKKEN).is_file():
        return _tekken(folder / TEKKEN)
    path = folder / MODEL
    if not path.is_file():
        found = ((VERSIONED.fullmatch(other.name), other) for other in folder.glob(f"{MODEL}.v*"))
        versions = {int(match[1]): other for match, other in found if match}
        if not versions:
            return None
        path = versions[max(versions)]
    with open(path, "rb") as file:
        is_sentencepiece = file.read(1) == b"\n"  # else it is a list of tokens, as of tiktoken
    if is_sentencepiece and (missing := [name for name in ("sentencepiece", "google.protobuf") if not _is_there(name)]):
        package = missing[0].replace("google.", "")
        raise ImportError(f"{path.name} needs the package {package}: pip install 'fuseline[sentencepiece]'")
    is_mistral = (folder / PARAMS).is_file() and not (folder / "config.json").is_file()
    if path.name == MODEL and not is_mistral:
        return None
    return _with_bos(_sentencepiece(path))


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _tekken(path: Path) -> Any:
    """The tokenizer of a tekken.json; prompts begin with <s>, as those that mistral_common encodes."""
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    try:
        return _with_bos(convert_tekken_tokenizer(str(path)))
    except ImportError as error:
        raise ImportError(f"{path.name} of this version needs mistral_common: pip install mistral-common") from error
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is damaged ({type(error).__name__} {error}): get the file again") from error


def _sentencepiece(path: Path) -> Any:
    """AutoTokenizer knows one name of the file, so it gets a folder with that."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / MODEL)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _with_bos(tokenizer: Any) -> Any:
    """The tokenizer, which puts its BOS before a text from now on."""
    from tokenizers import processors

    backend, bos = tokenizer.backend_tokenizer, tokenizer.bos_token
    if bos is not None:
        template = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A $B", [(bos, tokenizer.bos_token_id)])
        own = backend.post_processor
        backend.post_processor = processors.Sequence([own, template]) if own is not None else template
    return tokenizer
