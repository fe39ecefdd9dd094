"""`fuseline run-batch`: lines in, lines out, on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fuseline.api.batch import read_line
from fuseline.api.cli import main

CHAT = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}


def line(custom_id: object, url: str = "/v1/chat/completions", body: Any = None, **more: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body or CHAT, **more})


def test_a_file_is_answered_in_order(tmp_path: Path, capsys) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        line("a"), "", line("b", "/v1/completions", {"prompt": "Once", "max_tokens": 3, "temperature": 0}),
        line("c", body={**CHAT, "temperature": 9}), "{broken", line("d", body={**CHAT, "stream": True}),
        line("é\u2028"),
    ]  # fmt: skip
    source.write_text("\n".join(lines) + "\n")
    assert main(["run-batch", "-i", str(source), "-o", str(target), "demo", "--max-num-seqs", "4"]) == 0
    answers = [json.loads(text) for text in target.read_text().split("\n")[:-1]]
    assert [answer["custom_id"] for answer in answers] == ["a", "b", "c", None, "d", "é\u2028"]
    assert len({answer["id"] for answer in answers}) == 6
    done = [answer["response"] and answer["response"]["status_code"] for answer in answers]
    assert done == [200, 200, 400, None, None, 200]
    assert [answer["error"] is None for answer in answers] == [True, True, True, False, False, True]
    assert answers[0]["response"]["body"]["choices"][0]["message"]["content"]
    assert answers[1]["response"]["body"]["usage"]["completion_tokens"] == 3
    assert answers[1]["response"]["request_id"] == answers[1]["response"]["body"]["id"]
    assert answers[2]["response"]["body"]["error"]["param"] == "temperature"
    assert "line 5 is no valid JSON" in answers[3]["error"]["message"]
    assert "6 requests, 3 of them failed" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "no JSON object"),
        ("[" * 100000, "no valid JSON"),
        (line(3), "custom_id must be a text"),
        (line("a", method="GET"), "method must be POST, not 'GET'"),
        (line("a", "/v1/models"), "url must be one of /v1/chat/completions, "),
        (line("a", "/sleep"), "url must be one of"),
        (line("a", body=[1]), "body must be an object"),
        (line("a", body={"stream": True}), "a batch has no streams"),
    ],
)
def test_lines_that_are_no_requests(text: str, words: str) -> None:
    assert words in read_line(text, 7).error and read_line(text, 7).error.startswith("line 7")


def test_files_that_cannot_be_used(tmp_path: Path, capsys) -> None:
    source = tmp_path / "in.jsonl"
    for arguments, words in (
        (["-i", str(tmp_path / "none"), "-o", str(tmp_path / "out")], "--input-file"),
        (["-i", str(source), "-o", "/no/such/out"], "no directory /no/such"),
        (["-i", str(source), "-o", str(tmp_path)], "--output-file"),
    ):
        source.write_text("\n")
        assert main(["run-batch", *arguments]) == 1
        captured = capsys.readouterr().err
        assert captured.startswith("fuseline: error: ") and words in captured and captured.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        main(["run-batch"])


def test_text_that_utf_8_cannot_hold_loses_no_answer(tmp_path: Path) -> None:
    """Half a surrogate pair in an id or an error, and a mark at the file's beginning."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = ('{"custom_id": "\\ud800", "url": "/v1/x", "body": {}}', '{"custom_id": "é", "url": "\\udc00", "body": {}}')
    source.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    assert main(["run-batch", "-i", str(source), "-o", str(target)]) == 0
    answers = [json.loads(text) for text in target.read_text(encoding="utf-8").splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["\ud800", "é"]
    assert all("url must be one of" in answer["error"]["message"] for answer in answers)
