"""The Triton sampling chain through the interpreter: against the CPU's kernels, token by token, and the numpy model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton_interpreter
from native_fixtures import ops
from native_sampling_cases import (
    OPTIONS,
    PROCESSED,
    PROCESSED_LOGITS,
    RAW,
    RAW_LOGITS,
    Result,
    log_softmax,
    make_logits,
    pick,
    process,
    truncate,
)  # fmt: skip
from triton_interpreter import assert_fits, compile_launches

from fuseline.compile.kernels.triton.sampling import row_logprobs, sample

__all__ = ["triton_interpreter"]
NAN, INF = float("nan"), float("inf")


def result(logits, rows, bitmask=None, mode=RAW, num_top=8):
    return Result(logits, rows, bitmask, mode, num_top, sample)


def assert_same(logits, rows, bitmask=None, mode=RAW, num_top=8):
    """As the CPU's kernel: what is drawn and ranked exactly, log-probabilities to float32's last bits."""
    before = logits.clone()
    found, want = result(logits, rows, bitmask, mode, num_top), Result(logits, rows, bitmask, mode, num_top)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    for name in ("ok", "tokens", "ranks", "top_ids"):
        assert torch.equal(getattr(found, name), getattr(want, name)), name
    for name in ("logprobs", "top_logprobs"):
        torch.testing.assert_close(getattr(found, name), getattr(want, name), rtol=2e-6, atol=2e-6, equal_nan=True)
    return found


@pytest.mark.parametrize("vocab", (1, 5, 64, 65, 1000))
def test_greedy_is_the_first_of_the_greatest(vocab):
    logits = make_logits(6, vocab)
    logits[1] = logits[1].round()
    logits[2], logits[3] = 0.0, -1e30
    logits[4, : vocab - 1] = -INF
    found = assert_same(logits, [{"temperature": 0.0}] * 6)
    assert found.tokens.tolist() == [int(np.argmax(row)) for row in logits.numpy()]


@pytest.mark.parametrize("vocab", (700, 3001))
def test_each_step_matches_the_model_and_the_cpu(vocab):
    rows = [{**option, "seed": 17 * s - 5, "counter": s, "num_logprobs": s} for option in OPTIONS for s in range(2)]
    logits = make_logits(len(rows), vocab)
    found = assert_same(logits, rows)
    assert found.tokens.tolist() == [pick(process(x, row), row) for x, row in zip(logits.numpy(), rows, strict=True)]


def test_long_lists_take_several_steps():
    past = [3 * i % 2900 for i in range(2500)]
    rows = [
        {"repetition": 1.3, "presence": 0.5, "prompt": past[:1100], "output": past[1100:]},
        {"banned": range(0, 2600)}, {"allowed": range(100, 2400, 2), "bias": {i: 0.01 * i for i in range(1200)}}, {},
    ]  # fmt: skip
    assert_same(make_logits(4, 2900), rows)


def test_a_history_may_lie_anywhere() -> None:
    """Begin and end of each row's tokens in a memory that holds more, int32: the same as one after the other."""
    vocab, memory = 300, torch.randint(300, (4, 50), dtype=torch.int32)
    lengths = [7, 0, 50, 31]
    penalties = {"repetition": 1.2, "frequency": 0.5, "presence": 0.3, "num_logprobs": 8}
    parts = [(memory[r, : min(4, n)].tolist(), memory[r, 4:n].tolist()) for r, n in enumerate(lengths)]
    rows = [{**penalties, "prompt": prompt, "output": output} for prompt, output in parts]
    begins = torch.arange(4) * 50

    def in_place(*arguments) -> None:
        ragged, spans = list(arguments), torch.stack((begins, begins + torch.tensor(lengths)))
        ragged[17:19] = spans, memory.reshape(-1)
        sample(*ragged)

    logits = make_logits(4, vocab)
    found, want = Result(logits, rows, None, PROCESSED, 8, in_place), result(logits, rows, mode=PROCESSED)
    for name in ("tokens", "ranks", "logprobs", "top_ids"):
        assert torch.equal(getattr(found, name), getattr(want, name)), name


def test_ids_outside_the_vocabulary_are_passed_over():
    rows = [{"banned": (-1, 700, 3)}, {"allowed": (5, 10**6)}, {"bias": {-3: 9.0, 900: 9.0}},
            {"frequency": 1.0, "output": (800, 2)}]  # fmt: skip
    assert_same(make_logits(4, 700), rows)


def test_bitmask_and_row_strides():
    vocab = 77
    logits = make_logits(12, 2 * vocab)[:, :vocab]
    bits = torch.rand(12, vocab, generator=torch.Generator().manual_seed(1)) < 0.2
    bits[:, 3] = True
    words = torch.zeros(12, 3, dtype=torch.int64)
    for i in range(vocab):
        words[:, i // 32] |= bits[:, i].long() << (i % 32)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    rows = [{"seed": s, "temperature": float(s % 3), "allowed": range(0, 77, 3) if s % 2 else ()} for s in range(12)]
    found = assert_same(logits, rows, words)
    want = [pick(process(x, row, b), row) for x, row, b in zip(logits.numpy(), rows, bits.numpy(), strict=True)]
    assert found.tokens.tolist() == want


def test_ties_at_the_borders_of_truncation():
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 0.0]]).repeat(12, 1)
    drawn = assert_same(logits, [{"seed": s, "top_k": 2} for s in range(12)]).tokens
    assert set(drawn.tolist()) == {1, 2, 4}, "equals of the k-th are all kept"
    drawn = assert_same(logits, [{"seed": s, "top_p": 0.4} for s in range(12)]).tokens
    assert set(drawn.tolist()) == {1, 2}, "the prefix ends inside the equals, lowest ids first"


def test_bad_rows_fail_alone():
    logits = make_logits(9, 200)
    logits[0, 7], logits[1, 199], logits[2, 64] = NAN, NAN, INF
    logits[3], logits[4, 198], logits[5, ::2] = -INF, INF, -INF
    rows = [{"temperature": float(r % 2), "num_logprobs": 2} for r in range(9)]
    rows[6] = {"allowed": (4, 5), "banned": (4, 5)}
    assert assert_same(logits, rows).ok.tolist() == [0, 0, 0, 0, 0, 1, 2, 1, 1]


@pytest.mark.parametrize("mode", (RAW, PROCESSED, RAW_LOGITS, PROCESSED_LOGITS))
def test_logprobs_modes(mode):
    options = {"bias": {3: 5.0}, "num_logprobs": 6, "seed": 4}
    rows = [{**options, "temperature": 2.0, "top_k": 4}, {**options, "top_k": 1}, {**options, "temperature": 0.0},
            {**options, "temperature": 0.7, "top_p": 0.8}, {"num_logprobs": -1}]  # fmt: skip
    logits = make_logits(5, 100)
    found = assert_same(logits, rows, mode=mode)
    if mode == PROCESSED:
        assert math.isclose(found.logprobs[1], 0.0, abs_tol=1e-6), "the one that is kept has all the mass"
        z = process(logits[0].numpy(), rows[0]) / np.float32(2.0)
        want = log_softmax(np.where(truncate(z, rows[0]), z, -np.inf))
        np.testing.assert_allclose(found.logprobs[0], want[found.tokens[0]], atol=2e-6)


def test_whole_vocabulary_of_logprobs():
    logits = make_logits(1, 150).round()
    logits[0, :3] = torch.tensor([0.0, -0.0, -INF])
    assert_same(logits, [{"num_logprobs": 150}], num_top=150)


def test_more_blocks_than_are_held():
    """A flat row: most of 79 blocks matter, of which a program holds 64."""
    rows = [{"top_k": 2000, "seed": 1}, {"top_p": 0.9, "seed": 2}, {"top_k": 3000, "top_p": 0.7, "seed": 3}]
    found = assert_same(logits := make_logits(3, 5010, 0.1), rows)
    assert found.tokens.tolist() == [pick(process(x, row), row) for x, row in zip(logits.numpy(), rows, strict=True)]


def test_extreme_settings():
    rows = [{"min_p": 1.0}, {"top_p": 0.0}, {"top_p": 1e-9, "top_k": 3}, {"top_k": 10**6}, {"temperature": 100.0},
            {"temperature": 0.01, "top_p": 0.99}, {"temperature": 1e-39}, {"min_p": 1e-30},
            {"seed": -(2**63), "counter": 2**40}]  # fmt: skip
    assert_same(make_logits(9, 333, 8.0), rows)
    flat = torch.zeros(9, 333)
    assert_same(flat, rows)


def test_a_row_does_not_depend_on_its_batch():
    rows = [{**OPTIONS[s % len(OPTIONS)], "seed": s, "num_logprobs": s % 5} for s in range(21)]
    logits = make_logits(21, 500)
    whole = result(logits, rows)
    for r in (0, 5, 10, 16, 20):
        alone = result(logits[r : r + 1], rows[r : r + 1])
        assert alone.tokens[0] == whole.tokens[r] and alone.logprobs[0] == whole.logprobs[r]
        assert torch.equal(alone.top_ids[0], whole.top_ids[r])


@pytest.mark.parametrize(("vocab", "num_top"), [(20, 0), (20, 20), (1003, 3)])
def test_row_logprobs(vocab, num_top):
    logits, targets = make_logits(5, vocab), torch.randint(vocab, (5,))
    found, want = (
        [torch.empty(5), torch.empty(5, dtype=torch.int64), torch.empty(5, num_top, dtype=torch.int64),
         torch.empty(5, num_top)] for _ in range(2)
    )  # fmt: skip
    row_logprobs(*found, logits, targets)
    ops.row_logprobs(*want, logits, targets)
    assert torch.equal(found[1], want[1]) and torch.equal(found[2], want[2])
    for k in (0, 3):
        torch.testing.assert_close(found[k], want[k], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_logits_of_half_precision_give_the_bits_of_the_same_numbers_in_float32(dtype):
    """Plain rows, whose logits are widened as they are read, and edited ones, which a copy holds."""
    halves = make_logits(len(OPTIONS), 700).to(dtype)
    scored = [{**row, "num_logprobs": 3, "seed": 5} for row in OPTIONS]
    for rows in (scored, [{"temperature": 0.0}, {"temperature": 0.7}]):
        logits = halves[: len(rows)]
        found, want = (result(x, rows, mode=PROCESSED) for x in (logits, logits.float()))
        for name in ("ok", "tokens", "ranks", "top_ids", "logprobs", "top_logprobs"):
            assert torch.equal(getattr(found, name).nan_to_num(), getattr(want, name).nan_to_num()), name
    assert found.tokens[0] == logits[0].argmax(), "greedy"
    for value in (NAN, INF):
        halves[3, 9] = value
        assert result(halves[:5], [{}] * 5).ok.tolist() == [1, 1, 1, 0, 1]


def test_scores_of_half_precision_have_the_bits_of_float32():
    halves, targets = make_logits(5, 130).bfloat16(), torch.randint(130, (5,))
    found, want = (
        [torch.empty(5), torch.empty(5, dtype=torch.int64), torch.empty(5, 3, dtype=torch.int64), torch.empty(5, 3)]
        for _ in range(2)
    )
    row_logprobs(*found, halves, targets)
    row_logprobs(*want, halves.float(), targets)
    assert all(map(torch.equal, found, want))


def test_nothing_to_sample():
    result(torch.zeros(0, 10), [])


def launches(arch: int) -> None:
    """A Llama vocabulary: plain, with every list, and scoring."""
    plain, edited = {}, {"repetition": 1.1, "output": (1,), "bias": {1: 1.0}, "banned": (2,), "num_logprobs": 2}
    logits = torch.zeros(2, 128256)
    for mode in (RAW, PROCESSED) if arch == 90 else (RAW,):
        result(logits, [plain, edited], torch.zeros(2, 4008, dtype=torch.int32), mode)
    if arch == 90:
        result(logits, [plain, plain])
        result(logits.bfloat16(), [plain, plain])
        ids = torch.zeros(2, 1, dtype=torch.int64)
        row_logprobs(torch.zeros(2), ids[:, 0], ids, torch.zeros(2, 1), logits, ids[:, 0])


@pytest.mark.slow
def test_every_kernel_compiles():
    entries = compile_launches("test_triton_sampling", 80, 90, 100)
    assert {e["kernel"] for e in entries} == {"edit_kernel", "scan_kernel", "sample_kernel", "score_kernel"}
    assert_fits(entries)
