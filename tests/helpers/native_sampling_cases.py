"""Logits, sampling options, and a reference of the native sampler."""

from __future__ import annotations

import numpy as np
import torch
from native_fixtures import ops

RAW, PROCESSED, RAW_LOGITS, PROCESSED_LOGITS = range(4)

DEFAULTS = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition": 1.0, "frequency": 0.0, "presence": 0.0,
    "seed": 0, "counter": 0, "num_logprobs": -1, "prompt": (), "output": (), "bias": {}, "banned": (), "allowed": (),
}  # fmt: skip


def ragged(lists, dtype):
    starts = torch.tensor([0, *(len(x) for x in lists)]).cumsum(0).to(torch.int32)
    return starts, torch.tensor([v for x in lists for v in x], dtype=dtype)


class Result:
    def __init__(self, logits, rows, bitmask=None, mode=RAW, num_top=8, sample=ops.sample):
        rows = [{**DEFAULTS, **row} for row in rows]
        count = len(rows)
        self.tokens = torch.full((count,), -7)
        self.logprobs, self.ranks = torch.full((count,), float("nan")), torch.full((count,), -7)
        self.top_ids, self.top_logprobs = torch.full((count, num_top), -7), torch.full((count, num_top), float("nan"))
        self.ok = torch.full((count,), 9, dtype=torch.uint8)

        def column(name, dtype):
            return torch.tensor([row[name] for row in rows], dtype=dtype)

        f32, i32 = torch.float32, torch.int32
        floats = [column(n, f32) for n in ("top_p", "min_p", "repetition", "frequency", "presence")]
        history = ragged([(*row["prompt"], *row["output"]) for row in rows], i32)
        bias = ragged([list(row["bias"]) for row in rows], i32)
        sample(
            self.tokens, self.logprobs, self.ranks, self.top_ids, self.top_logprobs, self.ok, logits,
            column("temperature", f32), column("top_k", i32), *floats, column("seed", torch.int64),
            column("counter", torch.int64), column("num_logprobs", i32), *history,
            torch.tensor([len(row["prompt"]) for row in rows], dtype=i32), *bias,
            torch.tensor([v for row in rows for v in row["bias"].values()], dtype=f32),
            *ragged([row["banned"] for row in rows], i32), *ragged([row["allowed"] for row in rows], i32),
            bitmask, mode,
        )  # fmt: skip


def philox(seed, counter) -> float:
    """Philox4x32-10 in Python integers -> the first 53 bits as [0, 1)."""
    mask = 0xFFFFFFFF
    c, k0, k1 = [counter & mask, counter >> 32 & mask, 0, 0], seed & mask, seed >> 32 & mask
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & mask, (a >> 32) ^ c[3] ^ k1, a & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return ((c[0] >> 5) * 2**26 + (c[1] >> 6)) / 2**53


def process(x, row, allowed_bits=None) -> np.ndarray:
    """Raw logits -> logits after masks, bias and penalties (SPEC 6.1, 3 to 5)."""
    row = {**DEFAULTS, **row}
    z = x.astype(np.float32).copy()
    hidden = np.zeros(len(z), bool)
    if len(row["allowed"]):
        hidden[:] = True
        hidden[list(row["allowed"])] = False
    hidden[list(row["banned"])] = True
    if allowed_bits is not None:
        hidden |= ~allowed_bits
    z[hidden] = -np.inf
    for token, value in row["bias"].items():
        z[token] += np.float32(value)
    seen, r = set(row["prompt"]) | set(row["output"]), np.float32(row["repetition"])
    for token in seen:
        z[token] = z[token] / r if z[token] > 0 else z[token] * r
    for token in set(row["output"]):
        z[token] -= np.float32(row["frequency"]) * np.float32(list(row["output"]).count(token))
        z[token] -= np.float32(row["presence"])
    return z


def truncate(z, row) -> np.ndarray:
    """Which tokens stay after min_p, top_k and top_p (SPEC 6.1, 8 to 10)."""
    row = {**DEFAULTS, **row}
    kept = np.isfinite(z)
    prob = np.exp(z.astype(np.float64) - z.max())
    if row["min_p"] > 0:
        kept &= prob >= row["min_p"]
    if 0 < row["top_k"] < len(z):
        kept &= z >= np.sort(z)[-row["top_k"]]
    if row["top_p"] < 1:
        order = [i for i in np.argsort(-z, kind="stable") if kept[i]]
        total = np.cumsum(prob[order])
        size = int(np.searchsorted(total, row["top_p"] * total[-1])) + 1
        kept[order[size:]] = False
    return kept


def pick(z, row) -> int:
    row = {**DEFAULTS, **row}
    if row["temperature"] == 0:
        return int(np.argmax(z))
    z = z / np.float32(row["temperature"])
    kept = truncate(z, row)
    mass = np.where(kept, np.exp(z.astype(np.float64) - z.max()), 0.0).cumsum()
    return int(np.searchsorted(mass, philox(row["seed"], row["counter"]) * mass[-1], side="right"))


def log_softmax(z) -> np.ndarray:
    z = z.astype(np.float64)
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def make_logits(rows, vocab, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows * 1000 + vocab)) * scale


OPTIONS = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 7, "temperature": 1.7},
    {"top_k": 10**6},
    {"top_p": 0.5},
    {"top_p": 0.97, "temperature": 2.0},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.02, "top_k": 40, "top_p": 0.9, "temperature": 1.5},
    {"allowed": (3, 17, 40, 41), "temperature": 3.0},
    {"allowed": (3, 17, 40), "banned": (17,)},
    {"banned": range(0, 500, 2)},
    {"bias": {5: 12.0, 9: 11.5, 30: -100.0}},
    {"banned": (5,), "bias": {5: 100.0}},
    {"repetition": 1.4, "prompt": (1, 2, 3, 4), "output": (5, 6, 7, 5)},
    {"frequency": 1.5, "presence": 0.7, "prompt": (1, 2), "output": (7, 7, 7, 9)},
    {"repetition": 0.6, "frequency": -0.5, "presence": -1.0, "prompt": (10, 600), "output": (0, 10)},
    {"temperature": 0.0, "repetition": 1.9, "prompt": range(300)},
    {"temperature": 0.0, "top_k": 3, "banned": range(250, 650)},
]
