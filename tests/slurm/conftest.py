"""A real Slurm of four nodes on this machine, started once for all tests that run in one process."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

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


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    missing = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: install slurmctld, slurmd, slurm-client and munge")
    # A short path: the sockets' names below it must stay under 108 characters.
    folder = tempfile.mkdtemp(prefix="smelt-slurm-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMELT_CLUSTER_DIR", folder)
        patch.setenv("SLURM_CONF", f"{folder}/etc/slurm.conf")
        cluster = Cluster()
        try:
            cluster.script("start")
            yield cluster
        finally:
            subprocess.run([SCRIPT, "stop"], stdin=subprocess.DEVNULL, check=False)


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with no job in it and all its nodes idle."""
    yield running_cluster
    running_cluster.script("reset")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return write_site(tmp_path / "slurm-test.toml")
