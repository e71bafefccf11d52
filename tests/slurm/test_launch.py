"""Do the launchers of the example sites bring ranks to all nodes of a job?"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from a_cluster import FAST, MPIRUN, Cluster

from campaign import checkup
from campaign.pools import ParslPools
from campaign.site import load_site, parse_site

ROOT = Path(__file__).parents[2]
SITES = ROOT / "configs" / "sites"
CODE = """
import os, pathlib
from trainer.launch import run_ranks
status = run_ranks(
    ["-c", "import os; print(os.environ['SLURMD_NODENAME'])"], ranks=4, launcher={launcher!r}, nice=0,
    log=pathlib.Path("ranks"), heartbeat=pathlib.Path("beat"), environment=os.environ, time_limit_s=60,
)
pathlib.Path("status").write_text(str(status))
"""


@pytest.mark.parametrize(
    ("site", "as_here"),
    [
        ("cpu.toml", {"mpirun": ["mpirun", "--allow-run-as-root"]}),
        ("nvidia.toml", {"--mpi=pmix": [], "--cpu-bind=cores": [], "--ntasks-per-node=16": ["--ntasks-per-node=2"]}),
    ],
)
def test_ranks_come_to_every_node_of_a_block(
    cluster: Cluster, tmp_path: Path, site: str, as_here: dict[str, list[str]]
) -> None:
    """as_here: words that need others where ranks run as root, without PMIx and binding, on nodes of two cores."""
    launcher = [word for name in load_site(SITES / site).train.launcher for word in as_here.get(name, [name])]
    (tmp_path / "launch.py").write_text(CODE.format(launcher=launcher))
    options = ["--parsable", "-N2", "--ntasks-per-node=1", "--exclusive", "-D", str(tmp_path), "-o", "out"]
    job = cluster.run("sbatch", *options, "--wrap", f"PYTHONPATH={ROOT} {sys.executable} launch.py")
    cluster.wait(lambda: job not in cluster.jobs(), 60)
    assert (tmp_path / "status").read_text() == "0", (tmp_path / "ranks").read_text()
    assert Counter((tmp_path / "ranks").read_text().split()) == {"node3": 2, "node4": 2}


def test_tasks_of_a_block_start_their_ranks_on_nodes_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    slurm = FAST | {"nodes_per_block": 4, "workers": "block"}
    train = {"slots": 2, "launcher": MPIRUN, "slurm": slurm}
    site = parse_site({"name": "test", "address": "127.0.0.1", "train": train})
    start = ("train", checkup._ranks, f"total = 2; {checkup.SAY}", 2, site.train.launcher, tmp_path, tmp_path)
    with ParslPools(site, tmp_path) as pools:
        said = [future.result(120) for future in [pools.submit(*start), pools.submit(*start)]]
    nodes = [re.fullmatch("2 ranks on (node.), (node.) add up", str(words)) for words in said]
    assert sorted(node for match in nodes if match for node in match.groups()) == ["node1", "node2", "node3", "node4"]
