"""What does the machine offer, and how are stages run on it? The only file that imports Parsl."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from pydantic import Field

from campaign.lease import MARKER, reap
from shards.outcome import FailureClass
from shards.settings import Settings, parse_settings, read_toml
from trainer.launch import DEFAULT_LAUNCHER

__all__ = ["ParslPools", "Pool", "Pools", "Site", "failure_class", "load_site"]

CLEANUP_S = 10.0


class Pool(Settings):
    """One kind of workers."""

    slots: int = Field(default=1, ge=1)
    """Tasks that run at the same time."""
    cores: int = Field(default=1, ge=1)
    """Threads of one process of a task."""
    nice: int = Field(default=0, ge=0, le=19)
    """Priority against the other pools when cores are shared: 0 first, 19 last."""


class TrainPool(Pool):
    launcher: tuple[str, ...] = DEFAULT_LAUNCHER
    """Words that start the ranks of a training; {ranks} stands for their number."""


class Site(Settings):
    """A machine."""

    name: str
    """Name of the machine, for people."""
    environment: tuple[str, ...] = ()
    """Shell lines that every worker runs first: module load, export, ..."""
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
    """Raises SettingsError: no such file, not TOML, or any fault in it."""
    return parse_settings(Site, read_toml(path))


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

    def __enter__(self) -> ParslPools:
        import parsl

        # interchange.py and process_worker_pool.py are found by PATH.
        folder = str(Path(sys.executable).parent)
        if folder not in os.environ.get("PATH", "").split(os.pathsep):
            os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
        self._log = _log_to_file(self._run_dir / "logs" / "parsl.log")
        self._kernel = parsl.DataFlowKernel(_parsl_config(self._run_dir))
        self._apps: dict[tuple[str, Callable[..., Any]], Callable[..., Any]] = {}
        return self

    def submit(self, pool: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> Future[dict[str, Any]]:
        import parsl

        if pool not in self._kernel.executors:
            self._kernel.add_executors([_executor(pool, self._site, self._run_dir)])
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
        # In a thread, because it never returns when an interchange is gone.
        cleanup = threading.Thread(target=self._kernel.cleanup, daemon=True)
        cleanup.start()
        cleanup.join(CLEANUP_S)
        logging.getLogger("parsl").removeHandler(self._log)
        self._log.close()


def failure_class(error: BaseException) -> FailureClass:
    """Class of failure of a task that ended with an exception of Parsl's."""
    from parsl.executors.errors import BadStateException
    from parsl.executors.high_throughput.errors import ManagerLost, WorkerLost
    from parsl.jobs.errors import TooManyJobFailuresError

    if isinstance(error, BadStateException | TooManyJobFailuresError):
        return FailureClass.MISSING  # workers cannot be started at all
    if isinstance(error, WorkerLost | ManagerLost):
        return FailureClass.NODE_LOST
    return FailureClass.CRASH


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


def _executor(name: str, site: Site, run_dir: Path) -> Any:
    from parsl.executors import HighThroughputExecutor
    from parsl.jobs.error_handlers import windowed_error_handler
    from parsl.launchers import SimpleLauncher
    from parsl.providers import LocalProvider

    pool = site.pools[name]
    marker = f"{MARKER}={run_dir.resolve()}"
    interchange = [sys.executable, "-m", "parsl.executors.high_throughput.interchange"]
    return HighThroughputExecutor(
        label=name,
        address="127.0.0.1",  # otherwise every interface is tried, and an outside service asked
        loopback_address="127.0.0.1",
        encrypted=True,
        max_workers_per_node=pool.slots,
        cores_per_worker=1e-6,
        heartbeat_period=2,
        heartbeat_threshold=10,
        # The default handler fails all tasks for good when the first block fails.
        block_error_handler=windowed_error_handler,
        interchange_launch_cmd=[sys.executable, str(Path(__file__).with_name("leash.py")), "env", marker, *interchange],
        provider=LocalProvider(
            init_blocks=1,
            min_blocks=1,
            max_blocks=1,
            launcher=SimpleLauncher(),
            worker_init=_worker_init(pool, site, run_dir),
        ),
    )


def _worker_init(pool: Pool, site: Site, run_dir: Path) -> str:
    code = Path(__file__).resolve().parent.parent
    return "\n".join(
        [
            *site.environment,
            f"export {MARKER}={shlex.quote(str(run_dir.resolve()))}",
            f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            f"export OMP_NUM_THREADS={pool.cores} OPENBLAS_NUM_THREADS={pool.cores} MKL_NUM_THREADS={pool.cores}",
            f"renice -n {pool.nice} -p $$ >/dev/null" if pool.nice else "",
        ]
    )
