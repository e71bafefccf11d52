"""How does a helper process end with the driver that started it? `python leash.py COMMAND ...`

Becomes COMMAND, in a session of its own, so that Ctrl-C reaches the driver only; the kernel sends it SIGTERM when the
driver dies. Without that the interchange of Parsl outlives a killed driver, and its workers go on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(command: list[str]) -> None:
    parent = os.getppid()
    os.setsid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent or parent == 1:  # it died before the request was made
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
