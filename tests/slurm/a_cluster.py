"""Commands and site files for the real Slurm of four nodes that conftest.py starts."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaign.reference import document
from campaign.site import parse_site

SCRIPT = Path(__file__).parents[2] / "slurm" / "cluster.sh"
DAEMONS = ("slurmctld", "slurmd", "srun", "munged")
PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"

# Short times, so that what is lost is noticed in seconds. The ranks' words are for Open MPI as root on loopback.
FAST = {"poll_s": 1, "silence_s": 10}
CPU = FAST | {"partition": "cpu", "walltime_min": 20}
GPU = CPU | {"partition": "gpu"}
TWO_NODES = {"nodes_per_block": 2, "workers": "block"}
MPIRUN = ["mpirun", "--allow-run-as-root", "-np", "{ranks}", "--host", "{hosts}", "--oversubscribe"]
MPIRUN += ["--bind-to", "none", "--mca", "btl_tcp_if_include", "lo"]


def write_site(path: Path, **tables: Any) -> Path:
    """A site file for the cluster: walkers and labels on nodes of their own, each training on two other ones."""
    site = {
        "name": "test cluster",
        "address": "127.0.0.1",
        "sample": {"slurm": CPU},
        "label": {"slots": 2, "slurm": CPU},
        "train": {"launcher": MPIRUN, "slurm": GPU | TWO_NODES},
    }
    path.write_text(document("For tests.", parse_site(site | tables)))
    return path


class Cluster:
    """A running cluster; its commands raise with what they said."""

    def run(self, *command: str, timeout_s: float = 60) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def script(self, *arguments: str) -> str:
        return self.run(str(SCRIPT), *arguments)

    def jobs(self) -> dict[str, str]:
        """Job number -> name, of what is pending or running."""
        return dict(line.split() for line in self.run("squeue", "-h", "-o", "%i %j").splitlines())

    def state(self, job: str) -> str:
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def wait(self, reached: Callable[[], bool], seconds: float = 60, pause_s: float = 0.2) -> None:
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, f"not within {seconds:g} s: {self.run('squeue')}\n{self.run('sinfo')}"
            time.sleep(pause_s)
