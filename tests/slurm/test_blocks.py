"""What does a pool do when Slurm refuses it nodes, keeps it waiting, or does not answer?"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from a_cluster import CPU, Cluster
from parsl.jobs.states import JobState, JobStatus

from campaign.blocks import FRUITLESS_BLOCKS, JobBlocks, handle_fruitless_blocks
from campaign.doctor import a_task
from campaign.pools import ParslPools
from campaign.scheduler import SchedulerError, block_name
from campaign.scheduler import blocks_of as find_blocks
from campaign.site import Slurm, parse_site

REFUSAL = "sbatch: invalid partition specified: nope; Batch job submission failed: Invalid partition name specified"


def blocks_of(run_dir: Path, **fields: Any) -> JobBlocks:
    blocks = JobBlocks("label", Slurm(poll_s=1, **fields), run_dir, "", lambda: None)
    blocks.script_dir = str(run_dir)
    return blocks


def test_what_was_refused_is_asked_for_again_after_pauses_that_grow(cluster: Cluster, tmp_path: Path) -> None:
    blocks = blocks_of(tmp_path, partition="nope", max_blocks=4)
    with pytest.raises(SchedulerError) as error:
        blocks.submit("sleep 60", 1)
    assert str(error.value) == REFUSAL == blocks.waits()
    assert blocks.max_blocks == 0  # so that Parsl asks for none
    cluster.wait(lambda: blocks.max_blocks == 4, 3)
    with pytest.raises(SchedulerError):
        blocks.submit("sleep 60", 1)
    with pytest.raises(AssertionError, match="not within"):
        cluster.wait(lambda: blocks.max_blocks == 4, 1.5)


def test_pending_block_says_what_it_waits_for(cluster: Cluster, tmp_path: Path) -> None:
    blocks = blocks_of(tmp_path, partition="gpu", nodes_per_block=3)
    job = blocks.submit("sleep 60", 1)
    cluster.wait(lambda: blocks.status([job]) and "(" in blocks.waits(), 10)
    assert re.fullmatch(rf"job {job} is PENDING \(Partition(Config|NodeLimit)\)", blocks.waits())
    assert blocks.cancel([job]) == [True]
    assert [status.state for status in blocks.status([job])] == [JobState.SCALED_IN]
    assert blocks.waits() == ""


def test_end_of_a_block_is_known_with_its_last_words(cluster: Cluster, tmp_path: Path) -> None:
    blocks = blocks_of(tmp_path, workers="block")
    job = blocks.submit("echo no such module >&2; exit 3", 1)
    cluster.wait(lambda: blocks.status([job])[0].terminal, 10)
    (status,) = blocks.status([job])
    assert status.state is JobState.FAILED
    assert status.message == f"job {job} ended as FAILED: no such module (log: {tmp_path}/label-1.out)"


def test_job_of_a_submission_that_was_not_answered_is_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    name = block_name(tmp_path, "label")
    cluster.run("sbatch", "--parsable", "-J", name, "-o", "/dev/null", "--wrap", "sleep 60")
    blocks = blocks_of(tmp_path)
    job = blocks.submit("sleep 60", 1)
    blocks.status([job])
    cluster.wait(lambda: set(cluster.jobs()) == {job}, 10)


def test_controller_that_does_not_answer_is_waited_for(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = blocks_of(tmp_path)
    job = blocks.submit("sleep 60", 1)
    settings = Path(cluster.run("bash", "-c", "echo $SLURM_CONF")).read_text().splitlines()
    changed = {"SlurmctldPort": "SlurmctldPort=1", "MessageTimeout": "MessageTimeout=1"}
    (tmp_path / "slurm.conf").write_text("\n".join(changed.get(line.partition("=")[0], line) for line in settings))
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
        assert [status.state for status in blocks.status([job])] == [JobState.PENDING]
        assert "Unable to contact slurm controller" in blocks.waits()
        assert blocks.cancel([job]) == [False]
        with pytest.raises(SchedulerError, match=r"sbatch: .*Unable to contact slurm controller"):
            blocks.submit("sleep 60", 1)
    cluster.wait(lambda: blocks.status([job])[0].state is JobState.RUNNING, 10)
    cluster.wait(lambda: blocks.max_blocks == 1, 3)
    blocks.submit("sleep 60", 1)
    assert blocks.waits() == ""


def test_block_ends_in_good_order_before_its_time_is_over(cluster: Cluster, tmp_path: Path) -> None:
    """Of its minute a block uses half, and starts nothing in the last twenty seconds of that."""
    site = parse_site({"name": "test", "address": "127.0.0.1", "sample": {"slurm": CPU | {"walltime_min": 1}}})
    with ParslPools(site, tmp_path, {"sample": 20}) as pools:
        assert pools.submit("sample", a_task).result(60)
        (first,) = find_blocks(tmp_path)
        cluster.wait(lambda: cluster.state(first.job) == "COMPLETED", 25)
        assert pools.submit("sample", a_task).result(60)
        assert {block.state for block in find_blocks(tmp_path)} == {"COMPLETED", "RUNNING"}
    assert cluster.jobs() == {}


def test_pool_is_given_up_when_its_blocks_run_in_vain_again_and_again(tmp_path: Path) -> None:
    blocks, given_up, called = blocks_of(tmp_path, max_blocks=2), list[Exception](), list[str]()
    executor: Any = SimpleNamespace(
        provider=blocks,
        blocks_to_job_id={str(n): str(n) for n in range(100)},
        connected_blocks=lambda: called,
        set_bad_state_and_fail_all=given_up.append,
    )

    def handle(*history: JobStatus) -> None:
        statuses = {str(n): status for n, status in enumerate(history)}
        called[:] = [n for n, status in statuses.items() if status in (good, running)]
        handle_fruitless_blocks(executor, statuses | {"refused": JobStatus(JobState.FAILED)})

    vain = [JobStatus(JobState.MISSING, f"job {n} ended as FAILED: no such module") for n in range(FRUITLESS_BLOCKS)]
    good, running, pending = (JobStatus(s) for s in (JobState.COMPLETED, JobState.RUNNING, JobState.PENDING))
    cancelled = JobStatus(JobState.SCALED_IN)
    handle(*vain[1:], cancelled, pending)
    assert blocks.max_blocks == 0
    assert blocks.waits() == "no worker has called: job 4 ended as FAILED: no such module"
    handle(*vain, good)
    assert blocks.waits() == ""
    handle(*vain, cancelled, running)
    assert (blocks.waits(), blocks.max_blocks, given_up) == ("", 2, [])
    handle(good, *vain, cancelled)
    assert "no worker of 5 blocks in a row has called; the last one: job 4 ended" in str(given_up[0])
