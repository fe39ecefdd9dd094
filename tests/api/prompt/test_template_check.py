"""A template that cannot be used ends the start in one line, soon and without taking the machine's memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from fuseline.api.config import ConfigError, read_environment
from fuseline.api.config_resolve import resolve
from fuseline.api.prompt import template_check
from fuseline.api.prompt.chat import template_text
from fuseline.api.prompt.template import ChatTemplate
from fuseline.api.prompt.template_check import check_template
from fuseline.compile.cache.files import entries

CHANGES = [
    {"prompt_timeout": 3.0}, {"prompt_memory": 2**28}, {"max_prompt_bytes": 10**6},
    {"default_chat_template_kwargs": {"a": 1}}, {"chat_template_content_format": "openai"},
]  # fmt: skip
"""Flags on which the outcome depends."""
FAULTS = {
    "{{ 'x' * 10**10 }}": "--prompt-memory",
    "{{ ('x' * 10**10)[:1] }}": "--prompt-memory",
    "{{ 'x'|center(10**10) }}": "--prompt-memory",
    "{{ [0] * 10**10 }}": "--prompt-memory",
    "{% set y = 3**(3**18) %}": "--prompt-timeout",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "--prompt-timeout",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{% if %}": "does not parse",
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}": "nested too deeply",
    "{% if 1 %}" * 300 + "{% endif %}" * 300: "nested too deeply",
    "{% for a in b %}" * 30 + "{% endfor %}" * 30: "nested too deeply",
}


@pytest.mark.parametrize("text", FAULTS, ids=lambda text: text[:40])
def test_a_template_that_cannot_be_used_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    flags = {"model": "demo", "prompt_timeout": 3.0, "prompt_memory": 256 * 2**20, "cache_dir": str(tmp_path)}
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=FAULTS[text]) as refused:
        check_template(resolve(flags, read_environment({})), text, {})
    assert "\n" not in str(refused.value) and time.monotonic() - begin < 20
    assert not entries(tmp_path), "it must be refused at the next start too"


@pytest.mark.parametrize("text", ["{{ messages[0].content }}", "{{ raise_exception('no system prompt') }}"])
def test_what_a_template_says_about_the_trial_is_no_fault(text: str, tmp_path: Path) -> None:
    check_template(resolve({"model": "demo", "cache_dir": str(tmp_path)}, read_environment({})), text, {})


def test_a_template_that_has_passed_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(template_check, "_try_apart", lambda _, text, tokens: tried.append((text, tokens)))

    def check(text: str = "{{ messages[0].content }}", tokens: dict[str, str] | None = None, **flags: Any) -> int:
        config = resolve({"model": "demo", "cache_dir": str(tmp_path), **flags}, read_environment({}))
        check_template(config, text, tokens or {})
        return len(tried)

    assert check() == check() == 1
    assert check(text="{{ messages }}") == check(text="{{ messages }}") == 2
    assert check(tokens={"bos_token": "<s>"}) == 3
    for count, flags in enumerate(CHANGES, start=4):
        assert check(**flags) == check(**flags) == count
    assert [entry.kind for entry in entries(tmp_path)] == ["templates"] * len(tried)
    (first, *_) = entries(tmp_path)
    first.path.write_text("damaged")
    assert check() == check() and len(tried) <= 4 + len(CHANGES)


def test_a_cache_that_cannot_be_written_costs_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(template_check, "_try_apart", lambda *_: tried.append(1))
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    config = resolve({"model": "demo", "cache_dir": str(blocked)}, read_environment({}))
    for count in (1, 2):
        check_template(config, "{{ messages }}", {})
        assert len(tried) == count


@pytest.mark.parametrize("text", [text for text in FAULTS if "--prompt" in FAULTS[text]], ids=lambda text: text[:40])
def test_compiling_evaluates_nothing(text: str) -> None:
    begin = time.monotonic()
    ChatTemplate(text)
    assert time.monotonic() - begin < 1


def test_a_template_on_the_command_line_keeps_its_characters() -> None:
    assert template_text("{{ 'é中🙂' }}\\n", None) == "{{ 'é中🙂' }}\n"
    with pytest.raises(ConfigError, match="escape sequence"):
        template_text("{{ 'a' }}\\n\\x", None)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"template\.jinja"):
        template_text(str(path), None)
