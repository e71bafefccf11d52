"""Are the jobs of a run directory found and ended, and no others?"""

from __future__ import annotations

from pathlib import Path

import pytest
from a_cluster import Cluster

from campaign.scheduler import SchedulerError, block_name, blocks_of, cancel_blocks


def submit(cluster: Cluster, name: str) -> str:
    return cluster.run("sbatch", "--parsable", "-J", name, "-o", "/dev/null", "--wrap", "trap '' TERM; sleep 60")


def test_blocks_of_a_run_directory_are_ended_and_no_others(cluster: Cluster, tmp_path: Path) -> None:
    own = [submit(cluster, block_name(tmp_path, pool)) for pool in ("label", "train")]
    other = submit(cluster, block_name(tmp_path / "other", "label"))
    cluster.wait(lambda: cluster.state(own[1]) == "RUNNING")
    found = {block.job: block for block in blocks_of(tmp_path)}
    assert sorted(found) == sorted(own)
    assert (found[own[1]].pool, found[own[1]].state, found[own[1]].n_nodes) == ("train", "RUNNING", 1)
    cancel_blocks(tmp_path)
    assert set(cluster.jobs()) == {other}


def test_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SchedulerError, match=r"squeue is not on PATH: is this a host from which jobs can be submitted"):
        blocks_of(tmp_path)
