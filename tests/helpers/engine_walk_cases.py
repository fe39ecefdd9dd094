"""Random walks over an engine with a fake model, and the tokens and invariants they must give."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from fake_model import BLOCK_SIZE, FakeModel, FakeQueue, embedded, fake_config, next_logits
from hypothesis import strategies as st

from fuseline.compile.specs import RopeSwitchSpec
from fuseline.engine.engine import Engine
from fuseline.engine.messages import EngineRequest, StepExpander, TokenOutput
from fuseline.engine.params import PoolingParams, SamplingParams
from fuseline.engine.run.sampler_reference import _draw, reference_device

ORDERS = ("in_order", "overlapped", "queued")

LAYOUTS = {"full": (0,), "window": (6,), "mixed": (0, 6), "two_windows": (0, 5, 13)}


def make_engine(
    windows=(0,), num_blocks=40, rope_threshold=None, num_host_blocks=0, order="in_order", num_states=0, drafter=None,
    **config,
) -> Engine:  # fmt: skip
    switch = RopeSwitchSpec(rope_threshold, 64) if rope_threshold else None
    model = FakeModel(windows, rope_switch=switch, with_state=num_states > 0)
    model.allocate_states(num_states)
    model.allocate_caches([num_blocks + 1] * len(windows))
    host = [num_host_blocks] * len(windows) if num_host_blocks else []
    model.allocate_host_blocks(host)
    config = fake_config(async_scheduling=order == "overlapped", **config)
    device = FakeQueue() if order == "queued" else reference_device()
    return Engine(config, model, [num_blocks] * len(windows), device, host, num_states, drafter)


def seen_prompt(request: EngineRequest) -> list[int]:
    """The prompt as the fake model sees it: embeddings in the place of their tokens."""
    tokens = list(request.prompt_token_ids)
    for span in request.embeds:
        rows = np.frombuffer(span.data, np.float32).reshape(span.count, -1)
        tokens[span.start : span.start + span.count] = [embedded(row) for row in rows]
    return tokens


def expected_tokens(request: EngineRequest, index: int, windows, threshold=None, with_state=False) -> list[int]:
    """The request alone, without any engine: temperature 1, or greedy at 0."""
    tokens = seen_prompt(request)
    params = request.params
    for count in range(params.max_tokens):
        logits = torch.from_numpy(next_logits(tokens, windows, threshold, with_state))
        if count < params.min_tokens:
            logits[list(params.eos_token_ids)] = -torch.inf
        if params.temperature == 0:
            token = int(logits.argmax())
        else:
            token = _draw(torch.softmax(logits.double(), 0), params.seed + index, count)
        tokens.append(token)
        if token in params.eos_token_ids and count + 1 >= params.min_tokens:
            break
    return tokens[len(request.prompt_token_ids) :]


def check_tree(kv) -> None:
    tree = kv._tree
    uses = Counter(key for group in kv.groups for key in group.pool._cached)
    uses.update(list(kv.states._snapshots) if kv.states else ())
    uses.update(parent for parent in tree._parents.values() if parent)
    assert uses == tree._uses and uses.keys() == tree._parents.keys()


def check_invariants(engine: Engine) -> None:
    scheduler, kv = engine.scheduler, engine.kv
    rows = [seq.row for seq in scheduler.running]
    assert len(set(rows)) == len(rows) and all(0 <= row < scheduler.limits.num_seqs for row in rows)
    assert not any(seq in scheduler.waiting for seq in scheduler.running)
    assert all(seq.row < 0 and not seq.blocks for seq in scheduler.waiting)
    saved = [seq.swapped for seq in scheduler.waiting if seq.swapped]
    assert not any(seq.swapped for seq in scheduler.running)
    assert len(saved) == (kv.swap.num_sequences if kv.swap else 0)
    for index, group in enumerate(kv.groups):
        if kv.swap:
            on_host = [block for kept in saved for block in kept.blocks[index]] + kv.swap._free[index]
            assert sorted(on_host) == list(range(kv.swap.num_blocks[index])), "each is held once, or free"
        held = [block for seq in scheduler.running for block in seq.blocks[index] if block]
        counts = np.bincount(held, minlength=group.pool.num_blocks + 1)
        assert counts.tolist() == group.pool.refs
        assert group.pool.num_free == group.pool.num_blocks - len(set(held))
        for seq in scheduler.running:
            assert seq.blocks[index] == kv.tables[index, seq.row, : len(seq.blocks[index])].tolist()
            first = group.first_visible(max(0, seq.num_settled - 1))
            assert all(seq.blocks[index][first : -(-seq.num_computed // BLOCK_SIZE)]), "a visible block is null"
    check_tree(kv)
    if kv.states:
        held = [seq.state_slot for seq in scheduler.running]
        kept = [snapshot.slot for snapshot in kv.states._snapshots.values()]
        assert sorted(held + kept + kv.states._free) == list(range(kv.states.num_slots)), "each is held once, or free"
    assert all(seq.state_slot < 0 for seq in scheduler.waiting)


class Walk:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.expander = StepExpander()
        self.requests: dict[str, EngineRequest] = {}
        self.outputs: dict[tuple[str, int], list[TokenOutput]] = {}
        self.counts: list[int] = []

    def submit(self, prompt: list[int], **params) -> str:
        name = f"r{len(self.requests)}"
        priority, turn = params.pop("priority", 0), params.pop("turn", 0)
        salt, embeds = params.pop("cache_salt", ""), params.pop("embeds", ())
        params = SamplingParams(**{"seed": 7 + len(self.requests), **params})
        request = EngineRequest(
            request_id=name, prompt_token_ids=tuple(prompt), params=params, priority=priority, turn=turn,
            cache_salt=salt, embeds=tuple(embeds),
        )  # fmt: skip
        self.requests[name] = request
        self.engine.add(request)
        return name

    def pool(self, prompt: list[int], kind: str = "last", normalize: bool = True) -> str:
        name = f"r{len(self.requests)}"
        params = PoolingParams(pooling=kind, normalize=normalize)
        self.requests[name] = EngineRequest(request_id=name, prompt_token_ids=tuple(prompt), params=params)
        self.engine.add(self.requests[name])
        return name

    def step(self) -> None:
        batches = []
        prepare = self.engine.runner.prepare
        self.engine.runner.prepare = lambda batch: (batches.append(batch), prepare(batch))[1]
        outputs = self.expander.expand(self.engine.step())
        self.engine.runner.prepare = prepare
        limits = self.engine.scheduler.limits
        for batch in batches:
            assert 0 < batch.num_tokens <= limits.num_tokens and len(batch.rows) <= limits.num_seqs
            self.counts.append(batch.num_tokens)
        for output in outputs.outputs:
            self.outputs.setdefault((output.request_id, getattr(output, "index", 0)), []).append(output)
        check_invariants(self.engine)

    def finish(self) -> None:
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work and self.engine.kv.usage == 0 and not self.engine.requests.live
        assert not self.engine.kv.swap or self.engine.kv.swap.usage == 0
        assert not self.engine.rows.evicted and not self.engine.kv.in_flight and not self.expander._choices

    def tokens(self, name: str, index: int = 0) -> list[int]:
        return [token for output in self.outputs[name, index] for token in output.token_ids]

    def reason(self, name: str, index: int = 0) -> str | None:
        reasons = [output.finish_reason for output in self.outputs[name, index]]
        assert all(reason is None for reason in reasons[:-1])
        return reasons[-1]

    def check_all(self, windows, threshold=None, with_state=False) -> None:
        for name, request in self.requests.items():
            for index in range(request.params.n):
                expected = expected_tokens(request, index, windows, threshold, with_state)
                got = self.tokens(name, index)
                if self.reason(name, index) == "abort":
                    assert got == expected[: len(got)]
                else:
                    assert got == expected, f"{name} choice {index}"


prompts = st.one_of(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    # Few distinct beginnings, so that prefixes are shared.
    st.tuples(st.sampled_from([1, 2]), st.integers(1, 28), st.lists(st.integers(1, 3), max_size=3)).map(
        lambda t: [t[0]] * t[1] + t[2]
    ),
)

actions = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"), prompts, st.integers(0, 24), st.integers(1, 3), st.sampled_from([0.0, 1.0]),
            st.integers(-2, 2), st.sampled_from([None, 1]), st.sampled_from(["", "salt"]),
        ),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("reset")),
        st.tuples(st.just("sleep")),
    ),
    min_size=3, max_size=25,
)  # fmt: skip


def take_actions(walk: Walk, actions: list[tuple], **settings) -> None:
    engine = walk.engine
    for action in actions:
        if action[0] == "submit":
            _, prompt, max_tokens, n, temperature, priority, prompt_logprobs, salt = action
            walk.submit(
                prompt, max_tokens=max_tokens, n=n, temperature=temperature, priority=priority, cache_salt=salt,
                prompt_logprobs=prompt_logprobs, eos_token_ids=(0,), min_tokens=min(max_tokens, 2), **settings,
            )  # fmt: skip
        elif action[0] == "abort":
            engine.abort(f"r{action[1]}")
            check_invariants(engine)
        elif action[0] == "step":
            for _ in range(action[1]):
                walk.step()
        elif action[0] == "sleep":
            engine.pause()
            assert not engine.scheduler.running
            model = engine.runner.model
            if model.info.state_specs:
                model.allocate_states(len(model.states))  # what they were is lost
            engine.resume()
        else:
            engine.reset_prefix_cache()
