"""`duet serve` that is hit by a fault at a step that the environment names.

`DUET_FAULT_CRASH_AT` is a step of `persistence.faults`, or `step:detail` for one receiver or
command. The fault happens while the file `DUET_FAULT_ARMED_BY` exists, so that a test can play what
comes before in peace; that file is gone afterwards. The gateway kills itself as `kill -9` does or,
if `DUET_FAULT_FREEZES` names a process, freezes that one. Only this program reads the three.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from gateway.cli import main
from persistence.faults import Step, install

CRASHING_SERVE = (sys.executable, str(Path(__file__)), "serve")


def fail_at(wanted: str, armed_by: Path, freezes: int | None) -> None:
    """Installs the fault."""
    wanted_step, _, wanted_detail = wanted.partition(":")
    step = Step(wanted_step)

    def fail(reached: Step, detail: str) -> None:
        if reached is not step or not detail.startswith(wanted_detail):
            return
        try:
            armed_by.unlink()
        except FileNotFoundError:
            return
        if freezes is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            os.kill(freezes, signal.SIGSTOP)

    install(fail)


if __name__ == "__main__":
    victim = os.environ.get("DUET_FAULT_FREEZES")
    fail_at(
        os.environ["DUET_FAULT_CRASH_AT"],
        Path(os.environ["DUET_FAULT_ARMED_BY"]),
        int(victim) if victim else None,
    )
    main()
