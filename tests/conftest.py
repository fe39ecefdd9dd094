"""Tests write no cache outside the repository's own folder."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("FUSELINE_CACHE_ROOT", str(Path(__file__).resolve().parent.parent / ".cache" / "fuseline"))
