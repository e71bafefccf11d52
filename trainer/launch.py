"""How are ranks started so that nothing outside disturbs them, and stopped so that nothing of them stays?"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from shards.ranks import MPI_FOLDER, launch_words, mpi_folder

__all__ = ["DEFAULT_LAUNCHER", "HEARTBEAT", "TERMINAL", "rank_environment", "run_ranks"]

# One host, the environment's own mpirun. A site may use e.g. ("srun", "--ntasks={ranks}", "--mpi=pmix"), or
# ("mpirun", "-np", "{ranks}", "--host", "{hosts}", "--oversubscribe").
DEFAULT_LAUNCHER = ("mpirun", "-np", "{ranks}", "--bind-to", "none", "--oversubscribe", "--allow-run-as-root")
# Names a file that the caller rewrites and holds locked while it lives. Ranks stop when it is gone (they are asked to),
# when its lock is free (the caller was killed: its own host knows at once) or when it stays the same (other hosts see
# that). A pipe would tell at once everywhere, but mpirun does not pass its end on.
HEARTBEAT = "SMELT_HEARTBEAT"
# Names the caller's terminal: under a launcher the rank's own output is a log file.
TERMINAL = "SMELT_TERMINAL"
BEAT_S = 1.0
# What an outer launcher or batch system leaves behind makes an inner mpirun take itself for part of the outer job.
OUTER = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "PRRTE_", "HYDRA_", "HOROVOD_", "MPIEXEC_")
STOP_GRACE_S = 60.0


def rank_environment(outer: Mapping[str, str], ranks: int, launcher: Sequence[str], scratch: str) -> dict[str, str]:
    """Return the environment of the ranks, from the caller's; pure.

    scratch: a short path, for sockets and segments of the ranks of one host.
    """
    local = tuple(launcher) == DEFAULT_LAUNCHER
    dropped = (*OUTER, "SLURM_") if local else OUTER
    inner = {name: value for name, value in outer.items() if not name.startswith(dropped)}
    inner |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{outer.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks) if local else 1),
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMPI_MCA_mpi_yield_when_idle": "1",  # ranks share cores with walkers: waiting must not burn them
        "HOROVOD_CYCLE_TIME": "0.1",
        "HOROVOD_STALL_CHECK_TIME_SECONDS": "60",
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "300",
        MPI_FOLDER: scratch,
    }
    if local:
        inner |= {"OMPI_MCA_btl": "^tcp", "TMPDIR": scratch}
    return inner


def run_ranks(
    arguments: Sequence[str],
    *,
    ranks: int,
    launcher: Sequence[str],
    nice: int,
    log: Path,
    heartbeat: Path,
    environment: Mapping[str, str],
    time_limit_s: float,
) -> int:
    """Run `python ARGUMENTS` on all ranks in a process group of its own, and return the exit status.

    However this ends, no process of the group is left: on an interrupt the ranks are asked to stop and given a minute.

    launcher: words with placeholders, see shards.ranks.launch_words.

    Raises:
        FileNotFoundError: there is no such launcher.
        TimeoutError: the ranks did not end in time; they were killed.
    """
    prefix = launch_words(launcher, ranks, environment) if ranks > 1 else []
    polite = ["nice", "-n", str(nice)] if nice else []
    with mpi_folder() as scratch, log.open("ab") as output, heartbeat.open("w+") as held:  # NFS locks what can be read
        fcntl.flock(held, fcntl.LOCK_SH)
        process = subprocess.Popen(
            [*polite, *prefix, sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=rank_environment(environment, ranks, launcher, scratch) | {HEARTBEAT: str(heartbeat)},
            start_new_session=True,
        )
        try:
            return _wait(process, heartbeat, time_limit_s)
        finally:
            _stop(process, heartbeat)


def _wait(process: subprocess.Popen[bytes], heartbeat: Path, time_limit_s: float) -> int:
    end = time.monotonic() + time_limit_s
    while time.monotonic() < end:
        heartbeat.write_text(f"{socket.gethostname()} {time.time()}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(BEAT_S)
    raise TimeoutError(f"training did not end within {time_limit_s:.0f} s")


def _stop(process: subprocess.Popen[bytes], heartbeat: Path) -> None:
    try:
        heartbeat.unlink(missing_ok=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_GRACE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
