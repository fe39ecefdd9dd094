"""Conversations are rendered as Transformers renders them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from prompt_cases import body, preparer
from tokenizer_kinds import write_json

from fuseline.api.config import ConfigError, demo_dir
from fuseline.api.prompt.prepare import Preparer
from fuseline.api.prompt.prepared import Prepared, Refused

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{%- generation -%}{{ m.content }}{{ eos_token }}"
    "{%- endgeneration -%}{%- else -%}{{ m.content }}{%- endif -%}{%- endfor -%}"
)
TOJSON = [
    "tojson", "tojson(indent=2)", "tojson(true)", "tojson(false, 4)", "tojson(ensure_ascii=true)",
    "tojson(separators=(',', ':'))", "tojson(sort_keys=true)", "tojson(indent=1, separators=(',', ': '))",
]  # fmt: skip
CALLS = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": "é<&", "b": [1, 2]}'}}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": None, "é": "<&>'\""}}}
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": None, "tool_calls": CALLS, "reasoning": "hm"},
    {"role": "tool", "content": "42", "tool_call_id": "c1"},
    {"role": "assistant", "content": "It is 42.", "tool_calls": [], "name": "x"},
]
TURNS = (
    "{% for m in messages %}{{ m.role }}:{% if m.content %}{{ m.content }}{% endif %}"
    "{% if m.tool_calls is defined %}CALLS{% for c in m.tool_calls %}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{{ c.function.arguments.b[1] }}{% endfor %}{% endif %}"
    "{% if 'tool_calls' in m and not m.tool_calls %}NONE{% endif %}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}){% endif %}"
    "{% if m.name is defined %}{{ m.name }}{% endif %};{% if loop.index == 99 %}{% break %}{% endif %}{% endfor %}"
)


def prompt(made: Preparer, messages: list[dict[str, Any]], **fields: Any) -> str:
    """The text that is encoded."""
    found = made.prepare("chat", body(messages=messages, max_tokens=1, **fields))
    assert isinstance(found, Prepared), found
    return found.text


def refusal(made: Preparer, messages: list[dict[str, Any]], **fields: Any) -> Refused:
    found = made.prepare("chat", body(messages=messages, max_tokens=1, **fields))
    assert isinstance(found, Refused) and found.status == 400
    return found


def theirs(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    cleaned = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return render_jinja_template(conversations=[cleaned], chat_template=template, **variables)[0][0]


@pytest.mark.parametrize("template", [CHATML, GENERATION], ids=["chatml", "generation"])
def test_prompts_are_those_of_transformers(template: str) -> None:
    made = preparer(chat_template=template)
    for messages in (HISTORY[:2], [*HISTORY[:2], HISTORY[4]]):
        texts = [{"role": m["role"], "content": m["content"]} for m in messages]
        expected = theirs(template, texts, add_generation_prompt=True, eos_token="<|im_end|>")
        assert prompt(made, messages) == expected


@pytest.mark.parametrize("call", TOJSON)
def test_json_is_written_as_by_transformers(call: str) -> None:
    template = f"{{{{ tools | {call} }}}}{{{{ documents | {call} }}}}"
    documents = [{"title": "é", "text": "<b>"}]
    made = preparer(chat_template=template)
    shown = prompt(made, HISTORY[:2], chat_template_kwargs={"tools": [TOOL]}, documents=documents)
    assert shown == theirs(template, HISTORY[:2], tools=[TOOL], documents=documents)


def test_arguments_that_json_does_not_have_are_refused() -> None:
    assert "TypeError" in refusal(preparer(chat_template="{{ messages | tojson(default=1) }}"), HISTORY[:1]).message


def test_history_reaches_the_template_as_in_transformers() -> None:
    parsed = json.loads(json.dumps(HISTORY))
    parsed[2]["tool_calls"][0]["function"]["arguments"] = json.loads(CALLS[0]["function"]["arguments"])
    del parsed[4]["tool_calls"]
    shown = prompt(preparer(chat_template=TURNS), HISTORY)
    assert shown == theirs(TURNS, parsed)
    assert "NONE" not in shown and "(hm|hm|hm)" in shown and shown.count("CALLS") == 1


@pytest.mark.parametrize("arguments", [{"arguments": ""}, {"arguments": None}, {"arguments": "{}"}, {}])
def test_a_call_without_arguments_has_an_empty_object(arguments: dict[str, Any]) -> None:
    made = preparer(chat_template="{{ messages[0].tool_calls[0].function.arguments | tojson }}")
    calls = [{"type": "function", "function": {"name": "f", **arguments}}]
    assert prompt(made, [{"role": "assistant", "content": None, "tool_calls": calls}]) == "{}"


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "-,-"),
        ({"reasoning_effort": "high"}, "high,-"),
        ({"reasoning_effort": "none"}, "none,False"),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, "none,True"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}, "high,-"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "-,False"),
    ],
)
def test_reasoning_effort_is_a_variable(fields: dict[str, Any], shown: str) -> None:
    made = preparer(chat_template="{{ reasoning_effort | default('-') }},{{ enable_thinking | default('-') }}")
    assert prompt(made, HISTORY[:2], **fields) == shown


def test_defaults_of_the_server_give_way() -> None:
    made = preparer(
        chat_template="{{ a }}{{ enable_thinking }}", default_chat_template_kwargs={"a": 1, "enable_thinking": 5}
    )
    assert prompt(made, HISTORY[:1]) == "15"
    assert prompt(made, HISTORY[:1], reasoning_effort="none", chat_template_kwargs={"a": 2}) == "2False"


# An answer that is begun.

BEGINNINGS = [
    "Sure, ",
    "{\n",
    "<",
    "",
    " ",
    "\n\n",
    " a ",
    "a",
    "system",
    "<|im",
    "Sure,\n\n```json\n",
    "CONTINUE",
    "é中🙂 ",
]
TEMPLATES = {
    "chatml": CHATML,
    "trimmed": CHATML.replace("m.content", "m.content | trim"),
    "again": CHATML + "{{ messages | length }}{{ messages[0].content }}",
    "if there is any": CHATML.replace("m.content +", "(m.content if m.content else 'nothing') +"),
    "parts": "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}[end]{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}[end]{% endfor %}",
}


def begun(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Say < Sure, a {"}, {"role": "assistant", "content": content}]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("content", BEGINNINGS)
def test_a_begun_answer_stays_to_the_letter(template: str, content: str) -> None:
    made = preparer(chat_template=TEMPLATES[template])
    closed = prompt(made, begun("MARK"), add_generation_prompt=False)
    assert prompt(made, begun(content), continue_final_message=True) == closed[: closed.index("MARK")] + content


@pytest.mark.parametrize("content", ["Sure, ", "{\n", "<", "a", "Sure,\n\n```json\n"])
def test_a_begun_answer_is_what_transformers_continues(content: str) -> None:
    shown = prompt(preparer(chat_template=CHATML), begun(content), continue_final_message=True)
    assert shown == theirs(CHATML, begun(content), continue_final_message=True)


@pytest.mark.parametrize("template", ["chatml", "parts"])
def test_a_begun_answer_in_parts(template: str) -> None:
    parts = [{"type": "text", "text": "One, "}, {"type": "text", "text": "two, "}]
    made = preparer(chat_template=TEMPLATES[template])
    found = made.prepare("chat", body(messages=begun(parts), max_tokens=1, continue_final_message=True, echo=True))
    joined = "One, \ntwo, " if template == "chatml" else "One, two, "
    assert found.text.endswith(joined) and found.answer.echo == joined


@pytest.mark.parametrize("content", BEGINNINGS)
def test_echo_shows_what_was_begun(content: str) -> None:
    made = preparer(chat_template=CHATML)
    fields = {"messages": begun(content), "max_tokens": 1, "continue_final_message": True}
    found = made.prepare("chat", body(**fields, echo=True))
    assert found.answer.echo == content and found.answer.role == "assistant"
    assert made.prepare("chat", body(**fields)).answer.echo == ""


@pytest.mark.parametrize("content", [None, []])
def test_there_must_be_something_to_continue(content: Any) -> None:
    assert refusal(preparer(), begun(content), continue_final_message=True).param == "continue_final_message"


@pytest.mark.parametrize("change", ["upper", "replace('a', 'b')", "truncate(4, true)"])
def test_a_template_that_changes_the_text_is_named(change: str) -> None:
    made = preparer(chat_template=CHATML.replace("m.content", f"(m.content | {change})"))
    assert "template changes" in refusal(made, begun("a banana"), continue_final_message=True).message


# Which template.


def test_templates_of_requests_behind_their_flag() -> None:
    own = {"chat_template": "own {{ messages[0].content }}{{ bos_token }}{{ eos_token }}"}
    assert refusal(preparer(), HISTORY[1:2], **own).param == "chat_template"
    trusting = preparer(trust_request_chat_template=True)
    assert prompt(trusting, HISTORY[1:2], **own) == "own Hi<|im_end|>"
    assert prompt(trusting, HISTORY[1:2]).startswith("<|im_start|>")
    for wrong in (
        "{% if %}",
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
    ):
        assert refusal(trusting, HISTORY[1:2], chat_template=wrong).message
    parts = "{% for p in messages[0].content %}<{{ p.text }}>{% endfor %}"
    assert prompt(trusting, HISTORY[1:2], chat_template=parts) == "<Hi>"


def test_one_of_several_templates_is_for_tools(tmp_path: Path) -> None:
    named = {"default": "plain", "tool_use": "tools {{ tools | length }}", "rag": "rag {{ documents | length }}"}
    named["bad"] = "{%"
    folder = several(tmp_path, named)
    made = preparer(tokenizer=folder)
    assert prompt(made, HISTORY[:1]) == "plain"
    assert prompt(made, HISTORY[:1], tools=[TOOL], tool_choice="none") == "plain"
    assert prompt(made, HISTORY[:1], chat_template="rag", documents=[{"text": "x"}]) == "rag 1"
    assert refusal(made, HISTORY[:1], chat_template="bad").param == "chat_template"
    assert made.renderer._choose(Asked([TOOL]))[0] is made.renderer._compile(named["tool_use"])[0]
    chosen = preparer(tokenizer=folder, chat_template="rag")
    assert chosen.renderer._choose(Asked([TOOL]))[0] is chosen.renderer.template
    with pytest.raises(ConfigError, match="neither a file nor a template"):
        preparer(tokenizer=folder, chat_template="unknown")


def several(folder: Path, named: dict[str, str]) -> str:
    """The bundled model's tokenizer with templates of several names."""
    shutil.copy(demo_dir() / "tokenizer.json", folder)
    config = json.loads((demo_dir() / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "config.json", {"model_type": "llama"})
    return str(folder)


class Asked:
    """Fields of a request with tools."""

    chat_template = tool_choice = None

    def __init__(self, tools: list[dict[str, Any]]) -> None:
        self.tools = tools
