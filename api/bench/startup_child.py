"""The server that `fuseline bench startup` times: `fuseline serve` that tells when each phase ends.

    python -m fuseline.api.bench.startup_child FD MODEL [flags of serve]

Writes lines "<seconds since the epoch> <phase that ended now>" to the file descriptor.
"""

from __future__ import annotations

import os
import sys
import time

ENTERED = time.time()


def main(arguments: list[str]) -> int:
    pipe = int(arguments[0])

    def on_phase(name: str, at: float | None = None) -> None:
        os.write(pipe, f"{at or time.time():.6f} {name}\n".encode())

    on_phase("interpreter", ENTERED)
    from fuseline.api.cli import serve
    from fuseline.api.config import ConfigError

    try:
        return serve(arguments[1:], on_phase)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
