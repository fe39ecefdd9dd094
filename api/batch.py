"""`fuseline run-batch -i FILE -o FILE`: an OpenAI batch file, answered by an engine in this process.

Lines of the input: {"custom_id", "method": "POST", "url": "/v1/...", "body"}; of the output, in the same order:
{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}. One of response and error is null.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuseline.api import cli_tables as tables
from fuseline.api.cli_parser import command_parser, parse_values
from fuseline.api.config import ConfigError

ROUTES = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/score", "/v1/rerank", "/score",
    "/rerank", "/pooling",
)  # fmt: skip
BATCH_GROUPS = (*tables.ENGINE_GROUPS, "chat and answers", "bounds of a request")


@dataclass(frozen=True)
class Line:
    """One request, or why it is none."""

    custom_id: str | None
    path: str = ""
    body: dict[str, Any] | None = None
    error: str = ""


def run_batch_file(arguments: Sequence[str]) -> int:
    """Entry of the subcommand; returns the exit status: 0 once every line has its answer, also where that is an error.

    Raises ConfigError for files that cannot be read or written and for an engine that does not start.
    """
    parser = command_parser("run-batch", BATCH_GROUPS)
    group = parser.add_argument_group("files")
    group.add_argument("-i", "--input-file", required=True, metavar="FILE", help="requests, one JSON object a line")
    group.add_argument("-o", "--output-file", required=True, metavar="FILE", help="where the answers go")
    values = parse_values(parser, arguments)
    source, target = Path(str(values.pop("input_file"))), Path(str(values.pop("output_file")))
    lines = read_lines(source)
    if not target.parent.is_dir():
        raise ConfigError(f"--output-file: there is no directory {target.parent}")
    answers = answer_lines(lines, values)
    write_lines(target, answers)
    failed = sum(answer["error"] is not None or answer["response"]["status_code"] != 200 for answer in answers)
    print(f"{len(answers)} requests, {failed} of them failed; the answers are in {target}", file=sys.stderr)
    return 0


def read_lines(path: Path) -> list[Line]:
    """Raises ConfigError for a file that cannot be read; a bad line becomes an error of its own."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin files with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--input-file {path} cannot be read: {reason}") from error
    return [read_line(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_line(text: str, number: int) -> Line:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Line(None, error=f"line {number} is no valid JSON: {error}")
    if not isinstance(fields, dict):
        return Line(None, error=f"line {number} is no JSON object")
    custom_id, path, body = fields.get("custom_id"), fields.get("url"), fields.get("body")
    problems = {
        "custom_id must be a text": not isinstance(custom_id, str),
        f"method must be POST, not {fields.get('method')!r}": fields.get("method", "POST") != "POST",
        f"url must be one of {', '.join(ROUTES)}, not {path!r}": path not in ROUTES,
        "body must be an object": not isinstance(body, dict),
        "body.stream cannot be true: a batch has no streams": isinstance(body, dict) and bool(body.get("stream")),
    }
    wrong = next((problem for problem, is_wrong in problems.items() if is_wrong), "")
    name = custom_id if isinstance(custom_id, str) else None
    return Line(name, error=f"line {number}: {wrong}") if wrong else Line(name, path, body)


def answer_lines(lines: Sequence[Line], values: dict[str, object]) -> list[dict[str, Any]]:
    """The output lines. `values`: settings of the engine."""
    from fuseline.api.llm import LLM
    from fuseline.engine.client import EngineStartError

    requests = [(line.path, line.body) for line in lines if not line.error]
    if not requests:
        return [_output(line, None) for line in lines]
    try:
        with LLM(**{"model": "demo", **values}) as llm:
            answers = iter(llm.run_batch(requests))
    except EngineStartError as error:
        raise ConfigError(str(error)) from error
    return [_output(line, None if line.error else next(answers)) for line in lines]


def _output(line: Line, answer: tuple[int, dict[str, Any]] | None) -> dict[str, Any]:
    found = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id, "response": None, "error": None}
    if answer is None:
        return found | {"error": {"code": "invalid_request", "message": line.error}}
    status, body = answer
    request_id = body.get("id") or f"req_{uuid.uuid4().hex}"
    return found | {"response": {"status_code": status, "request_id": request_id, "body": body}}


def _written(answer: dict[str, Any]) -> str:
    """JSON in one line; half a surrogate pair, which JSON can name and UTF-8 cannot hold, stays an escape."""
    text = json.dumps(answer, ensure_ascii=False)
    return text if text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text) else json.dumps(answer)


def write_lines(path: Path, answers: Sequence[dict[str, Any]]) -> None:
    """All of them or none. Raises ConfigError."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(_written(answer) + "\n" for answer in answers)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"--output-file {path} cannot be written: {error.strerror}") from error
