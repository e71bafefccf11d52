"""Do the job scripts do what their first lines say, and does a campaign survive whatever happens to its nodes?

One story: the driver is a job, which Slurm warns that its time is nearly over; then a node dies; then a block is
cancelled. What the campaign has left is trained on and sampled from by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import CPU, FAST, MPIRUN, TWO_NODES, Cluster, write_site
from small_campaign import EMT, SLOW, Campaign

from campaign.scheduler import Block, blocks_of

SCRIPTS = Path(__file__).parents[2] / "slurm"
SMELT = f"#!{sys.executable}\nfrom campaign.cli import main\nmain()\n"


@dataclass
class Story:
    cluster: Cluster
    folder: Path
    site: Path
    campaign: Campaign

    def submit(self, script: str, options: list[str], arguments: list[str]) -> str:
        """The number of the job, which writes to the file `script` in the folder."""
        output = [f"--output={self.folder / script}", f"--error={self.folder / 'errors'}"]
        options = ["--parsable", *output, f"--chdir={self.folder}", *options]
        return self.cluster.run("sbatch", *options, str(SCRIPTS / script), *arguments)

    def end(self, job: str, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> str:
        """What it ended as."""
        self.cluster.wait(lambda: meanwhile() or job not in self.cluster.jobs(), seconds)
        return self.cluster.state(job)

    def error(self) -> str:
        return (self.folder / "errors").read_text()

    def said(self, script: str) -> str:
        path = self.folder / script
        return path.read_text() if path.exists() else ""

    def status(self) -> dict[str, Any]:
        text = self.cluster.run(str(self.folder / "env/bin/smelt"), "status", "--json", str(self.campaign.run_dir))
        summary: dict[str, Any] = json.loads(text)
        return summary


def story_of(cluster: Cluster, folder: Path, patch: pytest.MonkeyPatch, config: str, **tables: Any) -> Story:
    smelt = folder / "env" / "bin" / "smelt"
    smelt.parent.mkdir(parents=True)
    smelt.write_text(SMELT)
    smelt.chmod(0o755)
    site = write_site(folder / "site.toml", **tables)
    story = Story(cluster, folder, site, Campaign(folder, site, config))
    for name, value in (story.campaign.environment | {"SMELT_ENV": str(folder / "env")}).items():
        patch.setenv(name, value)
    patch.setenv("SMELT_HOME", str(SCRIPTS.parent))
    return story


@pytest.fixture(scope="module")
def story(running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    # The driver takes a core of a node, so that walkers cannot have a whole one.
    sample = {"slurm": CPU | {"exclusive": False}}
    with pytest.MonkeyPatch.context() as patch:
        yield story_of(running_cluster, tmp_path_factory.mktemp("jobs"), patch, SLOW, sample=sample)
    running_cluster.script("reset")


class Trouble:
    """What happens to a campaign, one after the other, each once labels go on after the one before."""

    def __init__(self, story: Story, job: str) -> None:
        self._story = story
        self._job = job
        self._next = [self._give_time, self._kill_node, self._cancel_block]
        self._computed = 0
        self.blocks: list[Block] = []

    def __call__(self) -> None:
        if self._next and self._next[0]():
            self._next.pop(0)
            self._computed = len(self._story.campaign.computed())

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
    story.cluster.wait(lambda: story.cluster.state(job) == "RUNNING", 10)
    trouble = Trouble(story, job)
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


def test_campaign_runs_inside_of_one_job(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Driver and all stages on the four nodes of a job, each stage on nodes of its own."""
    pools = {
        "sample": {"slurm": FAST},
        "label": {"slots": 2, "slurm": FAST},
        "train": {"launcher": MPIRUN, "slurm": FAST | TWO_NODES},
    }
    told = story_of(cluster, tmp_path, monkeypatch, EMT, allocation=True, **pools)
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
