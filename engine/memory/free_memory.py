"""How much memory this process may still take: the machine's and that of its control groups (v1 and v2)."""

from __future__ import annotations

from pathlib import Path


def free_memory(root: Path = Path("/")) -> int:
    """Bytes. The smallest of what the kernel calls available and what every enclosing control group leaves."""
    return min([_available(root), *_cgroup_headrooms(root)])


def _available(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable line; set --kv-cache-memory-bytes")


def _cgroup_headrooms(root: Path) -> list[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    headrooms: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files = ("memory.max", "memory.current", "inactive_file")
            headrooms += _walk(root / "sys/fs/cgroup", path, files)
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            headrooms += _walk(root / "sys/fs/cgroup/memory", path, files)
    return headrooms


def _walk(mount: Path, path: str, files: tuple[str, str, str]) -> list[int]:
    """Headroom of the group and of its parents; inside a container only the mount's own root may be visible."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    folders = [mount.joinpath(*parts[:count]) for count in range(len(parts) + 1)]
    return [room for folder in folders if (room := _headroom(folder, *files)) is not None]


def _headroom(folder: Path, limit_file: str, usage_file: str, reclaimable: str) -> int | None:
    try:
        limit = (folder / limit_file).read_text().strip()
        usage = int((folder / usage_file).read_text())
        stat = (folder / "memory.stat").read_text()
    except OSError:
        return None
    if limit == "max" or int(limit) >= 1 << 60:
        return None
    inactive = next((int(x.split()[1]) for x in stat.splitlines() if x.startswith(reclaimable + " ")), 0)
    return max(0, int(limit) - usage + inactive)
