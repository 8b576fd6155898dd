"""`duet serve` that kills itself as `kill -9` does, at a step that the environment names.

`DUET_FAULT_CRASH_AT` is a step of `persistence.faults`, or `step:detail` for one receiver or
command. It happens once the file `DUET_FAULT_ARMED_BY` exists, so that a test can play what comes
before in peace. Only this program reads these two variables.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from gateway.cli import main
from persistence.faults import Step, install


def crash_at(wanted: str, armed_by: Path) -> None:
    """Installs the crash."""
    wanted_step, _, wanted_detail = wanted.partition(":")
    step = Step(wanted_step)

    def crash(reached: Step, detail: str) -> None:
        if reached is step and detail.startswith(wanted_detail) and armed_by.exists():
            os.kill(os.getpid(), signal.SIGKILL)

    install(crash)


if __name__ == "__main__":
    crash_at(os.environ["DUET_FAULT_CRASH_AT"], Path(os.environ["DUET_FAULT_ARMED_BY"]))
    main()
