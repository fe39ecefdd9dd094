"""Model families whose graphs have regions."""

from __future__ import annotations

WITH_REGIONS = {"cohere"}
"""Some of their ops have no kernel of ours: torch runs them between two parts of the plan."""
