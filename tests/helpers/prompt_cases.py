"""Settings of a server on the bundled model for tests that prepare requests without an engine."""

from __future__ import annotations

import json
from typing import Any

from fuseline.api.config import read_environment
from fuseline.api.config_resolve import resolve
from fuseline.api.prompt.chat import template_text
from fuseline.api.prompt.prepare import Preparer, PromptSettings
from fuseline.api.served import load_tokenizer
from fuseline.engine.messages import EngineReady

CONTEXT, VOCAB = 2048, 4096
SPINNING = (
    "{% if spin %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if much %}{% for a in range(99999) %}{% for b in range(99999) %}{{ messages[0].content }}{% endfor %}"
    "{% endfor %}{% endif %}{% if wide %}{{ (messages[0].content * 10 ** 10)[:1] }}{% endif %}{{ messages[0].content }}"
)
"""A template that runs on, writes on or takes memory when a variable of the request says so."""


def settings(**flags: Any) -> PromptSettings:
    config = resolve({"model": "demo", **flags}, read_environment({}))
    ready = EngineReady(VOCAB, CONTEXT, 100, 16, "bfloat16", "bfloat16", (4087,), "LlamaForCausalLM")
    tokenizer = load_tokenizer(config)
    template = template_text(config.chat_template, tokenizer.chat_template) if tokenizer else None
    return PromptSettings(config, ready, (), template)


def preparer(**flags: Any) -> Preparer:
    made = settings(**flags)
    return Preparer(made, load_tokenizer(made.config))


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def chat(content: Any = "Hi", **fields: Any) -> bytes:
    return body(**{"messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields})


def turned_on(name: str) -> bytes:
    """A chat that turns one of the faults of SPINNING on."""
    return chat(chat_template_kwargs={name: True})
