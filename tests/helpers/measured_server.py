"""`fuseline serve` that writes down the processor time of the longest rounds of its event loop.

    python -P measured_server.py FILE [flags of serve]

A round is the work between two looks at the sockets. Time for which other programs had the processor does not count.
"""

from __future__ import annotations

import asyncio
import sys
import time

LEAST_SECONDS = 0.01


class MeasuredLoop(asyncio.SelectorEventLoop):
    """Appends "<seconds> <what ran last>" to the file for each round that takes more than LEAST_SECONDS."""

    path: str

    def _run_once(self) -> None:
        begin = time.process_time()
        super()._run_once()
        seconds = time.process_time() - begin
        if seconds > LEAST_SECONDS:
            with open(self.path, "a") as file:
                file.write(f"{seconds:.6f}\n")


class Policy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> MeasuredLoop:
        return MeasuredLoop()


if __name__ == "__main__":
    MeasuredLoop.path = sys.argv[1]
    asyncio.set_event_loop_policy(Policy())
    from fuseline.api.cli import main

    sys.exit(main(["serve", *sys.argv[2:]]))
