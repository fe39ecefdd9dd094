"""Models with recurrent states behind HTTP: what the prefix cache finds, what usage and metrics say, and sleep."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from api_client import Api
from recurrent_cases import save_recurrent
from zoo import tokenizer

PROMPT = [k % 97 + 3 for k in range(100)]


@pytest.fixture(scope="module", params=["mamba2", "granitemoehybrid"])
def api(request, tmp_path_factory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp(request.param)
    save_recurrent(request.param, folder)
    tokenizer().save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSELINE_SERVER_DEV_MODE", "1")
        opened = Api(
            str(folder), served_model_name=("demo",), skip_model_check=True, enable_sleep_mode=True, cpu_threads=1,
            kv_cache_memory_bytes=8 << 20, max_num_seqs=8, enable_prompt_tokens_details=True,
        )  # fmt: skip
    yield opened
    opened.close()


def ask(api: Api, prompt: list[int], **fields) -> tuple[str, int]:
    """The answer's text and the prompt's tokens that were cached."""
    answer = api.answer("/v1/completions", **{"prompt": prompt, "temperature": 0, "max_tokens": 8, **fields})
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def hits(api: Api) -> int:
    text = api.call("GET", "/metrics").text
    return int(float(re.search(r"^\w+:prefix_cache_hits_total\{.*\} (\S+)$", text, re.M)[1]))


def test_what_is_cached_is_told_and_counted(api: Api) -> None:
    before = hits(api)
    text, found = ask(api, PROMPT)
    assert found == 0
    assert ask(api, PROMPT) == (text, 96)
    assert ask(api, PROMPT, cache_salt="mine") == (text, 0)
    assert hits(api) == before + 96
    shared = [PROMPT[:70] + [k] * 10 for k in (1, 2, 3)]
    assert [ask(api, prompt)[1] for prompt in shared] == [0, 64, 64]


@pytest.mark.parametrize("level", [None, 0, 1, 2])
def test_answers_after_sleep_or_a_reset_are_those_before(api: Api, level: int | None) -> None:
    text, _ = ask(api, PROMPT)
    assert ask(api, PROMPT) == (text, 96)
    if level is None:
        assert api.call("POST", "/reset_prefix_cache").status_code == 200
    else:
        assert api.call("POST", f"/sleep?level={level}").status_code == 200
        assert api.call("POST", "/wake_up").status_code == 200
    assert [ask(api, PROMPT) for _ in range(2)] == [(text, 0), (text, 96)]


def test_scores_of_the_prompt_are_those_of_all_of_it(api: Api) -> None:
    asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 2, "prompt_logprobs": 1}
    first, second = (api.answer("/v1/completions", **asked) for _ in range(2))
    assert first["choices"] == second["choices"] and len(first["choices"][0]["prompt_logprobs"]) == len(PROMPT)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
