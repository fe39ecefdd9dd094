"""`python3 tools/gpu_check`: see stages.py."""

import sys
from pathlib import Path

# Python puts this folder here; its modules are named like public packages (kernels), which others would import instead.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from gpu_check.stages import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
