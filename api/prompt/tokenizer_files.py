"""A checkpoint's tokenizer as `AutoTokenizer` resolves its files, read without Transformers once it is cached.

Which class a checkpoint has, what its defaults are and which files win is the knowledge of Transformers. Importing that
takes seconds and hundreds of MiB, so a process of its own does it, once for each state of the files.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import msgspec

from fuseline.api.config import ConfigError
from fuseline.compile.cache.files import CacheError, read_file, write_file
from fuseline.compile.target import default_cache_dir

LOG = logging.getLogger("fuseline.prompts")
SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".py", ".vocab", ".bpe"}
"""Suffixes of the files that a tokenizer can be made of."""
SECONDS = 600
"""Within which Transformers must have read them."""
CHILD = "fuseline.api.prompt.auto_tokenizer"


class TokenizerFiles(msgspec.Struct, frozen=True):
    """Facts of a tokenizer, resolved from all its files."""

    backend: str
    """tokenizer.json of the tokenizer that Transformers would run, without truncation and padding."""
    special_tokens: dict[str, str]
    """bos_token, eos_token, ... -> text."""
    eos_id: int | None = None
    chat_template: str | dict[str, str] | None = None
    """The checkpoint's own template, or several by name."""
    control_tokens: tuple[str, ...] | None = None
    """Tokens that only a template may write, where tokenizer_config.json lists them (chat_control_tokens)."""
    cleans_up: bool = False
    """Decoded text loses the blanks before punctuation (clean_up_tokenization_spaces)."""
    splits_special: bool = False
    """Special tokens in a text are text (split_special_tokens)."""


def read_tokenizer(folder: str, cache_dir: str = "", trust_remote_code: bool = False) -> TokenizerFiles:
    """Read the tokenizer of a checkpoint directory. Raises ConfigError when there is none that can be used."""
    path = Path(cache_dir or default_cache_dir()) / "tokenizers" / _key(Path(folder), trust_remote_code)
    try:
        return msgspec.msgpack.decode(read_file(path), type=TokenizerFiles)
    except FileNotFoundError:
        pass
    except (OSError, CacheError, msgspec.DecodeError) as error:
        LOG.warning("cached %s is not used, the tokenizer's files are read again: %s", path, error)
    body = _resolve(folder, trust_remote_code)
    try:
        write_file(path, body)
    except OSError as error:
        LOG.warning("the tokenizer is not cached in %s, so each process reads its files again: %s", path.parent, error)
    return msgspec.msgpack.decode(body, type=TokenizerFiles)


def _resolve(folder: str, trust_remote_code: bool) -> bytes:
    """TokenizerFiles as Transformers finds them, packed."""
    command = [sys.executable, "-P", "-m", CHILD, folder, *(["--trust-remote-code"] if trust_remote_code else [])]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{folder}: reading the tokenizer takes more than {SECONDS} seconds") from error
    if done.returncode == 0:
        return done.stdout
    reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["it ended without a word"])[-1]
    raise ConfigError(
        f"{folder} has no tokenizer that can be read ({reason}); give one with --tokenizer, "
        "or --skip-tokenizer-init for token ids only"
    )


def _key(folder: Path, trust_remote_code: bool) -> str:
    """SHA-256 of all that the result depends on."""
    versions = [version(name) for name in ("transformers", "tokenizers")]
    total = hashlib.sha256(repr((versions, trust_remote_code, TokenizerFiles.__struct_fields__)).encode())
    for path in _files(folder):
        with path.open("rb") as file:
            total.update(repr(str(path.relative_to(folder))).encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    found = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    wanted = (path for path in found if path.suffix in SUFFIXES or path.name.startswith("tokenizer.model."))
    return sorted(path for path in wanted if path.is_file())
