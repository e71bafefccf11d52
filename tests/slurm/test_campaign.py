"""Does the same campaign run on a Slurm cluster, with every stage on nodes of its own?"""

from __future__ import annotations

from pathlib import Path

from a_cluster import Cluster
from small_campaign import GPAW, Campaign


def test_gpaw_campaign_waits_for_nodes_and_runs_to_its_end(cluster: Cluster, site: Path, tmp_path: Path) -> None:
    """At first Slurm takes no jobs for the nodes of the trainings: the campaign says so and waits."""
    campaign = Campaign(tmp_path, site, GPAW)

    def open_when_refused() -> None:
        if refused := campaign.events("pool_waits"):
            assert refused[0]["pool"] == "train"
            assert refused[0]["reason"].startswith("sbatch: Batch job submission failed: ")
            cluster.run("scontrol", "update", "partitionname=gpu", "state=up")

    cluster.run("scontrol", "update", "partitionname=gpu", "state=drain")
    code, output = campaign.run(open_when_refused)
    assert code == 0, output
    assert "train waits: sbatch: Batch job submission failed" in output
    assert campaign.events("pool_waits")[-1]["reason"] == ""
    campaign.check_labels(11)
    campaign.check_nodes()
    assert cluster.jobs() == {}
