"""What does the machine offer, and how are stages run on it? The only file that imports Parsl."""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, StringConstraints

from campaign.lease import MARKER, reap
from campaign.scheduler import SchedulerError, cancel_blocks, job_prefix
from shards.outcome import FailureClass
from shards.settings import Settings, SettingsError, parse_settings, read_toml
from trainer.launch import DEFAULT_LAUNCHER

__all__ = ["ParslPools", "Pool", "Pools", "Site", "Slurm", "TrainPool", "failure_class", "load_site", "parse_site"]

CLEANUP_S = 10.0
COMMAND_S = 60  # busy controllers answer late
INTERFACE = "interface:"

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
    """Longest time of a block. A task that is cut off by it is started again in another block."""
    nodes_per_block: int = Field(default=1, ge=1)
    """Nodes of one job. Larger blocks mean fewer jobs in the queue, and a longer wait for each."""
    max_blocks: int = Field(default=1, ge=1)
    """Jobs at the same time, at most."""
    workers: Literal["node", "block"] = "node"
    """node: every node of a block has workers of its own, and a task stays on its node. block: the first node has them,
    and a task may start MPI ranks on all nodes of the block."""
    cores_per_node: int = Field(default=0, ge=0)
    """Cores that are asked for on each node; 0 asks for none, as is right where whole nodes are given."""
    gpus_per_node: int = Field(default=0, ge=0)
    """GPUs that are asked for on each node. Every worker of a node has one of its own; those of a block share all."""
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


class TrainPool(Pool):
    launcher: tuple[str, ...] = DEFAULT_LAUNCHER
    """Words that start the ranks of a training; {ranks} stands for their number, {hosts} for the nodes of the block
    with the ranks of each, such as n1:2,n2:2."""


class Site(Settings):
    """A machine."""

    name: str
    """Name of the machine, for people."""
    environment: tuple[str, ...] = ()
    """Shell lines that every worker runs first: module load, export, ..."""
    address: Word = "127.0.0.1"
    """Where workers on other hosts reach the driver: its name, its address, or interface:NAME for the address that the
    driver's host has on this network interface, such as interface:ib0. To be given where a pool is on Slurm."""
    sample: Pool = Field(default_factory=Pool)
    """Workers that build cells and run walkers."""
    label: Pool = Field(default_factory=lambda: Pool(slots=2))
    """Workers that run the quantum code."""
    train: TrainPool = Field(default_factory=TrainPool)
    """Workers that train, rank candidates and evaluate models."""

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
    if site.train.slurm and _spans_nodes(site.train.slurm) and site.train.launcher == DEFAULT_LAUNCHER:
        faults.append(
            "train.launcher: starts all ranks on one node, but train.slurm gives a training"
            f' {site.train.slurm.nodes_per_block}; use ["mpirun", "-np", "{{ranks}}", "--host", "{{hosts}}",'
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
    elif slurm.workers == "node" and 0 < slurm.gpus_per_node < n_workers:
        faults.append(
            f"{name}.slurm.gpus_per_node = {slurm.gpus_per_node}: {name}.slots = {pool.slots} puts {n_workers} tasks on"
            " a node; at most one per GPU"
        )
    return faults


def _spans_nodes(slurm: Slurm) -> bool:
    return slurm.workers == "block" and slurm.nodes_per_block > 1


class Pools(Protocol):
    """Where tasks run. The driver never submits more than `slots` to a pool."""

    @property
    def slots(self) -> Mapping[str, int]: ...

    def submit(self, pool: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> Future[dict[str, Any]]: ...

    def lost(self) -> str:
        """What has broken so that submitted tasks would never end; empty when all is well."""
        ...


class ParslPools:
    """The pools of a site as Parsl executors, from entering to leaving the context.

    One executor per pool, because threads and priority are set in the environment of its workers; each is started
    when its first task comes.
    """

    def __init__(self, site: Site, run_dir: Path) -> None:
        self._site = site
        self._run_dir = run_dir

    @property
    def slots(self) -> Mapping[str, int]:
        return {name: pool.slots for name, pool in self._site.pools.items()}

    @property
    def _on_slurm(self) -> bool:
        return any(pool.slurm for pool in self._site.pools.values())

    def __enter__(self) -> ParslPools:
        import parsl

        # interchange.py and process_worker_pool.py are found by PATH.
        folder = str(Path(sys.executable).parent)
        if folder not in os.environ.get("PATH", "").split(os.pathsep):
            os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
        self._address = _address(self._site)
        if self._on_slurm:
            cancel_blocks(self._run_dir)
        self._log = _log_to_file(self._run_dir / "logs" / "parsl.log")
        self._kernel = parsl.DataFlowKernel(_parsl_config(self._run_dir))
        self._apps: dict[tuple[str, Callable[..., Any]], Callable[..., Any]] = {}
        return self

    def submit(self, pool: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> Future[dict[str, Any]]:
        import parsl

        if pool not in self._kernel.executors:
            self._kernel.add_executors([_executor(pool, self._site, self._run_dir, self._address)])
        # Wrapped here and not decorated: a decorated function travels by value, this one by name.
        key = (pool, function)
        if key not in self._apps:
            self._apps[key] = parsl.python_app(function, data_flow_kernel=self._kernel, executors=[pool])
        future: Future[dict[str, Any]] = self._apps[key](*arguments)
        return future

    def lost(self) -> str:
        for name, executor in self._kernel.executors.items():
            # Parsl itself does not notice.
            process = getattr(executor, "interchange_proc", None)
            if process is not None and process.poll() is not None:
                return f"the interchange of the {name} workers has ended (logs: {self._run_dir / 'logs' / 'parsl'})"
        return ""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Workers first: whatever they are at is not wanted any more, and Parsl would wait for it.
        reap(self._run_dir)
        if self._on_slurm:
            self._cancel_blocks()
        # In a thread, because it never returns when an interchange is gone.
        cleanup = threading.Thread(target=self._kernel.cleanup, daemon=True)
        cleanup.start()
        cleanup.join(CLEANUP_S)
        logging.getLogger("parsl").removeHandler(self._log)
        self._log.close()

    def _cancel_blocks(self) -> None:
        try:
            cancel_blocks(self._run_dir)
        except SchedulerError as error:
            # The next driver does it; until then the blocks find their interchange gone and end.
            logging.getLogger("parsl").warning("blocks were not cancelled: %s", error)


def failure_class(error: BaseException) -> FailureClass:
    """Class of failure of a task that ended with an exception of Parsl's."""
    from parsl.executors.errors import BadStateException
    from parsl.executors.high_throughput.errors import ManagerLost
    from parsl.jobs.errors import TooManyJobFailuresError

    if isinstance(error, BadStateException | TooManyJobFailuresError):
        return FailureClass.MISSING  # workers cannot be started at all
    if isinstance(error, ManagerLost):
        return FailureClass.NODE_LOST
    return FailureClass.CRASH  # a worker that dies alone, too


def _log_to_file(path: Path) -> logging.Handler:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("parsl")
    logger.addHandler(handler)
    logger.propagate = False
    return handler


def _parsl_config(run_dir: Path) -> Any:
    from parsl.config import Config

    return Config(
        run_dir=str(run_dir / "logs" / "parsl"),
        retries=0,  # the policy decides about retries
        strategy="simple",  # a block that was lost is replaced
        strategy_period=1,
        initialize_logging=False,
        usage_tracking=0,
    )


def _executor(name: str, site: Site, run_dir: Path, address: str) -> Any:
    from parsl.executors import HighThroughputExecutor
    from parsl.jobs.error_handlers import windowed_error_handler

    pool = site.pools[name]
    slurm = pool.slurm
    marker = f"{MARKER}={run_dir.resolve()}"
    interchange = [sys.executable, "-m", "parsl.executors.high_throughput.interchange"]
    return HighThroughputExecutor(
        label=name,
        # Without one every interface is tried, and an outside service asked.
        address=address if slurm else "127.0.0.1",
        loopback_address="127.0.0.1",
        encrypted=True,
        max_workers_per_node=pool.slots // slurm.places if slurm else pool.slots,
        cores_per_worker=1e-6,
        available_accelerators=slurm.gpus_per_node if slurm and slurm.workers == "node" else (),
        heartbeat_period=max(1, slurm.silence_s // 5) if slurm else 2,
        heartbeat_threshold=slurm.silence_s if slurm else 10,
        # The default handler fails all tasks for good when the first block fails.
        block_error_handler=windowed_error_handler,
        interchange_launch_cmd=[sys.executable, str(Path(__file__).with_name("leash.py")), "env", marker, *interchange],
        provider=_slurm_provider(name, slurm, site, run_dir) if slurm else _local_provider(pool, site, run_dir),
    )


def _local_provider(pool: Pool, site: Site, run_dir: Path) -> Any:
    from parsl.launchers import SimpleLauncher
    from parsl.providers import LocalProvider

    return LocalProvider(
        init_blocks=1,
        min_blocks=1,
        max_blocks=1,
        launcher=SimpleLauncher(),
        worker_init=_worker_init(pool, site, run_dir),
    )


def _slurm_provider(name: str, slurm: Slurm, site: Site, run_dir: Path) -> Any:
    from parsl.providers import SlurmProvider

    class Blocks(SlurmProvider):
        @property
        def status_polling_interval(self) -> int:
            return slurm.poll_s

        def submit(self, command: str, tasks_per_node: int, job_name: str = "") -> str:
            # Under a name by which a later driver finds it; Parsl makes it unique.
            job: str = super().submit(command, tasks_per_node, f"{job_prefix(run_dir)}{name}")
            return job

        def execute_wait(self, cmd: str, timeout: int | None = None) -> tuple[int, str, str]:
            # A driver that is a job itself must not pass on its own job's variables to its blocks.
            own = [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]
            clean = " ".join(["env", *(f"-u {name}" for name in own), cmd])
            done: tuple[int, str, str] = super().execute_wait(clean, timeout)  # type: ignore[no-untyped-call]
            return done

    options = ["--no-requeue", *slurm.scheduler_options]  # the driver replaces a lost block, with a new name
    if slurm.workers == "node":
        options.append("--no-kill")  # a block that loses a node goes on with the others
    return Blocks(
        partition=slurm.partition or None,
        account=slurm.account or None,
        qos=slurm.qos or None,
        constraint=slurm.constraint or None,
        nodes_per_block=slurm.nodes_per_block,
        cores_per_node=slurm.cores_per_node or None,
        gpus_per_node=slurm.gpus_per_node or None,
        init_blocks=0,
        min_blocks=0,
        max_blocks=slurm.max_blocks,
        # Parsl takes every node of a block to have workers.
        parallelism=1 if slurm.workers == "node" else slurm.nodes_per_block,
        walltime=f"{slurm.walltime_min // 60:02d}:{slurm.walltime_min % 60:02d}:00",
        exclusive=slurm.exclusive,
        scheduler_options="\n".join(f"#SBATCH {option}" for option in options),
        worker_init=_worker_init(site.pools[name], site, run_dir),
        cmd_timeout=COMMAND_S,
        launcher=_slurm_launcher(slurm),
    )


def _slurm_launcher(slurm: Slurm) -> Any:
    """What starts the workers of a block: on its first node only, or on every one."""
    from parsl.launchers import SrunLauncher
    from parsl.launchers.base import Launcher

    class FirstNode(Launcher):
        def __call__(self, command: str, tasks_per_node: int, nodes_per_block: int, script_dir: str = "") -> str:
            return command

    if slurm.workers == "block":
        return FirstNode()
    # Tasks may start steps of their own beside the workers'.
    cores = f"--cpus-per-task={slurm.cores_per_node}" if slurm.cores_per_node else ""
    return SrunLauncher(overrides=f"--no-kill --kill-on-bad-exit=0 --overlap --cpu-bind=none {cores}")


def _address(site: Site) -> str:
    """Raises SettingsError: no such interface, or it has no address."""
    from parsl.addresses import address_by_interface

    if not site.address.startswith(INTERFACE):
        return site.address
    try:
        address: str = address_by_interface(site.address.removeprefix(INTERFACE))
    except OSError as error:
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise SettingsError(f"address = {site.address!r}: {error.strerror} (interfaces here: {known})") from error
    return address


def _worker_init(pool: Pool, site: Site, run_dir: Path) -> str:
    code = Path(__file__).resolve().parent.parent
    slurm = pool.slurm
    return "\n".join(
        [
            *site.environment,
            *(slurm.environment if slurm else ()),
            f'export TMPDIR="{slurm.scratch}"' if slurm else "",
            f"export {MARKER}={shlex.quote(str(run_dir.resolve()))}",
            f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            f"export OMP_NUM_THREADS={pool.cores} OPENBLAS_NUM_THREADS={pool.cores} MKL_NUM_THREADS={pool.cores}",
            f"renice -n {pool.nice} -p $$ >/dev/null" if pool.nice else "",
        ]
    )
