"""The form of content that a template takes, on the constructs that public templates are made of."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from prompt_cases import body, preparer

from fuseline.api.config import read_environment
from fuseline.api.config_resolve import resolve
from fuseline.api.prompt.prepare import Preparer
from fuseline.api.prompt.template import ChatTemplate
from fuseline.api.served import log_content_format

EACH = "{% for m in messages %}"
END = "{% endfor %}"
PARTS = {
    "attribute": f"{EACH}{{% for p in m.content %}}{{{{ p.text }}}}{END}{END}",
    "item": f"{EACH}{{% for p in m['content'] %}}{{{{ p['text'] }}}}{END}{END}",
    "variable": f"{EACH}{{% set c = m.content %}}{{% for p in c %}}{{{{ p.text }}}}{END}{END}",
    "two variables": f"{EACH}{{% set c = m.content %}}{{% set d = c %}}{{% for p in d %}}{END}{END}",
    "used before it is set": f"{EACH}{{% for p in c %}}{END}{{% set c = m.content %}}{END}",
    "slice": f"{EACH}{{% for p in m.content[1:] %}}{END}{END}",
    "filter": f"{EACH}{{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}}{END}{END}",
    "filters": f"{EACH}{{% for p in m.content | selectattr('type', 'equalto', 'text') | list | reverse %}}{END}{END}",
    "condition of a loop": f"{EACH}{{% for p in m.content if p.type == 'text' %}}{END}{END}",
    "mapped": f"{EACH}{{{{ m.content | map(attribute='text') | join }}}}{END}",
    "string or parts": f"{EACH}{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{{% for p in m.content %}}"
    f"{END}{{% endif %}}{END}",
    "default": f"{EACH}{{% for p in m.content | default([]) %}}{END}{END}",
    "or": f"{EACH}{{% for p in m.content or [] %}}{END}{END}",
    "conditional": f"{EACH}{{% set c = m.content if m.content is not string else [] %}}{{% for p in c %}}{END}{END}",
    "get": f"{EACH}{{% for p in m.get('content', []) %}}{END}{END}",
    "loop variable": "{% set loop_messages = messages[1:] %}{% for m in loop_messages %}{% for p in m.content %}"
    f"{END}{END}",
    "one of the messages": f"{{% for p in messages[0].content %}}{END}",
    "last of a kind": "{% set s = messages | selectattr('role', 'equalto', 'system') | list | last %}"
    f"{{% for p in s.content %}}{END}",
    "namespace": "{% set ns = namespace(system=messages[0]) %}{% for p in ns.system.content %}" + END,
    "set in a namespace": "{% set ns = namespace(c='') %}{% set ns.c = messages[0].content %}{% for p in ns.c %}" + END,
    "joined lists": "{% for m in [messages[0]] + messages[1:] %}{% for p in m.content %}" + END + END,
    "pairs": "{% set first, rest = messages[0], messages[1:] %}{% for m in rest %}{% for p in m.content %}" + END + END,
    "contents": f"{{% for c in messages | map(attribute='content') %}}{{% for p in c %}}{END}{END}",
    "neighbour": f"{EACH}{{% for p in loop.previtem.content %}}{END}{END}",
    "macro of content": "{% macro show(content) %}{% for p in content %}{{ p.text }}{% endfor %}{% endmacro %}"
    f"{EACH}{{{{ show(m.content) }}}}{END}",
    "macro of a message": "{% macro show(m, n=1) %}{% for p in m.content %}{% endfor %}{% endmacro %}"
    f"{EACH}{{{{ show(n=2, m=m) }}}}{END}",
    "macro of a macro": "{% macro inner(c) %}{% for p in c %}{% endfor %}{% endmacro %}"
    "{% macro outer(x) %}{{ inner(x.content) }}{% endmacro %}" + f"{EACH}{{{{ outer(m) }}}}{END}",
    "first part": f"{EACH}{{{{ m.content[0].text }}}}{END}",
    "first part, item": f"{EACH}{{{{ m['content'][0]['text'] }}}}{END}",
    "generation": f"{EACH}{{% generation %}}{{% for p in m.content %}}{END}{{% endgeneration %}}{END}",
}
TEXT = {
    "printed": f"{EACH}{{{{ m.role ~ m.content }}}}{END}",
    "lines": f"{EACH}{{% for line in m.content.split() %}}{{{{ line }}}}{END}{END}",
    "lines in a variable": f"{EACH}{{% set lines = m.content.split('x') %}}{{% for line in lines %}}{END}{END}",
    "trimmed": f"{EACH}{{% set c = m.content | trim %}}{{% for word in (c ~ '').split() %}}{END}{END}",
    "added to": f"{EACH}{{% set c = m.content + eos_token %}}{{% for letter in c %}}{END}{END}",
    "thinking cut off": f"{EACH}{{% set c = m.content.split('</think>')[-1] %}}{{{{ c }}}}{END}",
    "tool calls": f"{EACH}{{% for call in m.tool_calls %}}{{{{ call.function.name }}}}{END}{{{{ m.content }}}}{END}",
    "documents": f"{{% for d in documents %}}{{% for line in d.content %}}{END}{END}",
    "tools": f"{{% for t in tools %}}{{% for c in t.content %}}{END}{END}",
    "items": f"{EACH}{{% for key, value in m.items() %}}{{{{ value }}}}{END}{END}",
    "numbers": f"{EACH}{{% for k in range(m.content | length) %}}{END}{END}",
    "contents joined": "{{ messages | map(attribute='content') | join }}",
    "block": f"{EACH}{{% set c %}}{{{{ m.content }}}}{{% endset %}}{{% for letter in c %}}{END}{END}",
    "nothing": "{{ bos_token }}",
}


@pytest.mark.parametrize("name", PARTS)
def test_templates_that_take_parts(name: str) -> None:
    assert ChatTemplate(PARTS[name]).content_format == "openai"


@pytest.mark.parametrize("name", TEXT)
def test_templates_that_take_text(name: str) -> None:
    assert ChatTemplate(TEXT[name]).content_format == "string"


@pytest.mark.parametrize(("asked", "level"), [("auto", "INFO"), ("openai", "INFO"), ("string", "WARNING")])
def test_the_format_is_logged_once(asked: str, level: str, caplog: pytest.LogCaptureFixture) -> None:
    config = resolve({"model": "demo", "chat_template_content_format": asked}, read_environment({}))
    template = ChatTemplate(PARTS["variable"], asked)
    assert template.content_format == ("string" if asked == "string" else "openai")
    with caplog.at_level(logging.INFO, "fuseline"):
        log_content_format(config, template)
        log_content_format(config, None)
    assert [record.levelname for record in caplog.records] == [level] and "openai" in caplog.text
    assert ("--chat-template-content-format" in caplog.text) == (level == "WARNING")


def test_parts_reach_the_template_with_all_they_have() -> None:
    template = EACH + "{% for p in m.content %}[{{ p.type }} {{ p.text }} {{ p.mark }}]" + END + END
    made = preparer(chat_template=template)
    parts = ["a", {"text": "b"}, {"type": "text", "text": "c", "mark": 1}, {"type": "refusal", "refusal": "d"}]
    assert shown(made, parts) == "[text a ][text b ][text c 1][text d ]"
    assert shown(made, "e") == "[text e ]" and shown(made, "") == "[text  ]"
    assert shown(preparer(chat_template="{{ messages[0].content }}"), parts) == "a\nb\nc\nd"


@pytest.mark.parametrize(("template", "text"), [("{{ messages[0].content | tojson }}", '""'), (PARTS["item"], "")])
def test_no_content_is_no_parts(template: str, text: str) -> None:
    for content in (None, []):
        assert shown(preparer(chat_template=template + "!"), content) == text + "!"


def shown(made: Preparer, content: Any) -> str:
    """The prompt of a message."""
    reply = made.prepare("chat", body(messages=[{"role": "user", "content": content}], max_tokens=1))
    return reply.text
