"""Workloads: prompts and lengths of one run, reproducible from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

WORDS = (
    "the of and to in is that it was for on are with as they at be this have from or one had by word but not what all "
    "were we when your can said there use an each which she do how their if will up other about out many then them "
    "these so some her would make like him into time has look two more write go see number no way could people my "
    "than first water been call who oil its now find long down day did get come made may part over new sound take "
    "only little work know place year live me back give most very after thing our just name good sentence man think"
).split()
POOL_WORDS = 4096
MAX_PROMPTS = 1_000_000
MAX_TOKENS = 1_000_000
CHAT_SPREAD = 0.8
"""Sigma of the log-normal lengths of `chat`: many short turns, some long ones, as in logs of public chat services."""


@dataclass(frozen=True)
class WorkloadConfig:
    """Lengths are in tokens."""

    dataset: str = "random"
    num_prompts: int = 100
    input_len: int = 512
    output_len: int = 128
    prefix_len: int = 256
    range_ratio: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Vocabulary:
    """Source of random prompts: token ids when the server told them, and the tokens that a word costs."""

    token_ids: tuple[int, ...] = ()
    tokens_per_word: float = 1.0


@dataclass(frozen=True)
class Sample:
    """One request: its prompt as text or token ids, and how many tokens to generate."""

    prompt: str | tuple[int, ...]
    input_len: int
    output_len: int


def pool_text(seed: int) -> str:
    """Text whose tokens are the ones prompts are made of."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(POOL_WORDS))


def make_samples(config: WorkloadConfig, vocabulary: Vocabulary, wants_ids: bool) -> list[Sample]:
    """The requests of a run. `wants_ids`: prompts are token ids (exact lengths), else text (lengths nearly right)."""
    rng = random.Random(config.seed)
    use_ids = wants_ids and bool(vocabulary.token_ids)
    prefix = _prompt(rng, config.prefix_len, vocabulary, use_ids) if config.dataset == "shared-prefix" else None
    samples = []
    for _ in range(config.num_prompts):
        input_len, output_len = _lengths(rng, config)
        prompt = _prompt(rng, input_len, vocabulary, use_ids)
        if prefix is not None:
            prompt = prefix + prompt if use_ids else f"{prefix} {prompt}"
            input_len += config.prefix_len
        samples.append(Sample(prompt, input_len, output_len))
    return samples


def _lengths(rng: random.Random, config: WorkloadConfig) -> tuple[int, int]:
    if config.dataset == "chat":
        return _log_normal(rng, config.input_len), _log_normal(rng, config.output_len)
    return _uniform(rng, config.input_len, config.range_ratio), _uniform(rng, config.output_len, config.range_ratio)


def _log_normal(rng: random.Random, median: int) -> int:
    return max(4, min(8 * median, round(rng.lognormvariate(math.log(median), CHAT_SPREAD))))


def _uniform(rng: random.Random, length: int, ratio: float) -> int:
    spread = int(length * ratio)
    return max(1, rng.randint(length - spread, length + spread))


def _prompt(rng: random.Random, length: int, vocabulary: Vocabulary, use_ids: bool) -> str | tuple[int, ...]:
    if use_ids:
        return tuple(rng.choices(vocabulary.token_ids, k=length))
    return " ".join(rng.choices(WORDS, k=max(1, round(length / vocabulary.tokens_per_word))))


def arrival_times(num: int, rate: float, burstiness: float, seed: int) -> Sequence[float]:
    """Seconds after the start at which requests are sent: all at 0 for an infinite rate, else gamma-spaced.

    burstiness 1 is a Poisson process; smaller is burstier.
    """
    if math.isinf(rate):
        return [0.0] * num
    rng, now, times = random.Random(seed), 0.0, []
    for _ in range(num):
        times.append(now)
        now += rng.gammavariate(burstiness, 1.0 / (rate * burstiness))
    return times
