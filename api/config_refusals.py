"""Refusals that need more than the flag itself: each gives cause and cure in one line."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping

from fuseline.api.config import ConfigError
from fuseline.compile.load_format import missing_package, wrong_extra

Given = Mapping[str, object]
DEVICE_OF = {"neuron_quant": "a Neuron device"}
TRACED = ("model", "worker", "all")
KV_ROLES = ("kv_producer", "kv_consumer", "kv_both")
KV_CONNECTORS = (
    "SharedStorageConnector", "LMCacheConnectorV1", "NixlConnector", "P2pNcclConnector", "MultiConnector",
    "OffloadingConnector", "PyNcclConnector", "MooncakeConnector",
)  # fmt: skip


def refuse_combination(name: str, value: object, given: Given) -> None:
    """Raises ConfigError when flag `name` cannot have this value beside the others."""
    rule = RULES.get(name)
    if rule and (reason := rule(value, given)):
        raise ConfigError(f"--{name.replace('_', '-')} {_shown(value)}: {reason}")


def _shown(value: object) -> str:
    return str(dict(value)) if isinstance(value, tuple) else "" if value is True else str(value)


def _executor(value: object, given: Given) -> str:
    return "ray is not installed (pip install ray); one device needs none: use mp or uni" if value == "ray" else ""


def _nsight(value: object, given: Given) -> str:
    return "needs --distributed-executor-backend ray" if value else ""


def _quantization(value: object, given: Given) -> str:
    needed = DEVICE_OF.get(str(value))
    return f"needs {needed}, which this machine has not; leave it out" if needed else ""


def _num_drafts(value: object, given: Given) -> str:
    return "" if given.get("speculative_model") else "needs --speculative-model"


def _ngram(value: object, given: Given) -> str:
    most = given.get("ngram_prompt_lookup_max")
    return f"is above --ngram-prompt-lookup-max {most}" if most is not None and int(value) > int(most) else ""


def _qlora(value: object, given: Given) -> str:
    pair = (given.get("load_format"), given.get("quantization"))
    return "" if pair == ("bitsandbytes",) * 2 else "needs --load-format bitsandbytes and --quantization bitsandbytes"


def _prompt_adapter(value: object, given: Given) -> str:
    return "needs --max-prompt-adapter-token of at least 1" if not given.get("max_prompt_adapter_token") else ""


def _cpu_loras(value: object, given: Given) -> str:
    most = int(given.get("max_loras", 1))
    return f"is below --max-loras {most}" if int(value) < most else ""


def _kv_transfer(value: object, given: Given) -> str:
    config = dict(value)
    connector, role = config.get("kv_connector"), config.get("kv_role")
    if connector is not None and connector not in KV_CONNECTORS:
        return f"there is no connector {connector!r} (connectors: {', '.join(KV_CONNECTORS)})"
    if role not in KV_ROLES:
        return f"a connector needs kv_role, one of {', '.join(KV_ROLES)}"
    return ""


def _detailed_traces(value: object, given: Given) -> str:
    if wrong := [part for part in str(value).split(",") if part.strip() not in TRACED]:
        return f"there is no module {wrong[0]!r} (modules: {', '.join(TRACED)})"
    return "" if given.get("otlp_traces_endpoint") else "needs --otlp-traces-endpoint"


def _importable(value: object, given: Given) -> str:
    if value == "auto":
        return ""
    module, _, name = str(value).rpartition(".")
    try:
        getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the operator's module does
        return f"cannot be imported ({' '.join(str(error).split())}); give module.Class"
    return ""


def _scheduler(value: object, given: Given) -> str:
    if reason := _importable(value, given):
        return reason
    from fuseline.engine.schedule.scheduler import scheduler_class  # most servers keep the built-in one

    try:
        scheduler_class(str(value))
    except ValueError as error:
        return str(error).partition(f"{value} ")[2]
    return ""


def _loader(value: object, given: Given) -> str:
    return wrong_extra(str(given.get("load_format", "auto")), dict(value))


def _load_format(value: object, given: Given) -> str:
    if value == "bitsandbytes" and given.get("quantization") != "bitsandbytes":
        return "needs --quantization bitsandbytes"
    return missing_package(str(value))


def _version(value: object, given: Given) -> str:
    return "" if re.fullmatch(r"\d+\.\d+(\.\d+)?", str(value)) else "is no version (0.7 or 0.7.3)"


def _folder(value: object, given: Given) -> str:
    return "" if os.path.isdir(str(value)) else "there is no such directory"


def _pool_type(value: object, given: Given) -> str:
    if not given.get("tokenizer_pool_size") or value == "process":
        return ""
    if value == "ray":
        return "ray is not installed; leave the flag out: the pool is of processes"
    return "there is no such kind of pool; leave the flag out: the pool is of processes"


def _code_revision(value: object, given: Given) -> str:
    if not given.get("trust_remote_code") or value == given.get("revision"):
        return ""
    return "the model's code is that of --revision; give the same"


RULES: dict[str, Callable[[object, Given], str]] = {
    "distributed_executor_backend": _executor,
    "ray_workers_use_nsight": _nsight,
    "quantization": _quantization,
    "speculative_model_quantization": _quantization,
    "num_speculative_tokens": _num_drafts,
    "ngram_prompt_lookup_min": _ngram,
    "qlora_adapter_name_or_path": _qlora,
    "enable_prompt_adapter": _prompt_adapter,
    "max_cpu_loras": _cpu_loras,
    "kv_transfer_config": _kv_transfer,
    "collect_detailed_traces": _detailed_traces,
    "scheduler_cls": _scheduler,
    "worker_cls": _importable,
    "model_loader_extra_config": _loader,
    "load_format": _load_format,
    "show_hidden_metrics_for_version": _version,
    "allowed_local_media_path": _folder,
    "tokenizer_pool_type": _pool_type,
    "code_revision": _code_revision,
}
