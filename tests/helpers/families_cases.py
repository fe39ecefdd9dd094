"""Model families whose graphs have regions."""

from __future__ import annotations

WITH_REGIONS = {"deepseek_v3", "cohere", "glm4"}
"""Some of their ops have no kernel of ours: torch runs them between two parts of the plan."""
