"""A checkpoint of compressed-tensors, written tensor by tensor: memory holds one tensor and what fills a file."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.checkpoint import StoredTensor
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.capture.reader import Reader
from fuseline.compile.checkpoint_writer.others import copy_others
from fuseline.compile.checkpoint_writer.plan import QuantizePlan
from fuseline.compile.config import Progress, silent
from fuseline.compile.formats.encode import encode
from fuseline.compile.ops.coded import Coded, Layout

FILE_BYTES = 512 << 20
ENCODED_VALUES = 4 << 20
"""Values that are quantized at a time."""
FORMATS = {"int4": "pack-quantized", "int8": "pack-quantized", "fp8": "float-quantized"}


def write_quantized(plan: QuantizePlan, output: Path, progress: Progress = silent) -> int:
    """Writes the checkpoint to a directory that is not there yet; returns the bytes of its weights. Raises LoadError,
    OSError."""
    if output.exists():
        raise LoadError(f"{output} is there already: give another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    # A directory of half a checkpoint would look like a whole one.
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        copy_others(plan.folder, partial)
        _write_config(plan, partial)
        num_bytes = _write_weights(plan, partial, progress)
        partial.chmod(0o755)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return num_bytes


def _write_config(plan: QuantizePlan, folder: Path) -> None:
    """config.json with what is quantized."""
    config = json.loads((plan.folder / "config.json").read_text())
    config["quantization_config"] = config_of(plan)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def config_of(plan: QuantizePlan) -> dict[str, Any]:
    """The quantization_config. The commonest scheme is that of all linears, others name theirs."""
    counts = Counter(layout.group for layout in plan.layouts.values())
    groups = {}
    for index, (group, _) in enumerate(counts.most_common()):
        names = [name.removesuffix(".weight") for name, layout in plan.layouts.items() if layout.group == group]
        weights = {
            "num_bits": 4 if plan.target == "int4" else 8, "type": "float" if plan.target == "fp8" else "int",
            "strategy": "group" if group else "channel", "symmetric": True, "dynamic": False,
        }  # fmt: skip
        weights |= {"group_size": group} if group else {}
        groups[f"group_{index}"] = {"targets": names if index else ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors", "format": FORMATS[plan.target], "quantization_status": "compressed",
        "config_groups": groups, "ignore": list(plan.ignored),
    }  # fmt: skip


def _write_weights(plan: QuantizePlan, folder: Path, progress: Progress) -> int:
    files: list[Path] = []
    where: dict[str, Path] = {}
    total, held = 0, {}
    for name, tensor in _tensors(plan, progress):
        held[name] = tensor
        total += tensor.nbytes
        if sum(one.nbytes for one in held.values()) >= FILE_BYTES:
            _save(held, folder, files, where)
    if held:
        _save(held, folder, files, where)
    _name_files(folder, files, where, total)
    return total


def _save(held: dict[str, Tensor], folder: Path, files: list[Path], where: dict[str, Path]) -> None:
    path = folder / f"part-{len(files)}.safetensors"
    save_file(held, path, {"format": "pt"})
    files.append(path)
    where |= dict.fromkeys(held, path)
    held.clear()


def _name_files(folder: Path, files: list[Path], where: Mapping[str, Path], total: int) -> None:
    """How many there are is known at the end."""
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    names = {path: f"model-{k + 1:05}-of-{len(files):05}.safetensors" for k, path in enumerate(files)}
    for path, name in names.items():
        path.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[path] for name, path in where.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tensors(plan: QuantizePlan, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    with Reader() as reader:
        for done, (name, stored) in enumerate(plan.stored.items()):
            if name in plan.layouts:
                module = name.removesuffix(".weight")
                for suffix, tensor in published(stored, plan.layouts[name], reader).items():
                    yield module + suffix, tensor
            else:
                yield name, reader.value(lazy_tensor.whole(stored)).contiguous()
            progress("quantizing", done + 1, len(plan.stored))


def published(stored: StoredTensor, layout: Layout, reader: Reader) -> dict[str, Tensor]:
    """The tensors of compressed-tensors for one weight, by suffix."""
    num_out, num_in = stored.meta.shape
    step, lazy, parts = max(1, ENCODED_VALUES // num_in), lazy_tensor.whole(stored), []
    for at in range(0, num_out, step):
        values = reader.value(lazy_tensor.narrow(lazy, 0, at, min(at + step, num_out)))
        parts.append(_packed(encode(values, layout), layout))
    tensors = {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}
    return tensors if layout.kind == "fp8" else tensors | {".weight_shape": torch.tensor([num_out, num_in])}


def _packed(coded: Coded, layout: Layout) -> dict[str, Tensor]:
    scales = coded.scales.contiguous()
    if layout.kind == "fp8":
        return {".weight": coded.codes, ".weight_scale": scales}
    codes = coded.codes if layout.kind == "int4" else (coded.codes.to(torch.int16) + 128).to(torch.uint8)
    per = 32 // layout.bits
    codes = F.pad(codes, (0, -codes.shape[1] % per))
    octets = codes[:, ::2] | codes[:, 1::2] << 4 if layout.kind == "int4" else codes
    return {".weight_packed": octets.contiguous().view(torch.int32), ".weight_scale": scales}
