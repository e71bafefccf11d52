"""How is it made sure that a quantum code never outlives the task that asked for it?

A tiny program that stands between the two: GUARD_PID GRACE_S COMMAND... Started in a session of its own, it starts
the command, adopts every process that the command leaves behind, and ends them all when the command ends, when it
is told to (SIGTERM), or when its parent is gone. It must start in milliseconds, so it imports nothing of this project.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class _Stop(BaseException):
    pass


def main(parent: int, grace_s: float, command: list[str]) -> int:
    """Run `command` and return its exit code, or 128 + signal. Leaves no process behind."""
    signal.signal(signal.SIGTERM, _stop)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before it could be watched
        return 128 + signal.SIGTERM
    try:
        child = os.posix_spawnp(command[0], command, os.environ, setsigdef=[signal.SIGTERM, signal.SIGPIPE])
        status = _wait_for(child)
    except _Stop:
        status = 128 + signal.SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_all(grace_s)
    return status


def _stop(*_: object) -> NoReturn:
    raise _Stop


def _wait_for(child: int) -> int:
    while True:
        pid, status = os.wait()  # orphans of the command are ours too, and are reaped on the way
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code


def _end_all(grace_s: float) -> None:
    """End every descendant: politely, then surely."""
    deadline = time.monotonic() + grace_s
    for pid in _descendants():
        _send(pid, signal.SIGTERM)
    while _reap() and time.monotonic() < deadline:
        time.sleep(0.01)
    while _reap():
        for pid in _descendants():
            _send(pid, signal.SIGKILL)
        time.sleep(0.01)


def _reap() -> bool:
    """Collect what has ended; whether anything still runs."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as stat:
                    parent = int(stat.read().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue  # it ended while we looked
            children.setdefault(parent, []).append(int(entry))
    found = [os.getpid()]
    for pid in found:  # grows as we go
        found.extend(children.get(pid, []))
    return found[1:]


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
