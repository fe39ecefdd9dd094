"""sample and row_logprobs against a numpy model of SPEC 6; their distribution; a row's independence of its batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from native_fixtures import isa, ops, with_threads
from native_sampling_cases import (
    OPTIONS,
    PROCESSED,
    PROCESSED_LOGITS,
    RAW_LOGITS,
    Result,
    log_softmax,
    make_logits,
    philox,
    pick,
    process,
    truncate,
)

__all__ = ["isa"]


def test_the_philox_of_the_model_is_the_published_one():
    first_words = 0x6627E8D5, 0xE169C58D  # Random123's known answer for key 0, counter 0
    assert philox(0, 0) == ((first_words[0] >> 5) * 2**26 + (first_words[1] >> 6)) / 2**53


@pytest.mark.parametrize("vocab", (1, 5, 63, 64, 65, 1000, 5003))
def test_greedy_is_the_first_of_the_greatest(isa, vocab):
    logits = make_logits(6, vocab)
    logits[1] = logits[1].round()
    logits[2], logits[3] = 0.0, -1e30
    logits[4, : vocab - 1] = float("-inf")
    result = Result(logits, [{"temperature": 0.0}] * 6)
    assert result.tokens.tolist() == [int(np.argmax(row)) for row in logits.numpy()]
    assert result.ok.tolist() == [1] * 6


@pytest.mark.parametrize("vocab", (700, 3001))
def test_each_step_matches_the_model(isa, vocab):
    rows = [{**option, "seed": 17 * s - 5, "counter": s} for option in OPTIONS for s in range(12)]
    logits = make_logits(len(rows), vocab)
    before = logits.clone()
    result = Result(logits, rows)
    want = [pick(process(x, row), row) for x, row in zip(logits.numpy(), rows, strict=True)]
    assert result.tokens.tolist() == want
    assert result.ok.all() and torch.equal(logits, before)


def test_bitmask_and_row_strides(isa):
    vocab = 77
    logits = make_logits(40, 2 * vocab)[:, :vocab]
    bits = torch.rand(40, vocab, generator=torch.Generator().manual_seed(1)) < 0.2
    bits[:, 3] = True
    words = torch.zeros(40, 3, dtype=torch.int64)
    for i in range(vocab):
        words[:, i // 32] |= bits[:, i].long() << (i % 32)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    rows = [{"seed": s, "temperature": float(s % 3), "allowed": range(0, 77, 3) if s % 2 else ()} for s in range(40)]
    want = [pick(process(x, row, b), row) for x, row, b in zip(logits.numpy(), rows, bits.numpy(), strict=True)]
    assert Result(logits, rows, words).tokens.tolist() == want


def test_ties_at_the_borders_of_truncation(isa):
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 0.0]]).repeat(400, 1)
    drawn = Result(logits, [{"seed": s, "top_k": 2} for s in range(400)]).tokens
    assert set(drawn.tolist()) == {1, 2, 4}, "equals of the k-th are all kept"
    drawn = Result(logits, [{"seed": s, "top_p": 0.4} for s in range(400)]).tokens
    assert set(drawn.tolist()) == {1, 2}, "the prefix ends inside the equals, lowest ids first"


def test_bad_rows_fail_alone(isa):
    logits = make_logits(9, 200)
    nan, inf = float("nan"), float("inf")
    logits[0, 7], logits[1, 199], logits[2, 64] = nan, nan, inf
    logits[3], logits[4, 198], logits[5, ::2] = -inf, inf, -inf
    rows = [{"temperature": float(r % 2)} for r in range(9)]
    rows[6] = {"allowed": (4, 5), "banned": (4, 5)}
    result = Result(logits, rows)
    assert result.ok.tolist() == [0, 0, 0, 0, 0, 1, 2, 1, 1]


@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_raw_logprobs_ignore_all_processing(isa, temperature):
    logits = make_logits(5, 321)
    logits[4] = logits[4].round()
    rows = [
        {"temperature": temperature, "num_logprobs": n, "banned": (0, 1), "top_k": 5, "seed": n}
        for n in (0, 1, 3, 5, 8)
    ]
    result = Result(logits, rows)
    for r, row in enumerate(rows):
        want, token, n = log_softmax(logits[r].numpy()), int(result.tokens[r]), row["num_logprobs"]
        assert math.isclose(result.logprobs[r], want[token], abs_tol=2e-6)
        assert result.ranks[r] == 1 + (logits[r] > logits[r, token]).sum()
        best = np.argsort(-logits[r].numpy(), kind="stable")[:n]
        assert result.top_ids[r, :n].tolist() == best.tolist()
        np.testing.assert_allclose(result.top_logprobs[r, :n], want[best], atol=2e-6)
        assert (result.top_ids[r, n:] == -7).all()


def test_no_logprobs_unless_wanted(isa):
    result = Result(make_logits(2, 50), [{}, {"num_logprobs": 0}])
    assert math.isnan(result.logprobs[0]) and not math.isnan(result.logprobs[1])


def test_other_logprobs_modes(isa):
    logits = make_logits(1, 100)
    x, row = logits[0].numpy(), {"temperature": 2.0, "top_k": 4, "bias": {3: 5.0}, "num_logprobs": 6}
    z = process(x, row) / np.float32(2.0)
    kept = truncate(z, row)
    processed = np.where(kept, z, -np.inf)
    for mode, want in ((PROCESSED, log_softmax(processed)), (RAW_LOGITS, x), (PROCESSED_LOGITS, processed)):
        result = Result(logits, [row], mode=mode)
        np.testing.assert_allclose(result.logprobs[0], want[result.tokens[0]], atol=2e-6)
        order = np.argsort(-(x if mode == RAW_LOGITS else z), kind="stable")[:6]
        assert result.top_ids[0, :6].tolist() == order.tolist()
        np.testing.assert_allclose(result.top_logprobs[0, :6], want[order], atol=2e-6)


def test_whole_vocabulary_of_logprobs(isa):
    logits = make_logits(1, 3000).round()
    result = Result(logits, [{"num_logprobs": 3000}], num_top=3000)
    assert result.top_ids[0].tolist() == np.argsort(-logits[0].numpy(), kind="stable").tolist()


@pytest.mark.parametrize("option", [{"temperature": 0.8}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_distribution(isa, option):
    vocab, draws = 90, 20000
    x = make_logits(1, vocab, 1.5)
    rows = [{**option, "seed": 1234567, "counter": c} for c in range(draws)]
    tokens = Result(x.expand(draws, vocab), rows).tokens
    z = x[0].numpy() / np.float32(option.get("temperature", 1.0))
    want = np.where(truncate(z, option), np.exp(log_softmax(z)), 0.0)
    want = want / want.sum() * draws
    seen = np.bincount(tokens.numpy(), minlength=vocab)
    assert (seen[want == 0] == 0).all()
    cells = want > 5
    chi2, freedom = ((seen - want)[cells] ** 2 / want[cells]).sum(), cells.sum() - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom), (chi2, freedom)


def test_seeds_and_counters_give_unrelated_draws(isa):
    x = torch.zeros(1, 1 << 16).expand(3, -1)
    rows = [{"seed": 1, "counter": 0}, {"seed": 1, "counter": 1}, {"seed": 1 << 40 | 1, "counter": 0}]
    assert len(set(Result(x, rows).tokens.tolist())) == 3


def test_a_row_does_not_depend_on_its_batch_or_on_threads(isa):
    rows = [{**OPTIONS[s % len(OPTIONS)], "seed": s, "num_logprobs": s % 5} for s in range(64)]
    logits = make_logits(64, 2000)
    whole = Result(logits, rows)
    threaded = with_threads(2, lambda: Result(logits, rows))
    assert torch.equal(whole.tokens, threaded.tokens) and torch.equal(whole.logprobs, threaded.logprobs)
    for r in range(64):
        alone = Result(logits[r : r + 1], rows[r : r + 1])
        assert alone.tokens[0] == whole.tokens[r] and alone.logprobs[0] == whole.logprobs[r]
        assert torch.equal(alone.top_ids[0], whole.top_ids[r])


@pytest.mark.parametrize("num_top", (0, 1, 20))
@pytest.mark.parametrize("vocab", (20, 1003))
def test_row_logprobs(isa, num_top, vocab):
    logits = make_logits(30, vocab)
    targets = torch.randint(vocab, (30,))
    logprobs, ranks = torch.empty(30), torch.empty(30, dtype=torch.int64)
    top_ids, top_logprobs = torch.empty(30, num_top, dtype=torch.int64), torch.empty(30, num_top)
    ops.row_logprobs(logprobs, ranks, top_ids, top_logprobs, logits, targets)
    want = logits.double().log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), want.gather(1, targets[:, None])[:, 0], rtol=0, atol=3e-6)
    assert torch.equal(ranks, 1 + (logits > logits.gather(1, targets[:, None])).sum(-1))
    values, ids = want.topk(num_top)
    assert torch.equal(top_ids, ids)
    torch.testing.assert_close(top_logprobs.double(), values, rtol=0, atol=3e-6)


def test_more_rows_than_a_pool_has_units():
    rows = 70_001
    logits, targets = torch.randn(rows, 3), torch.arange(rows) % 3
    logprobs, ranks = torch.full((rows,), float("nan")), torch.full((rows,), -7)
    top = torch.empty(rows, 0, dtype=torch.int64), torch.empty(rows, 0)
    with_threads(3, lambda: ops.row_logprobs(logprobs, ranks, *top, logits, targets))
    torch.testing.assert_close(logprobs, logits.log_softmax(1).gather(1, targets[:, None])[:, 0])
    assert ranks.min() == 1 and ranks.max() == 3
