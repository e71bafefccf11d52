"""Do the job scripts do what their first lines say? One story: the driver is a job, which is warned that its time is
nearly over; what the campaign has left is then trained on and sampled from by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import SITE, Cluster
from small_campaign import Campaign

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

    def end(self, job: str, seconds: float) -> str:
        """What it ended as."""
        self.cluster.wait(lambda: job not in self.cluster.jobs(), seconds)
        return self.cluster.state(job)

    def error(self) -> str:
        return (self.folder / "errors").read_text()

    def said(self, script: str) -> str:
        return (self.folder / script).read_text()


@pytest.fixture(scope="module")
def story(running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("jobs")
    site, smelt = folder / "site.toml", folder / "env" / "bin" / "smelt"
    # The driver takes a core of a node, so that nobody has whole ones.
    site.write_text(SITE.replace('partition = "cpu",', 'partition = "cpu", exclusive = false,'))
    smelt.parent.mkdir(parents=True)
    smelt.write_text(SMELT)
    smelt.chmod(0o755)
    told = Story(running_cluster, folder, site, Campaign(folder, site))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (told.campaign.environment | {"SMELT_ENV": str(folder / "env")}).items():
            patch.setenv(name, value)
        patch.setenv("SMELT_HOME", str(SCRIPTS.parent))
        yield told
    running_cluster.script("reset")


def test_driver_job_that_is_warned_queues_again_and_goes_on(story: Story) -> None:
    job = story.submit("driver.sbatch", [], story.campaign.arguments)
    story.cluster.wait(lambda: len(story.campaign.computed()) >= 4, 120)
    story.cluster.run("scancel", "--batch", "--signal=USR1", job)
    story.cluster.wait(lambda: "queueing again" in story.said("driver.sbatch"), 30)
    assert story.campaign.events("driver_stopped")[-1]["reason"] == "interrupted"
    assert story.end(job, 300) == "COMPLETED", story.error()
    assert len(story.campaign.events("driver_started")) == 2
    story.campaign.check_labels(20)
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
