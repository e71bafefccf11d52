"""A real Slurm of four nodes on this machine, started once for all tests that run in one process."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from a_cluster import DAEMONS, PATH, SCRIPT, Cluster, write_site


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
