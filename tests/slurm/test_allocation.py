"""Does a whole campaign run inside of one job?"""

from __future__ import annotations

from pathlib import Path

import pytest
from a_cluster import FAST, MPIRUN, TWO_NODES, Cluster
from job_story import story_of
from small_campaign import PAIRS


def test_driver_and_all_stages_share_the_nodes_of_one_job(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four nodes, each stage on its own."""
    pools = {
        "sample": {"slurm": FAST},
        "label": {"slots": 2, "slurm": FAST},
        "train": {"launcher": MPIRUN, "slurm": FAST | TWO_NODES},
    }
    told = story_of(cluster, tmp_path, monkeypatch, PAIRS, allocation=True, **pools)
    job = told.submit("allocation.sbatch", [], told.campaign.arguments)
    steps: dict[str, str] = {}

    def look() -> None:
        told.campaign.look_for_ranks()
        if len(steps) < 3 and told.campaign.nodes_of_ranks:
            steps.update({row["pool"]: row["job"] for row in told.status()["blocks"]})

    assert told.end(job, 300, look) == "COMPLETED", told.error()
    told.campaign.check_labels(20)
    told.campaign.check_nodes()
    assert set(steps) == {"sample", "label", "train"}
    assert {step.partition(".")[0] for step in steps.values()} == {job}
