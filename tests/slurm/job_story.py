"""A campaign whose driver is a job, and what its job scripts say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from a_cluster import Cluster, write_site
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

    def end(self, job: str, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> str:
        """What it ended as."""
        self.cluster.wait(lambda: meanwhile() or job not in self.cluster.jobs(), seconds, pause_s=0.5)
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
