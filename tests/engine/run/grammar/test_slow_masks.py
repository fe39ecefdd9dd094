"""Grammars with slow masks: these are made beside the steps, which go on for all others, and tokens stay the same."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence as Seq

import pytest
import test_grammar_walk as walks
import torch
from engine_walk_cases import ORDERS, Walk

from fuseline.api.prompt.grammar import request_spec
from fuseline.api.protocol.common import GenerateRequest
from fuseline.engine.params import ThinkingBudget
from fuseline.engine.run.grammar import masks, slow_masks
from fuseline.engine.run.grammar.backends.xgrammar import XGrammar
from fuseline.engine.run.grammar.worker import _answer


class Gate:
    """A grammar whose masks wait for a gate from the second one on."""

    is_slow = True
    num_bytes = 1

    def __init__(self, inner: XGrammar) -> None:
        self._inner = inner
        self.opened = threading.Event()
        self.is_reached = threading.Event()
        self.threads: set[str] = set()

    def matcher(self, ends: Seq[int]) -> GatedMatcher:
        return GatedMatcher(self, self._inner.matcher(ends))


class GatedMatcher:
    def __init__(self, gate: Gate, inner) -> None:
        self._gate, self._inner, self._count = gate, inner, 0
        self.accept_token, self.rollback, self.is_terminated = inner.accept_token, inner.rollback, inner.is_terminated

    def fill_next_token_bitmask(self, mask: torch.Tensor) -> None:
        self._count += 1
        self._gate.threads.add(threading.current_thread().name)
        if self._count > 1:
            self._gate.is_reached.set()
            assert self._gate.opened.wait(60)
        self._inner.fill_next_token_bitmask(mask)


def finish(made: Walk) -> None:
    """As the service does it: without anything to compute it waits."""
    engine, is_ready = made.engine, threading.Event()
    engine.slow_masks.on_ready = is_ready.set
    while engine.requests.live or engine.has_work:
        is_ready.clear()
        engine.admit_compiled()
        if engine.has_work:
            made.step()
        else:
            assert not engine.slow_masks.is_waiting or is_ready.wait(60)
    made.finish()
    engine.slow_masks.close()


@pytest.mark.parametrize("num_host_blocks", [0, 60])
@pytest.mark.parametrize("order", ORDERS)
def test_tokens_are_those_of_other_masks(order: str, num_host_blocks: int) -> None:
    """Also where sequences are preempted while their masks are made."""
    found = []
    for is_slow in (False, True):
        made = walks.walk(order, 17, num_host_blocks=num_host_blocks)
        for key, grammar in walks.COMPILED.items():
            other = XGrammar(grammar.compiled)
            other.is_slow = is_slow
            made.engine.grammars._keep(key, (other, 1))
        names = []
        for number in range(12):
            names.append(walks.submit(made, number))
            made.engine.admit_compiled()
            made.step()
        finish(made)
        found.append([made.tokens(name) for name in names])
        assert made.engine.scheduler.num_preemptions > 0
    assert found[0] == found[1]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("is_aborted", [False, True])
def test_others_go_on_while_a_mask_is_made(order: str, is_aborted: bool) -> None:
    made = walks.walk(order, 40)
    gate = Gate(walks.COMPILED[walks.CHOICES.key])
    made.engine.grammars._keep(walks.CHOICES.key, (gate, 1))
    budget = ThinkingBudget(num_tokens=99, begins=("<",), ends=(">",), end_token_ids=(1,))
    fields = {"eos_token_ids": (walks.EOS,), "masked_eos_token_ids": (walks.EOS,), "max_tokens": 26}
    slow = made.submit(walks.PROMPT, grammar=walks.CHOICES, thinking=budget, **fields)
    while not gate.is_reached.is_set():
        made.engine.admit_compiled()
        if made.engine.has_work:
            made.step()
    plain = made.submit(walks.PROMPT, min_tokens=20, max_tokens=20, eos_token_ids=(walks.EOS,))
    for _ in range(40):
        made.step()
    assert len(made.tokens(plain)) == 20 and len(made.tokens(slow)) == 1
    assert not made.engine.has_work  # it waits, and does not turn in circles
    if is_aborted:
        made.engine.abort(slow)
    gate.opened.set()
    finish(made)
    assert gate.threads == {"fuseline-masks_0"}
    if not is_aborted:
        text = b"".join(walks.VOCABULARY.tokens[token] for token in made.tokens(slow)).decode()
        assert re.fullmatch("([A-Z][a-f]){2,12}", text)


def test_a_mask_that_is_soon_there_costs_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_masks, "PATIENCE_SECONDS", 30)
    counts = []
    for is_slow in (False, True):
        made = walks.walk("in_order", 40)
        grammar = XGrammar(walks.COMPILED[walks.CHOICES.key].compiled)
        grammar.is_slow = is_slow
        made.engine.grammars._keep(walks.CHOICES.key, (grammar, 1))
        fields = {"eos_token_ids": (walks.EOS,), "masked_eos_token_ids": (walks.EOS,), "max_tokens": 12}
        made.submit(walks.PROMPT, grammar=walks.CHOICES, min_tokens=12, **fields)
        finish(made)
        counts.append(len(made.counts))
    assert counts[0] == counts[1] == 12


def test_a_slow_grammar_is_found_when_it_is_compiled() -> None:
    class Backends:
        def get(self, name: str):
            return self

        def compile(self, spec):
            return walks.COMPILED[walks.RUNS.key]

    assert not _answer(walks.RUNS, Backends(), walks.VOCAB_SIZE).is_slow
    for grammar, is_slow in (
        ("root ::= [a-z]{2,400}", True), ("root ::= [a-z]{33}", True), ("root ::= [a-z]{2,32}", False),
        ('start: "a"~2..400', True), ('start: "a" ~ 99', True), ('start: "a"~2..4', False),
        ('root ::= "12" [0-9]', False),
    ):  # fmt: skip
        tag = {"format": {"type": "grammar", "grammar": grammar}}
        in_tag = request_spec(GenerateRequest(structured_outputs={"structural_tag": tag}))
        assert in_tag.is_slow is (is_slow and grammar.startswith("root"))
        spec = request_spec(GenerateRequest(guided_grammar=grammar))
        assert spec.is_slow is is_slow, grammar
        assert _answer(spec, Backends(), walks.VOCAB_SIZE).is_slow is is_slow


def test_a_step_that_has_waited_looks_for_the_one_it_has_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks of the next step are made one by one, and those that take long beside the steps from then on."""
    made = walks.walk("in_order", 40)
    fields = {"eos_token_ids": (walks.EOS,), "masked_eos_token_ids": (walks.EOS,), "max_tokens": 26}
    slow, quick = (made.submit(walks.PROMPT, grammar=walks.CHOICES, **fields) for _ in range(2))
    made.step()
    states = [made.engine.requests.live[name][0].grammar for name in (slow, quick)]
    clock = [0.0]
    monkeypatch.setattr(masks.time, "perf_counter", lambda: clock[0])
    fill, mask = masks.GrammarMasks._fill_plain, states[0].mask
    monkeypatch.setattr(
        masks.GrammarMasks, "_fill_plain", lambda self, *a: (fill(self, *a), clock.__setitem__(0, clock[0] + 1))
    )
    monkeypatch.setattr(states[0], "mask", lambda *a: (mask(*a), clock.__setitem__(0, clock[0] + 1))[0])
    noted = []
    for state in states:
        monkeypatch.setattr(state, "note_slow", lambda state=state: noted.append(state))
    for _ in range(5):
        made.step()
    assert set(noted) == {states[0]}
    monkeypatch.undo()
    finish(made)
