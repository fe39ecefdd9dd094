"""What quantizing loses, layer by layer: of the weights, and of the outputs on a few texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from fuseline.compile.capture.errors import CaptureError, told_as
from fuseline.compile.capture.hf_classes import auto_class
from fuseline.compile.capture.hf_model import load_config
from fuseline.compile.capture.weight_names import resolve
from fuseline.compile.checkpoint_writer.plan import QuantizePlan
from fuseline.compile.config import CompileConfig, Progress, silent
from fuseline.compile.formats.encode import encode
from fuseline.compile.ops.coded import Layout, dequantize

TEXTS = (
    "The capital of France is Paris, which lies on the Seine. About two million people live there.",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2\n\nprint(area(2.0))",
    "Question: A train leaves at 9:40 and arrives at 12:05. How long is the journey?\nAnswer: 2 hours and 25 minutes.",
    "Water boils at 100 degrees Celsius at sea level; the higher the place, the lower the temperature.",
)
MAX_TOKENS = 512


@dataclass(frozen=True)
class LayerError:
    """Norms of the difference by the norm of what is plain."""

    name: str
    layout: Layout
    weight: float
    output: float


def measure(plan: QuantizePlan, progress: Progress = silent, texts: Sequence[str] = TEXTS) -> list[LayerError]:
    """Worst outputs first. Runs the plain model once, in memory, by Transformers. Raises CaptureError."""
    with told_as(CaptureError, f"{plan.folder} cannot be measured"):
        tokenizer = AutoTokenizer.from_pretrained(plan.folder)
        auto = auto_class(load_config(CompileConfig(str(plan.folder))))
        model = auto.from_pretrained(plan.folder, dtype="auto").eval()
        rows = [tokenizer(text, return_tensors="pt").input_ids[:, :MAX_TOKENS] for text in texts]
        ids = torch.cat(rows, 1)[:, :MAX_TOKENS]
    direct, _ = resolve(plan.stored, model)
    modules = {tensor.name: model.get_submodule(name.rpartition(".")[0]) for name, tensor in direct.items()}
    found: list[LayerError] = []
    for name, layout in plan.layouts.items():
        module = modules.get(name)
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(partial(_compare, found, name, layout, (progress, len(plan.layouts))))
    with torch.no_grad():
        model(ids, use_cache=False)
    return sorted(found, key=lambda error: -error.output)


def _compare(
    found: list[LayerError], name: str, layout: Layout, told: tuple[Progress, int], module: nn.Linear, args: tuple
) -> None:
    weight = module.weight.float()
    lost = dequantize(encode(weight, layout), layout) - weight
    x = args[0].float().flatten(0, -2)
    found.append(LayerError(name, layout, _share(lost, weight), _share(x @ lost.T, x @ weight.T)))
    told[0]("measuring", len(found), told[1])


def _share(part: Tensor, whole: Tensor) -> float:
    return (part.norm() / whole.norm().clamp(min=1e-30)).item()


def table(errors: Sequence[LayerError]) -> str:
    """One line a layer, and the mean of all."""
    width = max(len(error.name) for error in errors)
    lines = [f"{'layer':<{width}}  {'layout':<18}  {'weight':>8}  {'output':>8}"]
    lines += [
        f"{error.name:<{width}}  {error.layout!s:<18}  {error.weight:>8.3%}  {error.output:>8.3%}" for error in errors
    ]
    weight, output = (sum(values) / len(errors) for values in zip(*((e.weight, e.output) for e in errors), strict=True))
    return "\n".join([*lines, f"{'mean':<{width}}  {'':<18}  {weight:>8.3%}  {output:>8.3%}"])
