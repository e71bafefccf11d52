"""Does the same campaign run on a Slurm cluster, and survive the loss of a block?

Labels on one node, walkers on another, each training by two ranks on two more.
"""

from __future__ import annotations

from pathlib import Path

from conftest import Cluster
from small_campaign import Campaign

from campaign.scheduler import job_name


def test_campaign_runs_with_every_stage_on_nodes_of_its_own(cluster: Cluster, site: Path, tmp_path: Path) -> None:
    """At first Slurm takes no jobs for the nodes of the trainings: the campaign says so and waits."""
    campaign = Campaign(tmp_path, site)

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
    campaign.check_labels(20)
    assert set(campaign.computed().values()) == {1}
    assert campaign.nodes_of_ranks == {"node1", "node2"}
    assert campaign.hosts("train") == {"node1"}
    assert campaign.hosts("sample") | campaign.hosts("label") == {"node3", "node4"}
    assert not campaign.hosts("sample") & campaign.hosts("label")
    assert cluster.jobs() == {}


def test_cancelled_block_costs_only_the_labels_under_way(cluster: Cluster, site: Path, tmp_path: Path) -> None:
    campaign, cancelled = Campaign(tmp_path, site), set[str]()

    def cancel_once() -> None:
        blocks = {job for job, name in cluster.jobs().items() if name == job_name(campaign.run_dir, "label")}
        if not cancelled and len(campaign.computed()) >= 4 and blocks:
            cluster.run("scancel", *blocks)
            cancelled.update(blocks)

    code, output = campaign.run(cancel_once)
    assert code == 0, output
    campaign.check_labels(20)
    assert cancelled
    lost = {event["task"] for event in campaign.events("task_failed")}
    assert lost
    assert all(task.startswith("label") for task in lost)
    again = campaign.computed().total() - len(campaign.computed())
    assert again <= 2  # tasks that ran at the same time
