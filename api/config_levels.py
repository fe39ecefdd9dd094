"""--compilation-config: what its keys may hold, and which settings of the compiler they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fuseline.api.config import HIGHEST_LEVEL, ConfigError
from fuseline.compile.config import NEEDED_PASSES, PASSES, GraphConfig

LEVELS = (0, 1, 2, 3)
BACKENDS = ("inductor", "eager")
MODES = {"NONE": 0, "STOCK_TORCH_COMPILE": 1, "DYNAMO_TRACE_ONCE": 2, "VLLM_COMPILE": 3}
"""Names of levels, as values of `mode`."""
GRAPH_MODES = ("NONE", "FULL_DECODE_ONLY", "FULL", "FULL_AND_PIECEWISE")
CUSTOM_OPS = {
    "rms_norm": "find_norm", "rotary_embedding": "find_rope", "silu_and_mul": "fuse_act_mul",
    "fused_moe": "find_moe", "linear": "pack_weights",
}  # fmt: skip
"""Ops that custom_ops can leave as the model spells them, each with the pass that makes it."""


@dataclass(frozen=True)
class LevelKey:
    """One key. `words` says what its value must be, `effect` what it does; empty where it does nothing."""

    is_valid: Callable[[object], bool]
    words: str
    effect: str = ""
    is_gpu_only: bool = False


def _is_level(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in LEVELS


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sizes(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_count(item) and item for item in value)


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _is_switches(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(on, bool) for on in value.values())


KEYS: dict[str, LevelKey] = {
    "level": LevelKey(_is_level, "is 0, 1, 2 or 3", "the level; 2 when it is left out"),
    "backend": LevelKey(lambda value: value in BACKENDS, "is inductor or eager", "eager compiles no regions"),
    "cache_dir": LevelKey(lambda value: isinstance(value, str), "is a directory", "as --cache-dir"),
    "compile_sizes": LevelKey(
        lambda value: value in ([], ()), "can only be an empty list (one plan serves every size)", "none may be given"
    ),
    "cudagraph_capture_sizes": LevelKey(
        _is_sizes, "is a list of numbers above 0", "on a GPU: sequences of the decode steps that are captured", True
    ),
    "cudagraph_mode": LevelKey(
        lambda value: value in GRAPH_MODES, f"is one of {', '.join(GRAPH_MODES)}",
        "on a GPU: which steps are captured; the last is the default", True,
    ),
    "max_cudagraph_capture_size": LevelKey(
        lambda value: _is_count(value) and value > 0, "is a number above 0",
        "on a GPU: captures no step of more sequences", True,
    ),
    "cudagraph_num_of_warmups": LevelKey(
        _is_count, "is a number, 0 or more", "on a GPU: runs before each capture, one at least", True
    ),
    "custom_ops": LevelKey(
        _is_names, "is a list of all, none, +NAME and -NAME",
        f"which ops are ours and which stay as the model spells them: {', '.join(sorted(CUSTOM_OPS))}",
    ),
    "pass_config": LevelKey(_is_switches, "maps names of passes to true or false", "false leaves a pass out"),
    "splitting_ops": LevelKey(
        _is_names, "is a list of names", "ops beside attention at which a GPU's graphs of mixed steps end",
        is_gpu_only=True,
    ),
    "use_inductor": LevelKey(lambda value: isinstance(value, bool), "is true or false", "false compiles no regions"),
}  # fmt: skip
"""By name. null stands for a key's default, but for that of the level."""


def explicit_levels(given: Mapping[str, object]) -> dict[str, object]:
    """The keys with the level among them, first. `mode` is another name of it. Raises ConfigError."""
    keys = dict(given)
    if "mode" in keys:
        mode = keys.pop("mode")
        level = MODES.get(mode.upper(), mode) if isinstance(mode, str) else mode
        if keys.setdefault("level", level) != level:
            raise ConfigError(f"compilation_config: mode {mode!r} and level {keys['level']!r} differ; give one")
    return {"level": keys.get("level", 2), **keys}


def check_levels(levels: Mapping[str, object]) -> None:
    """Raises ConfigError of one line that names the key and what it may be."""
    if unknown := sorted(set(levels) - set(KEYS)):
        raise ConfigError(f"compilation_config: unknown key {unknown[0]!r} (keys: {', '.join(sorted(KEYS))})")
    if not _is_level(levels.get("level")):
        raise ConfigError(f"compilation_config: there is no level {levels.get('level')!r} (levels: 0, 1, 2, 3)")
    for name, key in KEYS.items():
        value = levels.get(name)
        if value is not None and not key.is_valid(value):
            raise ConfigError(f"compilation_config: {name} {key.words}, not {value!r}")
    switches = levels.get("pass_config") or {}
    check_passes("compilation_config: pass_config", switches, _off(switches))
    plain_ops(levels.get("custom_ops") or ())


def check_passes(setting: str, names: object, off: object) -> None:
    """Raises ConfigError for a name that is no pass, or a pass in `off` that nothing can be served without."""
    if unknown := sorted(set(names) - set(PASSES)):
        raise ConfigError(f"{setting}: there is no pass {unknown[0]!r} (passes: {', '.join(sorted(PASSES))})")
    if needed := sorted(set(off) & NEEDED_PASSES):
        raise ConfigError(f"{setting}: {needed[0]} cannot be left out: nothing can be served without it")


def plain_ops(custom_ops: object) -> list[str]:
    """Ops that the list turns off. `all` is the default; +NAME and -NAME win over `none` and `all`."""
    if {"all", "none"} <= set(custom_ops):
        raise ConfigError("compilation_config: custom_ops has both all and none; give one")
    enabled = dict.fromkeys(CUSTOM_OPS, "none" not in custom_ops)
    for item in custom_ops:
        if item in ("all", "none"):
            continue
        if item[:1] not in ("+", "-") or item[1:] not in CUSTOM_OPS:
            names = ", ".join(sorted(CUSTOM_OPS))
            raise ConfigError(f"compilation_config: custom_ops has {item!r} (all, none, or + or - before: {names})")
        enabled[item[1:]] = item[0] == "+"
    return [name for name, is_on in enabled.items() if not is_on]


def level_values(levels: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """Settings of the compiler by field name. Raises ConfigError."""
    check_levels(levels)
    disabled = given.get("disabled_passes", ())
    check_passes("--disabled-passes", disabled, disabled)
    off = _off(levels.get("pass_config") or {}) + [CUSTOM_OPS[op] for op in plain_ops(levels.get("custom_ops") or ())]
    is_eager = levels.get("use_inductor") is False or levels.get("backend") == "eager" or given.get("enforce_eager")
    values: dict[str, object] = {
        "level": min(int(levels["level"]), 1 if is_eager else HIGHEST_LEVEL),
        "disabled_passes": tuple(dict.fromkeys((*disabled, *off))),
    }
    if levels.get("cache_dir"):
        values["cache_dir"] = levels["cache_dir"]
    return values


def graph_config(levels: Mapping[str, object], given: Mapping[str, object]) -> GraphConfig:
    """The graphs that a GPU captures."""
    sizes, most = levels.get("cudagraph_capture_sizes") or (), levels.get("max_cudagraph_capture_size")
    mode = levels.get("cudagraph_mode")
    return GraphConfig(
        sizes=tuple(sizes),
        enabled=not given.get("enforce_eager") and mode != "NONE",
        max_size=int(most or 0),
        mixed_sizes=() if mode == "FULL_DECODE_ONLY" else None,
        is_mixed_whole=mode == "FULL",
        max_seq_len=int(given.get("max_seq_len_to_capture", GraphConfig.max_seq_len)),
        num_warmups=max(1, int(levels.get("cudagraph_num_of_warmups") or 0)),
        splitting_ops=tuple(levels.get("splitting_ops") or ()),
    )


def without_effect(levels: Mapping[str, object], kind: str) -> list[str]:
    """Keys that were given and do nothing on this kind of machine."""

    def has_effect(key: LevelKey) -> bool:
        return bool(key.effect) and (kind == "cuda" or not key.is_gpu_only)

    return sorted(name for name, value in levels.items() if value is not None and not has_effect(KEYS[name]))


def _off(switches: Mapping[str, bool]) -> list[str]:
    return [name for name, is_on in switches.items() if not is_on]
