"""The CUDA kernels compiled by nvcc for every architecture: registers and shared memory within bounds, no spills; what
the machine code touches before it has waited for the kernels ahead."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import triton
from cuda_emulator import toolkit

NVCC = toolkit.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
SHARED_LIMIT = 48 << 10  # bytes of a block that asks for none
REGISTERS = {"few_rows_kernel": 80, "few_codes_kernel": 96, "norm_kernel": 80, "act_mul_kernel": 64,
             "rope_kernel": 40, "merge_kernel": 128, "bulk_decode_kernel": 248, "decode_kernel": 224,
             "prefill_kernel": 168, "persistent_kernel": 255, "probe_kernel": 32}  # fmt: skip
"""Most registers of a thread: three blocks of few_rows_kernel, whose ring fills a third of an sm_80's SM, fit it."""
FOUR_BLOCKS = 64
"""From sm_90 on its ring fills a quarter."""
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?(?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
SERIALIZED = re.compile(r"\(C75\d\d\)")
"""What ptxas says of warp-group products that wait for each other, and of register counts that it ignores."""
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?(?P<opcode>[A-Z][\w.]*)", re.MULTILINE)
MEMORY = ("LDG", "STG", "LD.", "ST.", "ATOM", "RED", "CCTL", "UBLKCP")
PREFETCH = "CCTL.E.PF2"  # to the L2 cache
WAIT, TRIGGER = "ACQBULK", "PREEXIT"  # griddepcontrol.wait and .launch_dependents


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", toolkit.SOURCES, ids=lambda path: path.stem)
def test_kernels_compile_for_every_gpu(source, tmp_path) -> None:
    archs = toolkit.known_archs(NVCC)
    said = toolkit.compile_source(NVCC, source, tmp_path / "kernels.o", archs, ["-Xptxas=-v", "-Werror=all-warnings"])
    assert not SERIALIZED.search(said), said
    found = [match.groupdict() for match in ENTRY.finditer(said)]
    assert {entry["arch"] for entry in found} == {f"sm_{arch}" for arch in archs}
    for entry in found:
        kernel = next(name for name in REGISTERS if name in entry["name"])
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        assert (entry["stores"], entry["loads"]) == ("0", "0"), entry
        most = FOUR_BLOCKS if kernel == "few_rows_kernel" and entry["arch"] != "sm_80" else REGISTERS[kernel]
        assert int(entry["registers"]) <= most, entry
        assert shared is None or int(shared[1]) <= SHARED_LIMIT, entry
    if CUOBJDUMP.exists():
        for arch in archs:
            assert_early_only_weights(machine_code(tmp_path / "kernels.o", arch), arch)


def machine_code(path: Path, arch: str) -> dict[str, list[str]]:
    """Opcodes in their order, by kernel."""
    command = [CUOBJDUMP, "-sass", "-arch", f"sm_{arch}", path]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = said.split("Function : ")[1:]
    return {part.split(maxsplit=1)[0]: OPCODE.findall(part) for part in parts}


def assert_early_only_weights(found: dict[str, list[str]], arch: str) -> None:
    """From sm_90 on every kernel triggers the next one and waits; only a ring of weights is filled sooner. Loads past
    the caches' order, as of memory that nothing writes, would not be held by the wait."""
    assert found
    for name, opcodes in found.items():
        assert not any("CONSTANT" in opcode for opcode in opcodes), name
        if arch == "80" or "probe_kernel" in name:
            assert WAIT not in opcodes and TRIGGER not in opcodes, name
            continue
        assert TRIGGER in opcodes and opcodes.count(WAIT) == 1, name
        early = {op for op in opcodes[: opcodes.index(WAIT)] if op.startswith(MEMORY)} - {PREFETCH, "LDGDEPBAR"}
        has_ring = re.search("few_(rows|codes)_kernel", name) is not None
        assert all(op.startswith("LDGSTS.") for op in early) and bool(early) == has_ring, name


def test_a_source_that_does_not_compile_is_said_in_words(tmp_path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("not a program\n")
    with pytest.raises(RuntimeError, match="^broken.cu: "):
        toolkit.compile_source(NVCC or "false", source, tmp_path / "x.o", ["80"])


@pytest.mark.parametrize(("flag", "torch_cuda", "nvcc", "wanted"), [
    ("0", "13.0", "nvcc", False), ("1", None, "nvcc", True), ("", "13.0", "nvcc", True), ("", None, "nvcc", False),
    ("", "13.0", None, False),
])  # fmt: skip
def test_when_the_kernels_are_built(flag, torch_cuda, nvcc, wanted) -> None:
    """As FUSELINE_CUDA says; else where torch is built for CUDA and there is an nvcc."""
    assert toolkit.is_wanted(flag, torch_cuda, nvcc) is wanted


def test_what_cannot_be_built_is_said_in_one_line() -> None:
    for flag, line in (("1", "FUSELINE_CUDA=1: no nvcc"), ("yes", "FUSELINE_CUDA=yes: 0, 1 or unset")):
        with pytest.raises(SystemExit, match=line):
            toolkit.is_wanted(flag, "13.0", None)
