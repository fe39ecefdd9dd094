"""Requests for tests of async scheduling, and their answers."""

from __future__ import annotations

from engine_walk_cases import Walk

REQUESTS = {
    "plain": {},
    "penalties": {"repetition_penalty": 1.5, "frequency_penalty": 0.7, "presence_penalty": 0.9, "temperature": 0.0},
    "bad words": {"bad_words": ((3,), (5, 6), *((a, b) for a in range(10) for b in range(10, 25))), "min_tokens": 6},
    "bias": {"logit_bias": ((3, 2.0), (4, -5.0)), "allowed_token_ids": tuple(range(30))},
    "stops": {"stop_token_ids": tuple(range(8)), "min_tokens": 3},
    "many stops": {"stop_token_ids": tuple(range(1, 20)), "eos_token_ids": (0,)},
    "one token": {"max_tokens": 1},
    "no token": {"max_tokens": 0, "prompt_logprobs": 1},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 2},
    "choices": {"n": 3, "eos_token_ids": (0, 1, 2)},
    "copies": {"n": 2, "temperature": 0.0, "stop_token_ids": (5, 7)},
}


def answers(walk: Walk) -> dict:
    """All that each choice was told, however it was cut into outputs."""
    told = {}
    for place, outputs in walk.outputs.items():
        last = outputs[-1]
        told[place] = (
            [token for output in outputs for token in output.token_ids],
            [entry for output in outputs for entry in output.logprobs],
            [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None],
            (last.finish_reason, last.stop_token_id, last.error),
        )
    return told
