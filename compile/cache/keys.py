"""Names of cache files: SHA-256 of everything their contents depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fuseline.compile
from fuseline import _C
from fuseline.compile.config import CompileConfig
from fuseline.compile.stored_config import config_path
from fuseline.compile.target import CPU, Target

MAX_HEADER = 100 << 20
"""Bytes of a safetensors file's header, at most."""
SOURCES = Path(fuseline.compile.__file__).parent
WITHOUT_EFFECT = {
    "model": "", "hf_config_path": "", "cache_dir": "", "load_format": "auto", "seed": 0, "cpu_threads": 0,
    "model_loader_extra_config": (), "wait_compiled": False, "cpu_offload_gb": 0.0, "calculate_kv_scales": False,
    "ignore_patterns": (),
}  # fmt: skip
"""Settings that do not change a graph."""


def cache_key(config: CompileConfig) -> str | None:
    """SHA-256 of everything the captured graph depends on; None if config.json cannot be read."""
    settings = (config.hf_overrides, config.rope_scaling, config.rope_theta, config.dtype, config.trust_remote_code)
    return _key(config, settings, [path for folder in ("capture", "ops") for path in (SOURCES / folder).glob("*.py")])


def optimized_key(config: CompileConfig, target: Target = CPU) -> str | None:
    """Key of the graph after all passes; it also depends on every source of the compiler."""
    known = replace(config, **WITHOUT_EFFECT, level=min(config.level, 1))  # higher levels run the passes of level 1
    settings = (_C.cpu_isa(), target.kind, sorted(asdict(known).items()), _headers_of_quantized(config))
    return _key(config, settings, list(SOURCES.rglob("*.py")))


def _headers_of_quantized(config: CompileConfig) -> str:
    """SHA-256 of what a quantized checkpoint stores: its graph names the layout of each weight. Else empty."""
    folder, own_path = Path(config.model), config_path(config.config_dir, config.config_format)
    try:
        own = own_path.read_bytes()
        others = [*folder.glob("*quant*_config.json"), *folder.glob("gguf.json")]
        beside = b"".join(path.read_bytes() for path in sorted(others))
        if b"config_groups" not in own and b"quant_method" not in own and not beside and not config.quantization:
            return ""
        headers = map(_header, sorted(folder.glob("*.safetensors")))
        return hashlib.sha256(b"".join((beside, *headers))).hexdigest()
    except OSError:
        return ""


def _header(path: Path) -> bytes:
    with open(path, "rb") as file:
        return path.name.encode() + file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER))


def sources_key() -> str:
    """SHA-256 of the compiler's sources and of the versions it runs with."""
    sources = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sorted(SOURCES.rglob("*.py")))
    return hashlib.sha256(sources + _versions()).hexdigest()


def _versions() -> bytes:
    return repr([version_of(name) for name in ("torch", "transformers", "fuseline")]).encode()


def _key(config: CompileConfig, settings: object, sources: list[Path]) -> str | None:
    folder = Path(config.config_dir)
    code = sorted(folder.glob("*.py")) if config.trust_remote_code else []
    try:
        own = config_path(folder, config.config_format).read_bytes()
    except OSError:
        return None
    if config.trust_remote_code and _is_code_elsewhere(own):
        return None
    parts = [own, repr((settings, [path.name for path in code])).encode(), _versions()]
    parts += [path.read_bytes() for path in [*code, *sorted(sources)]]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _is_code_elsewhere(own: bytes) -> bool:
    """Whether a config.json names Python code of another repository (repository--file.Class), which may change."""
    try:
        brought = json.loads(own)["auto_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return any("--" in str(name) for name in brought)


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # fuseline run from a source tree
        return ""
