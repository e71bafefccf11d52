"""How are tasks run on the pools of a site? Parsl is known here and in blocks.py, and nowhere else."""

from __future__ import annotations

import logging
import math
import os
import shlex
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Protocol

import parsl
from parsl.addresses import address_by_interface
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.executors.errors import BadStateException
from parsl.executors.high_throughput.errors import ManagerLost
from parsl.executors.high_throughput.executor import DEFAULT_LAUNCH_CMD
from parsl.jobs.error_handlers import windowed_error_handler
from parsl.jobs.errors import TooManyJobFailuresError
from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider
from parsl.providers.base import ExecutionProvider

from campaign.allocation import Allocation, shares
from campaign.blocks import LEASH, Blocks, JobBlocks, StepBlocks, handle_fruitless_blocks
from campaign.horizon import BLOCK_END, MARGIN_S
from campaign.lease import MARKER, reap
from campaign.scheduler import SchedulerError, blocks_of, cancel_blocks, steps_of
from campaign.site import Pool, Site
from campaign.worker import GPUS, PIN
from shards.outcome import FailureClass
from shards.settings import SettingsError

__all__ = ["ParslPools", "Pools", "failure_class"]

CLEANUP_S = 10.0
DRAIN = "SMELT_DRAIN_S"  # shell variable: seconds until a block takes no more tasks
INTERFACE = "interface:"


class Pools(Protocol):
    """Where tasks run. The driver never submits more than `slots` to a pool."""

    @property
    def slots(self) -> Mapping[str, int]: ...

    def submit(self, pool: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> Future[dict[str, Any]]: ...

    def lost(self) -> str:
        """What has broken so that submitted tasks would never end; empty when all is well."""
        ...

    def waits(self) -> Mapping[str, str]:
        """Pool -> why its tasks wait for nodes; empty when they do not."""
        ...

    def hold(self) -> None:
        """Ask for no more nodes."""
        ...


class ParslPools:
    """The pools of a site as Parsl executors, from entering to leaving the context.

    One executor per pool, because threads and priority are set in the environment of its workers; each is started
    when its first task comes.
    """

    def __init__(self, site: Site, run_dir: Path, limits: Mapping[str, float] = MappingProxyType({})) -> None:
        """limits: seconds that a task may take, for every pool on Slurm (horizon.task_limits)."""
        self._site = site
        self._run_dir = run_dir
        self._limits = limits
        self._on_slurm = any(pool.slurm for pool in site.pools.values())
        self._find = steps_of if site.allocation else blocks_of
        self._left_over = True  # blocks of a former driver, maybe

    @property
    def slots(self) -> Mapping[str, int]:
        return {name: pool.slots for name, pool in self._site.pools.items()}

    def __enter__(self) -> ParslPools:
        """
        Raises:
            SchedulerError: no Slurm here, or not inside of a job although the site says so.
            SettingsError: the site's interface is not here, or the job is too small.
        """
        # interchange.py and process_worker_pool.py are found by PATH.
        folder = str(Path(sys.executable).parent)
        if folder not in os.environ.get("PATH", "").split(os.pathsep):
            os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
        if self._on_slurm and shutil.which("sbatch") is None:
            raise SchedulerError("sbatch is not on PATH: is this a host from which jobs can be submitted?")
        self._address = _address(self._site)
        if self._site.allocation:
            self._allocation = Allocation.this_job()
            self._shares = shares(self._site, self._allocation.cores)
            self._clear()
        self._log = _log_to_file(self._run_dir / "logs" / "parsl.log")
        self._kernel = parsl.DataFlowKernel(_parsl_config(self._run_dir))
        self._executors: dict[str, HighThroughputExecutor] = {}
        self._apps: dict[tuple[str, Callable[..., Any]], Callable[..., Any]] = {}
        return self

    def submit(self, pool: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> Future[dict[str, Any]]:
        if pool not in self._executors:
            self._executors[pool] = self._executor(pool)
            self._kernel.add_executors([self._executors[pool]])
        # Wrapped here and not decorated: a decorated function travels by value, this one by name.
        key = (pool, function)
        if key not in self._apps:
            self._apps[key] = parsl.python_app(function, data_flow_kernel=self._kernel, executors=[pool])
        future: Future[dict[str, Any]] = self._apps[key](*arguments)
        return future

    def lost(self) -> str:
        for name, executor in self._executors.items():
            # Parsl itself does not notice.
            process = executor.interchange_proc
            if process is not None and process.poll() is not None:
                return f"the interchange of the {name} workers has ended (logs: {self._run_dir / 'logs' / 'parsl'})"
        return ""

    def waits(self) -> Mapping[str, str]:
        return {
            name: executor.provider.waits() if executor.outstanding() else ""
            for name, executor in self._executors.items()
            if isinstance(executor.provider, Blocks)
        }

    def hold(self) -> None:
        for executor in self._executors.values():
            if isinstance(executor.provider, Blocks):
                executor.provider.hold()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Workers first: whatever they are at is not wanted any more, and Parsl would wait for it.
        self.hold()
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
            cancel_blocks(self._run_dir, self._find)
        except SchedulerError as error:
            # The next driver does it; until then the blocks find their interchange gone and end.
            logging.getLogger("parsl").warning("blocks were not cancelled: %s", error)

    def _clear(self) -> None:
        """End the blocks of a former driver, before the first of this one: in the thread in which Parsl asks for it."""
        if self._left_over:
            cancel_blocks(self._run_dir, self._find)
            self._left_over = False

    def _executor(self, name: str) -> HighThroughputExecutor:
        pool = self._site.pools[name]
        slurm = pool.slurm
        marker = f"{MARKER}={self._run_dir.resolve()}"
        interchange = [sys.executable, "-m", "parsl.executors.high_throughput.interchange"]
        return HighThroughputExecutor(
            label=name,
            # Without one every interface is tried, and an outside service asked.
            address=self._address if slurm else "127.0.0.1",
            loopback_address="127.0.0.1",
            encrypted=True,
            max_workers_per_node=pool.slots // slurm.places if slurm else pool.slots,
            cores_per_worker=1e-6,
            heartbeat_period=max(1, slurm.silence_s // 5) if slurm else 2,
            heartbeat_threshold=slurm.silence_s if slurm else 10,
            # The default handler fails all tasks for good when the first block fails.
            block_error_handler=handle_fruitless_blocks if slurm else windowed_error_handler,
            launch_cmd=DEFAULT_LAUNCH_CMD.replace("{drain_period}", f"${DRAIN}"),
            interchange_launch_cmd=[*LEASH, "env", marker, *interchange],
            provider=self._provider(name, pool),
        )

    def _provider(self, name: str, pool: Pool) -> ExecutionProvider:
        slurm, prologue = pool.slurm, _prologue(pool, self._site, self._run_dir)
        if slurm is None:
            return LocalProvider(
                init_blocks=1,
                min_blocks=1,
                max_blocks=1,
                launcher=SimpleLauncher(),
                worker_init=f"{prologue}\nexport {DRAIN}=None",
            )
        limit_s = self._limits.get(name, 0.0)
        if not self._site.allocation:
            end = f"$(( $(date +%s) + {60 * slurm.walltime_min - MARGIN_S} ))"
            return JobBlocks(name, slurm, self._run_dir, f"{prologue}\n{_lifetime(end, limit_s)}", self._clear)
        last_start = self._allocation.end - MARGIN_S - limit_s
        if last_start < math.inf:
            prologue += f"\n{_lifetime(str(round(self._allocation.end - MARGIN_S)), limit_s)}"
        else:
            prologue += f"\nexport {DRAIN}=None"
        return StepBlocks(name, slurm, self._run_dir, prologue, self._allocation, self._shares[name], last_start)


def failure_class(error: BaseException) -> FailureClass:
    """Class of failure of a task that ended with an exception of Parsl's."""
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


def _parsl_config(run_dir: Path) -> Config:
    return Config(
        run_dir=str(run_dir / "logs" / "parsl"),
        retries=0,  # the policy decides about retries
        strategy="simple",  # a block that was lost is replaced
        strategy_period=1,
        initialize_logging=False,
        usage_tracking=0,
    )


def _address(site: Site) -> str:
    """Raises SettingsError: no such interface, or it has no address."""
    if not site.address.startswith(INTERFACE):
        return site.address
    try:
        address: str = address_by_interface(site.address.removeprefix(INTERFACE))
    except OSError as error:
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise SettingsError(f"address = {site.address!r}: {error.strerror} (interfaces here: {known})") from error
    return address


def _prologue(pool: Pool, site: Site, run_dir: Path) -> str:
    """The shell lines that come before the workers."""
    code = Path(__file__).resolve().parent.parent
    slurm = pool.slurm
    return "\n".join(
        [
            *site.environment,
            *(slurm.environment if slurm else ()),
            f'export TMPDIR="{slurm.scratch}"' if slurm else "",
            f"export {PIN}=1 {GPUS}={slurm.gpus_per_node}" if slurm and slurm.workers == "node" else "",
            f"export {MARKER}={shlex.quote(str(run_dir.resolve()))}",
            f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            f"export OMP_NUM_THREADS={pool.cores} OPENBLAS_NUM_THREADS={pool.cores} MKL_NUM_THREADS={pool.cores}",
            f"renice -n {pool.nice} -p $$ >/dev/null" if pool.nice else "",
        ]
    )


def _lifetime(end: str, limit_s: float) -> str:
    """What tells workers until when they work, and until when they begin anything.

    end: seconds since the epoch, or what a shell makes them from.
    """
    return f"export {BLOCK_END}={end}\nexport {DRAIN}=$(( {BLOCK_END} - $(date +%s) - {round(limit_s)} ))"
