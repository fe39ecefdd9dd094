"""Every command that the documents show is taken by the real parsers; no flag is named that is refused."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable

import pytest
from doc_commands import DERIVED, PAGES, ROOT, Command, all_commands, commands_of_text, flags_of_script, words_of

from fuseline.api import cli, llm
from fuseline.api import cli_tables as tables
from fuseline.api.bench import command as bench
from fuseline.api.bench import kernels, offline, startup
from fuseline.api.cli_flags import config_flags, row_flags
from fuseline.api.config_resolve import resolve
from fuseline.compile import report, target

DEMO = str(ROOT / "csrc" / "pkg" / "demo")
COMMANDS = all_commands()
PLACEHOLDERS = {"MODEL": DEMO, "file.gguf": DEMO, "135m": DEMO, "0.5b": DEMO, "NAME": "join_linears", "N": "1"}
KEEPS_VALUE = ("--shapes",)
"""Flags whose value is no checkpoint, though it is spelled like the name of one."""


class NotStarted(Exception):
    """Everything was parsed and resolved; now it would start."""


@pytest.fixture
def dry(monkeypatch, tmp_path) -> Callable[[list[str]], None]:
    """Runs `fuseline` as far as its configuration. Raises SystemExit or ConfigError as it does."""

    def stop(*_: object, **__: object) -> None:
        raise NotStarted

    def resolve_only(model: str = "", **values: object) -> None:
        resolve({"model": model, **values})
        raise NotStarted

    def check_serve(words: list[str]) -> None:
        assert cli.main(["serve", *words, "--print-config"]) == 0
        raise NotStarted

    monkeypatch.setattr(llm, "LLM", resolve_only)
    monkeypatch.setattr(offline, "measure", lambda values, _: resolve_only(**values))
    monkeypatch.setattr(startup, "read_once", check_serve)
    monkeypatch.setattr(kernels, "measure_machine", stop)
    monkeypatch.setattr(bench, "bench_serve", stop)
    monkeypatch.setattr(bench, "require_matplotlib", lambda: None)
    monkeypatch.setattr(report, "explain", stop)
    monkeypatch.setattr("fuseline.api.run.converse", stop)
    monkeypatch.setattr("fuseline.api.save_shards.save_shards", stop)
    monkeypatch.setattr("fuseline.api.remote.Remote.stream_completion", stop)
    monkeypatch.setattr("fuseline.api.cli_cache.clear", stop)
    monkeypatch.setattr("fuseline.compile.checkpoint_writer.plan.make_plan", stop)
    monkeypatch.setenv("FUSELINE_CACHE_ROOT", str(tmp_path))
    (tmp_path / "flags.yaml").write_text("")

    def run(words: list[str]) -> None:
        words = [str(tmp_path / "flags.yaml") if word == "FILE" else word for word in words]
        try:
            status = check_serve(words[1:]) if words[0] == "serve" else cli.main(words)
        except NotStarted:
            return
        assert status == 0

    return run


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_shown_command_is_taken(command: Command, dry, monkeypatch) -> None:
    words, rest = command.words, list(command.words[1:])
    if words[0] == "fuseline":
        for variant in variants(rest):
            accepted(dry, variant, monkeypatch)
    elif words[0] == "make":
        assert {word for word in rest if "=" not in word and not word.startswith("-")} <= make_targets()
    elif words[0] in ("python", "python3", "gpu_check"):
        check_script(["tools/gpu_check", *rest] if words[0] == "gpu_check" else rest)
    elif words[0] == "pip":
        asked = set(",".join(re.findall(r"\[([\w,]+)\]", " ".join(rest))).split(",")) - {""}
        assert asked <= extras().keys()
    elif len(words) == 1:
        assert re.split("[.=]", words[0])[0] in all_flags(), f"{words[0]} is refused, or there is no such flag"
    else:
        check_flags(list(words), dry, monkeypatch)


def accepted(dry, words: list[str], monkeypatch) -> None:
    """On this machine or, what a GPU alone can do, on one that has a GPU."""
    words = [
        PLACEHOLDERS.get(word, word) if before not in KEEPS_VALUE else word
        for before, word in zip(["", *words], words, strict=False)
    ]
    if not words:
        return  # `fuseline` as the name of the project
    if "-h" in words or "--help" in words:
        with pytest.raises(SystemExit, match="^0$"):
            cli.main(words)
        return
    try:
        dry(words)
    except (SystemExit, AssertionError):
        monkeypatch.setattr(target, "_missing_at_first_sight", lambda: "")
        dry(words)


def variants(words: list[str]) -> list[list[str]]:
    """auto|cuda stands for two commands."""
    at = next((index for index, word in enumerate(words) if re.fullmatch(r"\w+(\|\w+)+", word)), None)
    return [words] if at is None else [[*words[:at], word, *words[at + 1 :]] for word in words[at].split("|")]


def check_script(words: list[str]) -> None:
    """The script is there and has the flags. What is run with -m is not ours."""
    options = [word for word in words if word.startswith("-")]
    if "-m" in options or "-c" in options:
        return
    path = ROOT / next(word for word in words if not word.startswith("-"))
    files = sorted(path.glob("*.py")) if (path / "__main__.py").is_file() else [path]
    assert files[0].is_file(), f"there is no {path.relative_to(ROOT)}"
    used, taken = {option.partition("=")[0] for option in options} - {"-P"}, set().union(*map(flags_of_script, files))
    assert used <= taken, f"{path.name} has no {sorted(used - taken)}"


def check_flags(words: list[str], dry, monkeypatch) -> None:
    """Flags with values: of a script, or taken by one of the commands."""
    if words[0].partition("=")[0] in script_flags() - serve_flags():
        return
    for command in (["serve"], ["run"], ["bench", "serve"], ["bench", "kernels"], ["bench", "offline"]):
        try:
            return accepted(dry, [*command, *words], monkeypatch)
        except (SystemExit, AssertionError):
            continue
    pytest.fail(f"no command takes {words}")


def all_flags() -> set[str]:
    return serve_flags() | script_flags()


def serve_flags() -> set[str]:
    """Flags of `fuseline serve` that are not refused, by their names, short names and --no-names."""
    flags = {flag.option: flag for flag in (*config_flags().values(), *row_flags().values())}
    shown = set(flags) | {f"--no-{name[2:]}" for name in flags} | {"-O0", "-O1", "-O2", "-O3", "-O"}
    shown |= {name for names in tables.SHORT_NAMES.values() for name in names} | {"--config", "--print-config"}
    return shown - refused_flags()


def refused_flags() -> set[str]:
    return {"--" + name.replace("_", "-") for name, row in tables.ROWS.items() if row.fate != "ignored"}


def script_flags() -> set[str]:
    """Flags of the benches of `fuseline bench`, of `fuseline run`, of benchmarks/ and tools/."""
    paths = [path for folder in ("api", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")]
    return {flag for path in paths for flag in flags_of_script(path)}


def make_targets() -> set[str]:
    """From .PHONY, without variables."""
    return set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())


def extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("page", [page for page in PAGES if page != DERIVED])
def test_no_page_names_a_flag_that_is_refused(page: str) -> None:
    """Remarks and prose too, which no parser reads."""
    named = set(re.findall(r"--[a-z][a-z-]*", (ROOT / page).read_text()))
    assert not named & refused_flags()


def test_commands_are_found() -> None:
    """The pages' own first commands are among them, so nothing was lost to the way they are read."""
    shown = {" ".join(command.words) for command in COMMANDS}
    assert {"make serve", "make test", "fuseline serve MODEL -O3", "python benchmarks/machine.py"} <= shown
    assert len(COMMANDS) > 80


@pytest.mark.parametrize(
    "text",
    [
        "Say `--tool-call-parser nothing`.", "`--enable-lora`", "    fuseline serve MODEL --quantization gguf",
        "```\nfuseline serve MODEL \\\n  --tensor-parallel-size 2\n```", "`fuseline serve --no-such-flag`",
        "    fuseline serve MODEL --max-num-seqs 0", "    fuseline bench serve --dataset nothing", "`make nothing`",
        "    python benchmarks/nothing.py", "    python benchmarks/load.py 135m --nothing",
        "`pip install '.[nothing]'`", "    X=1 fuseline cache drop",
    ],
)  # fmt: skip
def test_a_refused_command_is_found(text: str, dry, monkeypatch) -> None:
    (command,) = commands_of_text("page", text)
    with pytest.raises((SystemExit, AssertionError, pytest.fail.Exception)):
        test_a_shown_command_is_taken(command, dry, monkeypatch)


def test_prose_is_no_command() -> None:
    assert words_of("fuseline's own") == ()
    assert words_of("  X=1 python -P a.py [--b 1,2]  # why") == ("python", "-P", "a.py", "--b", "1,2")


def test_make_newest_names_tests() -> None:
    """SERVER_TESTS names files and folders that exist, those of the API among them."""
    named = re.search(r"^SERVER_TESTS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert "tests/api" in named and all((ROOT / path).exists() for path in named)


def test_every_method_of_quantization_has_a_row() -> None:
    text = (ROOT / "docs" / "QUANTIZATION.md").read_text().partition("## Methods")[2]
    names = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    named = set(re.findall(r"[\w-]+", " ".join(names)))
    assert {*tables.CHOICES["quantization"]} <= named
