"""Do the job scripts do what their first lines say, and does a campaign survive whatever happens to its nodes?

One story: the driver is a job, which Slurm warns that its time is nearly over; then a node dies; then a block is
cancelled. What the campaign has left is trained on and sampled from by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from a_cluster import CPU, Cluster
from job_story import Story, story_of
from small_campaign import PAIRS

from campaign.scheduler import Block, blocks_of


@pytest.fixture(scope="module")
def story(running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    # The driver takes a core of a node, so that walkers cannot have a whole one. Lost nodes are noticed sooner.
    tables = {
        "sample": {"slurm": CPU | {"exclusive": False}},
        "label": {"slots": 2, "slurm": CPU | {"silence_s": 5}},
    }
    with pytest.MonkeyPatch.context() as patch:
        yield story_of(running_cluster, tmp_path_factory.mktemp("jobs"), patch, PAIRS, **tables)
    running_cluster.script("reset")


class Trouble:
    """What happens to a campaign, one after the other, each once labels go on after the one before.

    Labels wait for it: however fast the machine is, it meets some on the way.
    """

    def __init__(self, story: Story, job: str) -> None:
        self._story = story
        self._job = job
        self._next = [self._give_time, self._kill_node, self._cancel_block]
        self._computed = 0
        self.blocks: list[Block] = []
        story.campaign.allow(5)

    def __call__(self) -> None:
        if self._next and self._next[0]():
            self._next.pop(0)
            self._computed = len(self._story.campaign.computed())
            self._story.campaign.allow(4 if self._next else 1000)

    @property
    def left(self) -> list[str]:
        return [step.__name__ for step in self._next]

    def _give_time(self) -> bool:
        """Once it was warned for want of time."""
        warned = "queueing again" in self._story.said("driver.sbatch")
        if warned:
            self._story.cluster.run("scontrol", "update", f"jobid={self._job}", "TimeLimit=30")
        return warned

    def _labeling(self) -> bool:
        """Has another block begun to make labels?"""
        if len(self._story.campaign.computed()) < self._computed + 2:
            return False
        known = [block.job for block in self.blocks]
        running = [block for block in blocks_of(self._story.campaign.run_dir) if block.state == "RUNNING"]
        new = [block for block in running if block.pool == "label" and block.job not in known]
        self.blocks += new
        return bool(new)

    def _kill_node(self) -> bool:
        if not self._labeling():
            return False
        self._story.cluster.script("kill-node", self.blocks[-1].nodes, "hard")
        self._story.cluster.script("start-node", self.blocks[-1].nodes)
        return True

    def _cancel_block(self) -> bool:
        if not self._labeling():
            return False
        self._story.cluster.run("scancel", self.blocks[-1].job)
        return True


def test_campaign_survives_the_end_of_its_drivers_time_a_dead_node_and_a_cancelled_block(story: Story) -> None:
    # Slurm warns five minutes before the end, and up to one minute early: at once.
    job = story.submit("driver.sbatch", ["--time=6"], story.campaign.arguments)
    trouble = Trouble(story, job)
    story.cluster.wait(lambda: story.cluster.state(job) == "RUNNING", 10)
    assert story.end(job, 400, trouble) == "COMPLETED", story.error()
    assert trouble.left == []
    assert story.campaign.events("driver_stopped")[0]["reason"] == "interrupted"
    assert len(story.campaign.events("driver_started")) == 2
    story.campaign.check_labels(20)
    assert set(story.campaign.computed()) == {event["frame"] for event in story.campaign.events("labeled")}
    lost = story.campaign.events("task_failed")
    assert {event["failure"]["kind"] for event in lost} == {"node_lost"}
    assert all(event["task"].startswith("label") for event in lost)
    assert story.campaign.events("quarantined") == []
    assert [story.cluster.state(block.job) for block in trouble.blocks] == ["NODE_FAIL", "CANCELLED"]
    assert story.cluster.jobs() == {}


def test_one_training_runs_on_two_nodes_by_hand(story: Story) -> None:
    data = story.campaign.run_dir / "data" / "train" / "manifest.jsonl"
    arguments = [str(story.campaign.config), str(data), str(story.folder / "model"), "--site", str(story.site)]
    job = story.submit("train.sbatch", ["-p", "gpu"], arguments)
    assert story.end(job, 120) == "COMPLETED", story.error()
    assert json.loads(story.said("train.sbatch"))["facts"]["epochs"] == 5
    assert (story.folder / "model" / "model.safetensors").exists()


def test_walkers_run_by_hand(story: Story) -> None:
    model = next((story.campaign.run_dir / "models").glob("gen-*/model.safetensors"))
    arguments = [str(story.campaign.config), str(model), str(story.folder / "frames.h5"), "--walkers", "2"]
    job = story.submit("sample.sbatch", ["--cpus-per-task=1"], arguments)
    assert story.end(job, 60) == "COMPLETED", story.error()
    assert json.loads(story.said("sample.sbatch"))["facts"]["walkers"] >= 2
