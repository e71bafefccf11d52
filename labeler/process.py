"""How is a command run so that it is isolated, bounded in time, and never left behind? Knows no quantum code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

__all__ = ["Supervised", "clean_environment"]

_GRACE_S = 2.0
_KEPT = ("HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
_KEPT_PREFIXES = ("LC_", "GPAW_", "ASE_")
# A node is shared by many single-threaded labels; Open MPI's words let it start as root and on shared cores.
_SET = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


def clean_environment(
    inherited: Mapping[str, str], added: Mapping[str, str], extra_paths: Sequence[Path] = ()
) -> dict[str, str]:
    """The few variables that a quantum code should see.

    MPI, PMIx and Slurm variables of the worker would make it believe that it is one rank of the worker's own job.
    """
    kept = {
        name: value
        for name, value in inherited.items()
        if name in _KEPT or (name.startswith(_KEPT_PREFIXES) and name != "GPAW_MPI_BACKEND")
    }
    paths = [*map(str, extra_paths), *filter(None, [inherited.get("PYTHONPATH")])]
    # The interpreter's own folder first: it holds mpirun and the codes that came with it.
    programs = [str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)]
    return kept | _SET | {"PYTHONPATH": os.pathsep.join(paths), "PATH": os.pathsep.join(programs)} | dict(added)


class Supervised:
    """A running command in a session of its own: `with Supervised(...) as command`.

    All its processes are gone when the block is left, whichever way, and when this process dies, even by SIGKILL.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        guard = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py")), str(os.getpid()), str(_GRACE_S)]
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [*guard, *command],
                env=dict(environment),
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def __enter__(self) -> Supervised:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_for(self, path: Path, limit_s: float) -> bool:
        """Wait until the command has written `path`; False when it ended without, or the time is over."""
        deadline = time.monotonic() + limit_s
        pause_s = 0.001
        while not path.exists():
            if self._process.poll() is not None:
                return path.exists()
            if time.monotonic() > deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, 0.05)
        return True

    @property
    def exit_code(self) -> int | None:
        """None while it runs; 128 + signal when a signal ended it."""
        return self._process.poll()

    def stop(self) -> None:
        """End all its processes: politely, then surely."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(_GRACE_S + 5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
