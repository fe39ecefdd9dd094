"""A model as Transformers runs it, of random weights: what a captured graph is compared with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.hf_classes import build_model
from fuseline.compile.capture.lazy_tensor import LazyTensor

GAIN = 1.6
"""Standard deviation of a product of a random matrix and values of deviation 1: enough for attention with peaks."""
SPREAD = 0.25
"""Standard deviation of biases, and of norms' weights around 1."""
DERIVED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
"""Ends of names of stored buffers that hang together: they keep their values."""
ATTENTION = {"falcon": "sdpa"}
"""Kind of attention, by model type, in place of eager: Falcon's eager one adds ALiBi's bias twice."""
NUDGE = 2.0**-22
"""Relative change of a weight: about what rounding does to a float32 sum."""


class RandomModel:
    """The model in float32 with eager attention, no parameter zero or one; also the source of the same weights.

    Raises whatever Transformers raises for a config that it cannot build.
    """

    origin = "random weights"

    def __init__(self, hf_config: PreTrainedConfig, trust_remote_code: bool, seed: int = 0) -> None:
        kind = ATTENTION.get(getattr(hf_config, "model_type", ""), "eager")
        settings = {"attn_implementation": kind, "dtype": torch.float32}
        with torch.random.fork_rng(devices=()), torch.no_grad():
            torch.manual_seed(seed)
            self._model = build_model(copy.deepcopy(hf_config), trust_remote_code, **settings).float().eval()
            with_eager_experts(self._model)
            randomize(self._model)
        self._values = {name: value.detach() for name, value in self._model.state_dict().items()}

    @torch.no_grad()
    def logits(self, token_ids: Tensor) -> Tensor:
        """[T] token ids of one sequence -> [T, V] logits, all tokens computed at once and without a cache."""
        return self._model(input_ids=token_ids[None], use_cache=False).logits[0].float()

    @torch.no_grad()
    def nudged_logits(self, token_ids: Tensor) -> Tensor:
        """`logits` with every weight off by rounding: the difference tells how far rounding spreads in this model."""
        kept = {name: parameter.clone() for name, parameter in self._model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        try:
            for parameter in self._model.parameters():
                parameter.mul_(1 + NUDGE * torch.randn(parameter.shape, generator=generator))
            return self.logits(token_ids)
        finally:
            for name, parameter in self._model.named_parameters():
                parameter.copy_(kept[name])

    @torch.no_grad()
    def generate(self, prompt: Sequence[int], num_tokens: int, use_cache: bool = True) -> list[int]:
        """Greedy tokens behind a prompt, with Transformers' own cache or without."""
        self._model.generation_config = GenerationConfig()  # no token ends a text, or is forced
        settings = {"do_sample": False, "max_new_tokens": num_tokens, "use_cache": use_cache}
        found = self._model.generate(torch.tensor([list(prompt)]), **settings)
        return found[0, len(prompt) :].tolist()

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        """Rounds every parameter to numbers that `dtype` holds; they stay float32."""
        for parameter in self._model.parameters():
            parameter.copy_(parameter.to(dtype))

    @property
    def vocab_size(self) -> int:
        return self._model.config.get_text_config().vocab_size

    def save(self, folder: Path) -> None:
        """As a checkpoint."""
        self._model.save_pretrained(folder)

    def find(self, name: str) -> LazyTensor | None:
        """The parameter or stored buffer `name`."""
        value = self._values.get(name)
        return None if value is None else lazy_tensor.computed(value)

    def remember(self) -> None:
        """Nothing was looked for."""


def with_eager_experts(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with experts that take any width: those of Transformers' default want multiples of 16 bytes."""
    if any(hasattr(module, "_apply_gate") for module in model.modules()):
        model.set_experts_implementation("eager")
    return model


def randomize(model: nn.Module) -> None:
    """Gives every parameter and every stored buffer of floats a value of its own, from torch's random stream."""
    for name, parameter in model.named_parameters():
        parameter.copy_(_random(name, parameter))
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point() and not name.endswith(DERIVED):
            buffer.add_(torch.rand_like(buffer) * SPREAD)


def _random(name: str, like: Tensor) -> Tensor:
    values = torch.randn_like(like)
    if like.dim() > 1:
        return values * GAIN / like.shape[-1] ** 0.5
    return values * SPREAD if name.endswith("bias") else 1 + values * SPREAD
