"""Commands that tell about this machine and about the commands."""

from __future__ import annotations

import subprocess

import pytest

from fuseline.api.cli import HANDLERS, main
from fuseline.api.cli_parser import COMMANDS


def test_every_command_is_told_and_handled() -> None:
    assert list(HANDLERS) == list(COMMANDS)


def test_the_report_of_a_machine(capsys, monkeypatch) -> None:
    monkeypatch.setenv("FUSELINE_API_KEY", "xyzzy")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "debug")
    assert main(["collect-env"]) == 0
    out = capsys.readouterr().out
    facts = dict(text.split("  ", 1) for text in out.splitlines())
    assert {"fuseline", "python", "platform", "memory", "torch", "transformers", "instruction sets"} <= set(facts)
    assert facts["FUSELINE_API_KEY"].strip() == "***" and "xyzzy" not in out
    assert facts["FUSELINE_LOGGING_LEVEL"].strip() == "debug"


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh", "fish"])
def test_completion_scripts_know_the_flags(shell: str, capsys) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("max-model-len", "run-batch", "collect-env"))


def test_bash_completes_a_flag(tmp_path, capsys) -> None:
    main(["completion", "bash"])
    file = tmp_path / "c.sh"
    file.write_text(capsys.readouterr().out)
    words = "COMP_WORDS=(fuseline serve --max-model-l); COMP_CWORD=2"
    asked = f'source "$0"; {words}; _shtab_fuseline; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", asked, str(file)], capture_output=True, text=True, timeout=20)
    assert done.stdout.split() == ["--max-model-len"], done.stderr


def test_an_unknown_shell_is_a_usage_error() -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["completion", "cmd"])
