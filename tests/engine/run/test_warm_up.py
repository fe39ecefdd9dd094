"""A GPU's kernels are compiled before it serves: no request launches what a start has not launched."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from cuda_target_cases import build
from engine_walk_cases import Walk
from fake_gpu import FakeGpu
from triton_interpreter import compile_launches

from fuseline.compile.config import CompileConfig, GraphConfig
from fuseline.compile.graph_inputs import StepOutput
from fuseline.compile.residency.uploads import Layout
from fuseline.engine.config import EngineConfig, SchedulerConfig
from fuseline.engine.messages import Vocabulary
from fuseline.engine.params import GrammarSpec
from fuseline.engine.run.cuda_device import CudaResults
from fuseline.engine.run.grammar.backends.xgrammar import XGrammarBackend
from fuseline.engine.service import EngineService

SERVED = "a first request"
REPLAYED, EAGER = GraphConfig((1, 2, 4, 16), mixed_sizes=(6, 16, 48)), GraphConfig(enabled=False)
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
LISTS = {"bad_words": ((1,),), "min_tokens": 2, "eos_token_ids": (3,), "logit_bias": ((4, 1.0),)}
ENDS = {"eos_token_ids": (3,)}
ANYTHING = GrammarSpec(kind="ebnf", text="root ::= [ab]*")
KINDS = (
    {"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 5}, {"logprobs": 0},
    {"logprobs": 3}, {"logprobs": 100, "temperature": 0.0}, {"prompt_logprobs": 0}, {"prompt_logprobs": 100, **LISTS},
    PENALTIES, {**PENALTIES, "logprobs": 2}, LISTS, {**LISTS, **PENALTIES, "n": 2}, {"allowed_token_ids": (1, 2, 3)},
    {"n": 3, "prompt_logprobs": 2}, {"max_tokens": 0, "prompt_logprobs": 1}, {"bad_words": ((1, 2),)},
    {"grammar": ANYTHING, **ENDS}, {"grammar": ANYTHING, **ENDS, **PENALTIES},
    {"grammar": ANYTHING, **LISTS, "logprobs": 1},
)  # fmt: skip


class Recorder(FakeGpu):
    """Nothing is computed: rows are fine all the same. The vocabulary is `num_cut` smaller than the model's."""

    def __init__(self, model, num_cut: int) -> None:
        super().__init__(model)
        run, vocab_size = model.run, model.info.vocab_size - num_cut

        def cut(inputs):
            logits = run(inputs).logits
            return StepOutput(logits[:, :vocab_size].clone(memory_format=torch.contiguous_format))

        model.run = cut
        model.info = replace(model.info, vocab_size=vocab_size)

    def results(self, layout: Layout) -> CudaResults:
        found = super().results(layout)
        if "ok" in layout:
            found.tensors["ok"].fill_(1)
        return found


@dataclass(frozen=True)
class Case:
    family: str
    graphs: GraphConfig
    mode: str
    max_num_seqs: int = 5
    num_tokens: int = 24
    num_cut: int = 0


CASES = (
    Case("llama", REPLAYED, "raw_logprobs"),
    Case("gpt_oss", EAGER, "processed_logprobs", num_cut=1),
    Case("gpt_oss", REPLAYED, "raw_logits", 20, 200),
    Case("llama", EAGER, "processed_logits", 3, num_cut=2),
)


def launches(arch: int) -> None:
    """Launches of case -arch: a start, then requests of all kinds, alone and many at once, so that steps are mixed."""
    case = CASES[-arch]
    sizes = {"max_num_seqs": case.max_num_seqs, "max_num_batched_tokens": case.num_tokens}
    model = build(case.family, graphs=case.graphs, **sizes)
    device = Recorder(model, case.num_cut)
    config = EngineConfig(
        CompileConfig(model=""), graphs=case.graphs, logprobs_mode=case.mode, scheduler=SchedulerConfig(**sizes)
    )
    service = EngineService(config, lambda config, progress: model, lambda config: device, lambda message: None)
    if model.graphs:
        model.graphs.wait()
    print(json.dumps({"kernel": SERVED, "arch": arch}))
    tokens = (b"a",) + (b"b",) * (model.info.vocab_size - 1)
    words = Vocabulary(tokens=tokens, eos_token_ids=(3,), vocab_size=len(tokens))
    service.engine.grammars._keep(ANYTHING.key, (XGrammarBackend(words).compile(ANYTHING), 1))
    walk = Walk(service.engine)
    for length in (1, 7, 40):
        for params in KINDS:
            walk.submit([9] * length, **{"max_tokens": 3, **params})
            walk.finish()
    for number, params in enumerate(KINDS * 2):
        walk.submit([number % 50] * (5 * number % 31 + 1), **{"max_tokens": 5, **params})
        walk.step()
    walk.finish()


@pytest.mark.slow
def test_requests_compile_nothing() -> None:
    entries = compile_launches("test_warm_up", *(-number for number in range(len(CASES))))
    for number, case in enumerate(CASES):
        kernels = [entry["kernel"] for entry in entries if entry["arch"] == -number]
        at = kernels.index(SERVED)
        assert kernels[at + 1 :] == [], case
        assert {"edit_kernel", "sample_kernel", "score_kernel", "prefill_kernel"} < set(kernels[:at])
