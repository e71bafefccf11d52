"""Which part of one large Slurm job does each pool get, when the driver runs inside of that job with all its stages?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from campaign.scheduler import SchedulerError, ask
from campaign.site import Site, Slurm
from shards.settings import SettingsError

__all__ = ["Allocation", "shares"]


@dataclass(frozen=True)
class Allocation:
    """The job that this process belongs to."""

    job: str
    cores: Mapping[str, int]  # node -> its cores
    end: float  # seconds since the epoch; infinite without a limit

    @classmethod
    def this_job(cls) -> Allocation:
        """Raises SchedulerError: this process does not belong to a job, or Slurm does not answer."""
        job = os.environ.get("SLURM_JOB_ID", "")
        if not job:
            raise SchedulerError("allocation = true: not inside of a Slurm job; use slurm/allocation.sbatch, or salloc")
        nodes = ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        cores = _per_node(os.environ["SLURM_JOB_CPUS_PER_NODE"])
        end = ask("squeue", "--noheader", f"--jobs={job}", "--format=%e").strip()
        return cls(job, dict(zip(nodes, cores, strict=True)), _seconds(end))

    def living(self) -> set[str]:
        """Nodes that the job still has: one that failed is taken from it. Raises SchedulerError."""
        nodes = ask("squeue", "--noheader", f"--jobs={self.job}", "--format=%N").strip()
        return set(ask("scontrol", "show", "hostnames", nodes).split())


def _per_node(counts: str) -> list[int]:
    """Of Slurm's 72(x2),36: 72, 72, 36."""
    numbers = []
    for part in counts.split(","):
        cores, _, times = part.rstrip(")").partition("(x")
        numbers += [int(cores)] * int(times or 1)
    return numbers


def _seconds(end: str) -> float:
    try:
        return datetime.fromisoformat(end).timestamp()
    except ValueError:  # NONE, UNLIMITED
        return float("inf")


def shares(site: Site, cores: Mapping[str, int]) -> dict[str, list[list[str]]]:
    """Give each pool on Slurm its nodes, for as long as the job lives: pool -> for each of its blocks the nodes.

    Nodes are filled in order, whole ones first; pools that ask for cores_per_node may share a node. So a wide block
    never waits for single nodes of others.

    Raises:
        SettingsError: they do not all fit.
    """
    free = dict(cores)
    pools = {name: pool.slurm for name, pool in site.pools.items() if pool.slurm}
    found: dict[str, list[list[str]]] = {}
    for name, slurm in sorted(pools.items(), key=lambda item: (item[1].cores_per_node > 0, -item[1].cores_per_node)):
        found[name] = []
        for _ in range(slurm.max_blocks):
            nodes = [node for node in cores if _fits(slurm, free[node], cores[node])][: slurm.nodes_per_block]
            if len(nodes) < slurm.nodes_per_block:
                raise SettingsError(_refusal(pools, cores))
            for node in nodes:
                free[node] -= slurm.cores_per_node or cores[node]
            found[name].append(nodes)
    return found


def _fits(slurm: Slurm, free: int, all_cores: int) -> bool:
    return free >= (slurm.cores_per_node or all_cores)


def _refusal(pools: Mapping[str, Slurm], cores: Mapping[str, int]) -> str:
    wanted = [
        f"{name} {slurm.max_blocks * slurm.nodes_per_block} with {slurm.cores_per_node or 'all'} cores each"
        for name, slurm in pools.items()
    ]
    sizes = sorted(set(cores.values()))
    return (
        f"allocation = true: the job has {len(cores)} nodes of {' or '.join(map(str, sizes))} cores, which is too"
        f" little; wanted (max_blocks * nodes_per_block): {', '.join(wanted)}"
    )
