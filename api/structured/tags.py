"""Structural tags: xgrammar's description of free text with structures in it. JSON schemas become our own grammars."""

from __future__ import annotations

import json
from typing import Any

from fuseline.api.errors import ApiError, bad_request
from fuseline.api.structured.counts import check_grammar_counts
from fuseline.api.structured.ebnf import Rules
from fuseline.api.structured.regex import RegexGrammar
from fuseline.api.structured.schema import SchemaGrammar

MAX_DEPTH = 64


def tag_grammar(form: Any, param: str) -> str:
    """The JSON that xgrammar compiles. `form` has `structures` and `triggers`, or `format`. Raises ApiError 400."""
    if not isinstance(form, dict):
        raise bad_request(f"{param} must be an object", param)
    if "structures" in form:
        form = {"format": _legacy(form, param)}
    if not isinstance(form.get("format"), dict):
        raise bad_request(f"{param} needs a format, or structures and triggers", param)
    return json.dumps({"type": "structural_tag", "format": _replaced(form["format"], param, 0)})


def _legacy(form: dict[str, Any], param: str) -> dict[str, Any]:
    structures, triggers = form["structures"], form.get("triggers")
    if not isinstance(structures, list) or not structures or not isinstance(triggers, list) or not triggers:
        raise bad_request(f"{param}: structures and triggers must be lists that are not empty", param)
    tags = []
    for item in structures:
        if not isinstance(item, dict) or not isinstance(item.get("begin"), str) or not isinstance(item.get("end"), str):
            raise bad_request(f"{param}: a structure has begin, schema and end", param)
        content = {"type": "json_schema", "json_schema": item.get("schema", {"type": "object"})}
        tags.append({"type": "tag", "begin": item["begin"], "content": content, "end": item["end"]})
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


def _replaced(value: Any, param: str, depth: int) -> Any:
    """The same tree with a grammar in the place of each JSON schema."""
    if depth > MAX_DEPTH:
        raise _refuse(param, "is nested too deeply")
    if isinstance(value, list):
        return [_replaced(item, param, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "json_schema":
        extra = sorted(set(value) - {"type", "json_schema", "style"})
        if extra or value.get("style", "json") != "json":
            raise _refuse(param, f"{extra[0] if extra else 'style'} of json_schema is not supported")
        rules = Rules()
        root = SchemaGrammar(value.get("json_schema", True), rules, param).expression()
        return {"type": "grammar", "grammar": rules.text(root)}
    if value.get("type") == "regex" and isinstance(value.get("pattern"), str):
        rules = Rules()
        root = RegexGrammar(rules, param).expression(value["pattern"])
        return {"type": "grammar", "grammar": rules.text(root)}
    if value.get("type") == "grammar" and isinstance(value.get("grammar"), str):
        check_grammar_counts(value["grammar"], param, is_lark=False)
    return {key: _replaced(item, param, depth + 1) for key, item in value.items()}


def _refuse(param: str, reason: str) -> ApiError:
    return bad_request(f"{param}: {reason}", param, "unsupported_value")
