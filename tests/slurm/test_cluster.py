"""Is the cluster that the other tests run on a real one?"""

from __future__ import annotations

from a_cluster import Cluster


def test_every_node_runs_its_share_under_its_own_name(cluster: Cluster) -> None:
    assert sorted(cluster.run("srun", "-N4", "hostname").split()) == ["node1", "node2", "node3", "node4"]


def test_started_cluster_is_not_started_again(cluster: Cluster) -> None:
    cluster.script("start")
    nodes = cluster.run("sinfo", "-h", "-N", "-p", "cpu", "-o", "%N %T").splitlines()
    assert sorted(nodes) == [f"node{i} idle" for i in (1, 2, 3, 4)]


def test_jobs_keep_away_from_nodes_with_gpus_while_others_are_free(cluster: Cluster) -> None:
    assert sorted(cluster.run("srun", "-N2", "hostname").split()) == ["node3", "node4"]
    assert cluster.run("srun", "-p", "gpu", "--gres=gpu:2", "printenv", "CUDA_VISIBLE_DEVICES") == "0,1"


def test_job_of_a_node_that_goes_down_fails(cluster: Cluster) -> None:
    job = cluster.run("sbatch", "--parsable", "--no-requeue", "-w", "node2", "-o", "/dev/null", "--wrap", "sleep 60")
    cluster.wait(lambda: cluster.state(job) == "RUNNING")
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    cluster.wait(lambda: cluster.state(job) == "NODE_FAIL", 20)


def test_cancelled_job_is_gone_from_the_queue(cluster: Cluster) -> None:
    job = cluster.run("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 60")
    cluster.wait(lambda: cluster.state(job) == "RUNNING")
    cluster.run("scancel", job)
    cluster.wait(lambda: job not in cluster.jobs(), 20)
