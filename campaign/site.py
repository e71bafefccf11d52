"""What does the machine offer, and which stage gets how much of it? Data, read from a site file and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from shards.settings import Settings, SettingsError, parse_settings, read_toml
from trainer.launch import DEFAULT_LAUNCHER

__all__ = ["LabelPool", "Pool", "Site", "Slurm", "TrainPool", "load_site", "parse_site"]

OF_A_JOB = (
    "partition",
    "account",
    "qos",
    "constraint",
    "walltime_min",
    "exclusive",
    "scheduler_options",
)
Word = Annotated[str, StringConstraints(pattern=r"^\S*$")]
Option = Annotated[str, StringConstraints(pattern=r"^--?[A-Za-z][^\n]*$")]
Line = Annotated[str, StringConstraints(pattern=r"^[^\n]*$")]


class Slurm(Settings):
    """Blocks of nodes that a pool gets from Slurm: as many as its tasks keep busy, none while it has no task."""

    partition: Word = ""
    """Partition; the machine's default if empty."""
    account: Word = ""
    """Account that is charged; yours by default if empty."""
    qos: Word = ""
    """Quality of service; the machine's default if empty."""
    constraint: Word = ""
    """Features that the nodes must have; any if empty."""
    walltime_min: int = Field(default=60, ge=1)
    """Longest time of a block. A task that is cut off by it all the same is started again in another block."""
    task_min: float = Field(default=10.0, gt=0)
    """Time that a task may take, minutes: none is started in the last so many of a block, so that it ends in good
    order. A label's is labeler.time_limit_min if longer, a training's trainer.max_minutes; a training that takes
    longer than a block goes on in the next one."""
    nodes_per_block: int = Field(default=1, ge=1)
    """Nodes of one job. Larger blocks mean fewer jobs in the queue, and a longer wait for each."""
    max_blocks: int = Field(default=1, ge=1)
    """Jobs at the same time, at most."""
    workers: Literal["node", "block"] = "node"
    """node: every node of a block has workers of its own; a task stays on its node, on an equal part of its cores.
    block: the first node has them, and a task may start MPI ranks on all nodes of the block, or on its equal part of
    them if there are several."""
    cores_per_node: int = Field(default=0, ge=0)
    """Cores that are asked for on each node; 0 asks for none, as is right where whole nodes are given."""
    gpus_per_node: int = Field(default=0, ge=0)
    """GPUs that are asked for on each node. Every worker of a node sees one of them; where there are more workers, the
    same number shares each: NVIDIA's do so best with "nvidia-cuda-mps-control -d" among the shell lines. Workers of a
    block see all."""
    exclusive: bool = True
    """Whole nodes, shared with no other job."""
    scheduler_options: tuple[Option, ...] = ()
    """More options of sbatch, such as "--mem=0" or "--licenses=scratch"."""
    environment: tuple[Line, ...] = ()
    """Shell lines that come after those of the machine: module load, export, ..."""
    scratch: Line = "/tmp"
    """Folder on every node for temporary files. It must be there; "$NAME" stands for a variable of the job."""
    poll_s: int = Field(default=30, ge=1)
    """Time between two looks at the state of the blocks: a lost one is replaced after that. Short ones are a burden on
    the scheduler."""
    silence_s: int = Field(default=60, ge=5)
    """A node that has said nothing for so long is taken to be lost; its tasks are started again elsewhere. A node that
    hears nothing of the driver for so long gives up likewise."""

    @property
    def places(self) -> int:
        """Where workers are, all blocks together."""
        return self.max_blocks * (self.nodes_per_block if self.workers == "node" else 1)


class Pool(Settings):
    """One kind of workers."""

    slots: int = Field(default=1, ge=1)
    """Tasks that run at the same time."""
    cores: int = Field(default=1, ge=1)
    """Threads of one process of a task."""
    nice: int = Field(default=0, ge=0, le=19)
    """Priority against the other pools when cores are shared: 0 first, 19 last."""
    slurm: Slurm | None = None
    """Where the workers are: on nodes from Slurm; beside the driver without this table. `slots` are then spread evenly
    over all places that have workers."""

    @property
    def size(self) -> dict[str, int]:
        """Slots, cores and nodes in all; no nodes where they are not its own."""
        nodes = self.slurm.max_blocks * self.slurm.nodes_per_block if self.slurm else 0
        cores = nodes * self.slurm.cores_per_node if self.slurm else 0
        return {"slots": self.slots, "cores": cores or self.slots * self.cores, "nodes": nodes}


class LabelPool(Pool):
    slots: int = Field(default=2, ge=1)
    """Tasks that run at the same time."""
    launcher: tuple[str, ...] = ()
    """Words that start the ranks of a label; placeholders as for train.launcher. If empty, labeler.launcher of the
    campaign, which starts them on one node."""


class TrainPool(Pool):
    launcher: tuple[str, ...] = DEFAULT_LAUNCHER
    """Words that start the ranks of a training; {ranks} stands for their number, {nodes} for the number of nodes of a
    task, {nodelist} for their names, such as n1,n2, and {hosts} for names with the ranks of each, such as
    n1:2,n2:2."""


class Site(Settings):
    """A machine."""

    name: str
    """Name of the machine, for people."""
    environment: tuple[str, ...] = ()
    """Shell lines that every worker runs first: module load, export, ..."""
    address: Word = "127.0.0.1"
    """Where workers on other hosts reach the driver: its name, its address, or interface:NAME for the address that the
    driver's host has on this network interface, such as interface:ib0. To be given where a pool is on Slurm."""
    allocation: bool = False
    """The driver and all stages are inside of one large job (slurm/allocation.sbatch): blocks are steps of it, not jobs
    of their own, and what a job is asked for (partition, walltime_min, ...) is not said here."""
    sample: Pool = Field(default_factory=Pool)
    """Workers that build cells, run walkers and rank candidates."""
    label: LabelPool = Field(default_factory=LabelPool)
    """Workers that run the quantum code."""
    train: TrainPool = Field(default_factory=TrainPool)
    """Workers that train and evaluate models."""

    @property
    def pools(self) -> dict[str, Pool]:
        return {"sample": self.sample, "label": self.label, "train": self.train}


def load_site(path: Path) -> Site:
    """Raises SettingsError: no such file, not TOML, or any fault in it; one line per fault."""
    return parse_site(read_toml(path))


def parse_site(table: dict[str, Any]) -> Site:
    site = parse_settings(Site, table)
    faults = [fault for name, pool in site.pools.items() if pool.slurm for fault in _contradictions(name, pool)]
    if any(pool.slurm for pool in site.pools.values()) and "address" not in site.model_fields_set:
        faults.append(
            "address: missing; workers on Slurm nodes reach the driver by it: a name, an address, or interface:NAME"
        )
    if site.allocation:
        faults += [
            f"{name}.slurm.{field} = {getattr(pool.slurm, field)!r}: has no meaning with allocation = true"
            for name, pool in site.pools.items()
            for field in OF_A_JOB
            if pool.slurm and getattr(pool.slurm, field) != Slurm.model_fields[field].default
        ]
    for name, launcher in (("label", site.label.launcher), ("train", site.train.launcher)):
        slurm = site.pools[name].slurm
        if slurm and _spans_nodes(slurm) and launcher in ((), DEFAULT_LAUNCHER):
            faults.append(
                f"{name}.launcher: starts all ranks on one node, but {name}.slurm gives a task"
                f' {slurm.nodes_per_block}; use ["mpirun", "-np", "{{ranks}}", "--host", "{{hosts}}",'
                ' "--oversubscribe"] or ["srun", "--ntasks={ranks}", "--mpi=pmix"]'
            )
    if faults:
        raise SettingsError("\n".join(faults))
    return site


def _contradictions(name: str, pool: Pool) -> list[str]:
    """Faults of a pool on Slurm that show only between fields."""
    slurm = pool.slurm
    assert slurm is not None
    faults = []
    if pool.nice:
        faults.append(f"{name}.nice = {pool.nice}: must be 0 with {name}.slurm: its cores are not shared")
    n_workers, rest = divmod(pool.slots, slurm.places)
    if rest:
        number = "max_blocks * nodes_per_block" if slurm.workers == "node" else "max_blocks"
        faults.append(f"{name}.slots = {pool.slots}: must be a multiple of {name}.slurm's {number} = {slurm.places}")
    elif slurm.cores_per_node and n_workers * pool.cores > slurm.cores_per_node:
        faults.append(
            f"{name}.slurm.cores_per_node = {slurm.cores_per_node}: {n_workers} tasks with {name}.cores = {pool.cores}"
            f" need {n_workers * pool.cores}"
        )
    elif slurm.workers == "node" and 0 < slurm.gpus_per_node < n_workers and n_workers % slurm.gpus_per_node:
        faults.append(
            f"{name}.slurm.gpus_per_node = {slurm.gpus_per_node}: {name}.slots = {pool.slots} puts {n_workers} tasks on"
            " a node; must be the same number for each GPU, or at most one"
        )
    return faults


def _spans_nodes(slurm: Slurm) -> bool:
    return slurm.workers == "block" and slurm.nodes_per_block > 1
