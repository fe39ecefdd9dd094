"""Structured output: fields of a request to the grammar that its answer is held to (SPEC 8)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from fuseline.api.errors import bad_request
from fuseline.api.prompt.backends import choose_backend
from fuseline.api.protocol.common import GenerateRequest
from fuseline.api.structured.counts import check_grammar_counts, check_regex_counts, check_schema_counts
from fuseline.api.structured.ebnf import BLOCK, MAX_BYTES, Rules, choice, literal, one_of, repeat, sequence, too_large
from fuseline.api.structured.json_text import NO_WHITESPACE, WHITESPACE
from fuseline.api.structured.portable import portable_patterns, portable_regex, quoted_regex
from fuseline.api.structured.regex import RegexGrammar
from fuseline.api.structured.schema import Schema, SchemaGrammar
from fuseline.api.structured.tags import tag_grammar
from fuseline.engine.params import GrammarSpec

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
OPTIONS = ("whitespace_pattern", "disable_any_whitespace", "disable_fallback", "disable_additional_properties")
PLAIN_WHITESPACE = "[ ]?"
"""Between JSON's tokens where packages of other backends compile a schema."""
LARK_RULE = re.compile(r"^\s*[!?]?[a-zA-Z_]\w*(\.-?\d+)?\s*:(?!:=)", re.MULTILINE)
LONG_COUNT = re.compile(r"(?<=[{,~.])\s*(\d{2,10})(?=\s*(?:[,}\n.]|$))")
"""Counts of repetitions, {m,n} of both and ~ m..n of Lark."""
GBNF_RULE = re.compile(r"^\s*[a-zA-Z_][\w-]*\s*::=", re.MULTILINE)


@dataclass(frozen=True)
class TaggedSchema:
    """A JSON value between two markers. A marker's integers are token ids, for special tokens that no text spells."""

    begin: str | tuple[str | int, ...]
    schema: Schema | None
    """None: any JSON object."""
    end: str | tuple[str | int, ...] = ""


def structured_spec(
    tags: Sequence[TaggedSchema],
    *,
    prefix: str | tuple[str | int, ...] = "",
    separator: str = "",
    suffix: str | tuple[str | int, ...] = "",
    most: int | None = None,
    starts_after: tuple[int, ...] = (),
    param: str = "tools",
) -> GrammarSpec:
    """The grammar of tool calls: `prefix`, at least one of the tags (at most `most`) with `separator` between them,
    `suffix`. Raises ApiError 400 that names `param`.
    """
    rules = Rules()
    calls = [
        sequence(_marker(tag.begin), SchemaGrammar(_schema_of(tag), rules, param).arguments(), _marker(tag.end))
        for tag in tags
    ]
    call = rules.add(choice(calls), "call")
    more = repeat(sequence(literal(separator) if separator else "", call), 0, None if most is None else most - 1)
    root = sequence(_marker(prefix), call, "" if most == 1 else more, _marker(suffix))
    return GrammarSpec(kind="ebnf", text=rules.text(root), starts_after=starts_after)


def json_spec(
    schema: Schema, *, param: str = "response_format", whitespace: str = WHITESPACE, starts_after: tuple[int, ...] = ()
) -> GrammarSpec:
    """The grammar of the JSON values that are valid under a schema. Raises ApiError 400."""
    rules = Rules()
    root = SchemaGrammar(schema, rules, param, whitespace).expression()
    return GrammarSpec(kind="ebnf", text=rules.text(root), starts_after=starts_after)


def request_spec(request: GenerateRequest, default_backend: str = "xgrammar") -> GrammarSpec | None:
    """The grammar that a request asks for; None if it asks for none. Raises ApiError 400."""
    found = _asked(request)
    if not found:
        return None
    if len(found) > 1:
        names = ", ".join(name for name, _, _ in found)
        message = f"You can only use one kind of guided decoding but multiple are specified: {names}"
        raise bad_request(message, found[0][0])
    param, kind, value = found[0]
    whitespace, pattern = _whitespace(request)
    backend = request.guided_decoding_backend or default_backend
    if param.startswith("structured_outputs"):
        backend = (request.structured_outputs or {}).get("backend") or backend
    value = _parsed(value, param) if kind in ("json", "structural_tag") else value
    name = choose_backend(backend, kind, value, pattern is not None, "guided_decoding_backend")
    try:
        if name == "xgrammar":
            return _MAKERS[kind](value, param, whitespace)
        return _package_spec(name, kind, value, param, pattern)
    except RecursionError as error:
        raise bad_request(f"{param} is nested too deeply", param) from error


def has_format(request: GenerateRequest) -> bool:
    """Whether the grammar of a request is that of its response_format."""
    return request.response_format is not None and request.response_format.type != "text"


def _asked(request: GenerateRequest) -> list[tuple[str, str, Any]]:
    """(field, kind, value) of each grammar that a request names."""
    guided = {
        "json": request.guided_json, "regex": request.guided_regex, "choice": request.guided_choice,
        "grammar": request.guided_grammar,
    }  # fmt: skip
    found = [(f"guided_{kind}", kind, value) for kind, value in guided.items() if value is not None]
    outputs = request.structured_outputs
    if outputs is not None:
        unknown = sorted(set(outputs) - {*KINDS, *OPTIONS, "backend"})
        if unknown:
            raise bad_request(f"structured_outputs: {unknown[0]!r} is not known", "structured_outputs")
        _check_options(outputs)
        named = [(f"structured_outputs.{kind}", kind, outputs[kind]) for kind in KINDS if outputs.get(kind) is not None]
        named = [item for item in named if item[1:] != ("json_object", False)]
        if not named:
            raise bad_request(f"structured_outputs needs one of {', '.join(KINDS)}", "structured_outputs")
        found += named
    form = request.response_format
    if not has_format(request):
        return found
    if form.type == "json_object":
        return [*found, ("response_format", "json_object", True)]
    if form.type == "json_schema":
        inner = form.json_schema and form.json_schema.model_extra
        if inner is None:
            raise bad_request("response_format.json_schema must be an object with a schema", "response_format")
        schema = inner.get("schema", inner.get("json_schema"))
        if schema is None:
            raise bad_request("response_format.json_schema.schema is missing", "response_format")
        return [*found, ("response_format", "json", schema)]
    if form.type == "structural_tag":
        return [*found, ("response_format", "structural_tag", form.model_extra or {})]
    raise bad_request(
        f"unknown response_format.type {form.type!r} (text, json_object, json_schema or structural_tag)",
        "response_format.type",
    )  # fmt: skip


def _check_options(outputs: dict[str, Any]) -> None:
    for name in ("json_object", *OPTIONS, "backend"):
        is_text, value = name in ("whitespace_pattern", "backend"), outputs.get(name)
        if value is not None and not isinstance(value, str if is_text else bool):
            words = "a string" if is_text else "true or false"
            raise bad_request(f"structured_outputs.{name} must be {words}", f"structured_outputs.{name}")


def _whitespace(request: GenerateRequest) -> tuple[str, str | None]:
    """(expression of the whitespace between JSON's tokens, the regex that the request gives for it)."""
    outputs = request.structured_outputs or {}
    pattern = request.guided_whitespace_pattern
    param = "guided_whitespace_pattern"
    if pattern is None:
        pattern, param = outputs.get("whitespace_pattern"), "structured_outputs.whitespace_pattern"
    if pattern is None:
        return (NO_WHITESPACE, "") if outputs.get("disable_any_whitespace") else (WHITESPACE, None)
    if not isinstance(pattern, str):
        raise bad_request(f"{param} must be a string", param)
    rules = Rules()
    body = RegexGrammar(rules, param).expression(pattern)
    if set(re.findall(r"\\u[0-9a-f]{4}|\\U[0-9a-f]{8}", body)) - {f"\\u{ord(char):04x}" for char in " \t\n\r"} or (
        re.search(r"[A-Za-z0-9]", re.sub(r"\\u[0-9a-f]{4}|\\U[0-9a-f]{8}|\{[\d,]*\}", "", body))
    ):
        raise bad_request(f"{param} may match blanks, tabs and line ends only", param)
    return body, pattern


def _package_spec(name: str, kind: str, value: Any, param: str, whitespace: str | None) -> GrammarSpec:
    """The grammar for a backend that is a package of its own: what the client gave, as it is."""
    if kind == "grammar":
        return replace(_grammar(value, param, ""), backend=name)
    if kind in ("json", "json_object"):
        schema = {"type": "object"} if kind == "json_object" else _schema(value, param)
        check_schema_counts(schema, param)
        schema = portable_patterns(schema, is_whole=name == "outlines")
        text = json.dumps({"schema": schema, "whitespace": PLAIN_WHITESPACE if whitespace is None else whitespace})
        if len(text) > MAX_BYTES:
            raise too_large()
        return GrammarSpec(kind="json_schema", text=text, backend=name)
    if kind == "choice":
        return GrammarSpec(kind="regex", text="|".join(map(quoted_regex, _choices(value, param))), backend=name)
    check_regex_counts(_text(value, param), param)
    return GrammarSpec(kind="regex", text=portable_regex(value), backend=name)


def _schema(value: Any, param: str) -> Schema:
    if not isinstance(value, dict | bool):
        raise bad_request(f"{param} must be a JSON schema: an object", param)
    return value


def _json(value: Any, param: str, whitespace: str) -> GrammarSpec:
    return json_spec(_schema(value, param), param=param, whitespace=whitespace)


def _json_object(value: Any, param: str, whitespace: str) -> GrammarSpec:
    return json_spec({"type": "object"}, param=param, whitespace=whitespace)


def _regex(value: Any, param: str, whitespace: str) -> GrammarSpec:
    rules = Rules()
    root = RegexGrammar(rules, param).expression(_text(value, param))
    return GrammarSpec(kind="ebnf", text=rules.text(root))


def _choice(value: Any, param: str, whitespace: str) -> GrammarSpec:
    rules = Rules()
    return GrammarSpec(kind="ebnf", text=rules.text(one_of(rules, _choices(value, param))))


def _choices(value: Any, param: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise bad_request(f"{param} must be a list of strings that are not empty", param)
    return value


def _grammar(value: Any, param: str, whitespace: str) -> GrammarSpec:
    text = _text(value, param)
    is_slow = _has_long_count(text)
    if GBNF_RULE.search(text):
        check_grammar_counts(text, param, is_lark=False)
        return GrammarSpec(kind="ebnf", text=text, is_slow=is_slow)
    if LARK_RULE.search(text):
        check_grammar_counts(text, param, is_lark=True)
        return GrammarSpec(kind="lark", text=text, is_slow=is_slow)
    raise bad_request(f"{param} has no rule (root ::= ... of GBNF, start: ... of Lark)", param)


def _structural_tag(value: Any, param: str, whitespace: str) -> GrammarSpec:
    text = tag_grammar(value, param)
    return GrammarSpec(kind="structural_tag", text=text, is_slow=_has_long_count(text))


def _has_long_count(text: str) -> bool:
    """Whether a client's own grammar has a count in whose midst masks take long."""
    return any(int(count) > BLOCK for count in LONG_COUNT.findall(text))


_MAKERS = {
    "json": _json, "json_object": _json_object, "regex": _regex, "choice": _choice, "grammar": _grammar,
    "structural_tag": _structural_tag,
}  # fmt: skip


def _parsed(value: Any, param: str) -> Any:
    """The value, read if it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise bad_request(f"{param} is no valid JSON: {error}", param) from error


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise bad_request(f"{param} must be a string that is not empty", param)
    if len(value) > MAX_BYTES:
        raise too_large()
    return value


def _schema_of(tag: TaggedSchema) -> Schema:
    return {"type": "object"} if tag.schema is None else tag.schema


def _marker(marker: str | tuple[str | int, ...]) -> str:
    parts = (marker,) if isinstance(marker, str) else marker
    return sequence(*(f"Token({part})" if isinstance(part, int) else literal(part) for part in parts if part != ""))
