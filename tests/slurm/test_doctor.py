"""Is a machine described as it is, and does a check of every stage find what works there and what does not?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from a_cluster import CPU, GPU, MPIRUN, TWO_NODES, Cluster, write_site
from small_campaign import COMMAND, GPAW, ROOT

from campaign.site import load_site


def smelt(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


@pytest.fixture
def folder(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def test_site_is_described_by_its_scheduler(folder: Path) -> None:
    done = smelt(folder, "site", "here.toml")
    assert done.returncode == 0, done.stderr
    assert "partition cpu (default): 2 nodes of 2 cores, 8 GB, no GPUs, up to 24 h" in done.stdout
    assert "partition gpu: 2 nodes of 2 cores, 8 GB, 2 GPUs, up to 24 h" in done.stdout
    site = load_site(folder / "here.toml")
    assert site.name == "smelt cluster"
    assert [pool.slurm.gpus_per_node for pool in site.pools.values() if pool.slurm] == [2, 0, 0]
    again = smelt(folder, "site", "here.toml")
    assert (again.returncode, again.stderr) == (2, "smelt: here.toml: is there already; name another file\n")


def findings(said: str, wanted: str) -> dict[tuple[str, str], str]:
    """Pool and name of a check -> its text."""
    lines = [line.split(maxsplit=3) for line in said.splitlines() if len(line.split()) > 3]
    return {(pool, name): text for word, pool, name, text in lines if word == wanted}


def test_every_stage_is_checked_on_its_nodes_and_what_does_not_work_is_named(folder: Path) -> None:
    """Walkers beside the driver; a label on two nodes; a training on two others, which have no real GPUs."""
    label = {"slots": 1, "launcher": MPIRUN, "slurm": CPU | TWO_NODES}
    train = {"launcher": MPIRUN, "slurm": GPU | TWO_NODES | {"gpus_per_node": 2}}
    write_site(folder / "site.toml", sample={}, label=label, train=train)
    (folder / "c.toml").write_text(GPAW.replace("[labeler]", "[labeler]\nranks = 2"))
    done = smelt(folder, "doctor", "--site", "site.toml", "--config", "c.toml")
    ok, bad = findings(done.stdout, "ok"), findings(done.stdout, "BROKEN")
    assert "eV for 2 atoms of Al" in ok["label", "gpaw"]
    assert "on 2 ranks" in ok["label", "gpaw"]
    assert ok["train", "MPI"] == ok["train", "Horovod"] == "2 ranks on node1, node2 add up"
    assert ok["sample", "versions"].startswith("as the driver's: python ")
    assert list(bad) == [("train", "GPU")]
    assert "asked for, but torch" in bad["train", "GPU"]
    assert done.returncode == 2
    assert "smelt: site.toml: not every stage works there, see above" in done.stderr
