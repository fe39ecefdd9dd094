"""`python -m fuseline.api` is `fuseline`."""

import sys

from fuseline.api.cli import main

if __name__ == "__main__":
    sys.exit(main())
