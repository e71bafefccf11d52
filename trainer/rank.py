"""What does one rank do? It is started by trainer.stage, as `python -m trainer JOB.json`, on every rank alike.

Leaves result.json in the job's folder: {"state": "finished" | "stopped" | "failed", ...}.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from potential.committee import Committee
from potential.model_file import load_committee, read_metadata, save_committee
from shards.files import write_atomically
from shards.outcome import FailureClass
from shards.reader import ShardError
from trainer.dataset import Dataset, DatasetError, fit_self_energies, is_outlier, load_dataset
from trainer.fit import Fitted, NotFiniteError, fit
from trainer.job import Job, read_job
from trainer.launch import HEARTBEAT
from trainer.memory import node_memory_GB
from trainer.networks import Networks
from trainer.problem import Problem
from trainer.transfer import borrow_forces, check_levels, compare_layers, layer_factors, shift_self_energies
from trainer.world import World, join_world

__all__ = ["choose_device", "main"]

log = logging.getLogger("trainer")
LOCK_WAIT_S = 90.0
SILENCE_S = 20.0
PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    job = read_job(Path(arguments[0]))
    if job.settings.ranks > 1:
        _die_with_launcher()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        world = join_world(job.settings.ranks)
    except ImportError as error:
        return _fail(
            job, FailureClass.MISSING, f"Horovod cannot be loaded: {error}; train with ranks = 1, or install it"
        )
    logging.basicConfig(
        level=logging.INFO if world.rank == 0 else logging.WARNING,
        format=f"%(asctime)s rank {world.rank}: %(message)s",
        stream=sys.stdout,
    )
    if world.rank == 0 and (heartbeat := os.environ.get(HEARTBEAT)):
        threading.Thread(target=_watch_caller, args=[Path(heartbeat), stop], daemon=True).start()
    try:
        with _alone(job.dest, world):
            _train(job, world, stop)
    except (DatasetError, ShardError) as error:
        return _fail(job, FailureClass.BAD_LABEL, str(error))
    except (NotFiniteError, ValueError, BlockingIOError) as error:
        return _fail(job, FailureClass.CRASH, str(error))
    except MemoryError as error:
        return _fail(job, FailureClass.MEMORY, f"out of memory: {error}")
    except Exception as error:
        log.exception("unexpected")
        return _fail(job, FailureClass.CRASH, f"{type(error).__name__}: {error}")
    return 0


def _train(job: Job, world: World, stop: threading.Event) -> None:
    device = choose_device(job.settings.device, world.rank_here)
    dataset = _usable(load_dataset(job.receipts, job.elements, verify=world.rank == 0), job)
    committee = _first_committee(job, dataset)
    networks = Networks.of(committee)
    factors = None
    if job.transfer:
        factors = layer_factors(networks, job.transfer)
        dataset = replace(dataset, borrowed=borrow_forces(committee, dataset, job.transfer, job.replay))
    share = job.settings.memory_share
    cache_GB = (1 - share) * node_memory_GB()
    if dataset.files_GB > cache_GB:
        log.info("%.1f GB of shards, %.1f GB to cache them in: nothing is read ahead", dataset.files_GB, cache_GB)
        dataset.read_no_more_than_asked()
    problem = Problem(
        dataset,
        committee.self_energies.numpy(),
        networks,
        committee.aev,
        job.elements,
        committee.n_members,
        job.settings,
        world.rank,
        world.n_ranks,
        share * _memory_GB(device, world.n_here),
        device,
    )
    parameters = networks.take(committee, getattr(torch, job.settings.dtype))
    log.info(
        "%d members stacked on every rank; %d ranks share the structures of a step and add up %.2f MB once",
        len(parameters), world.n_ranks, parameters.nbytes / 1e6,
    )  # fmt: skip
    fitted = fit(
        problem,
        parameters.to(device),
        world,
        seed=job.seed,
        folder=job.dest,
        job=job.digest,
        stop=stop.is_set,
        factors=None if factors is None else factors.to(device),
    )
    if world.rank == 0:
        layers = compare_layers(networks, parameters, fitted.state.best.cpu()) if job.transfer else {}
        networks.give(fitted.state.best, committee)
        _publish(job, dataset, committee, fitted, layers)


def choose_device(device: str, rank_here: int) -> torch.device:
    """The device of one rank of a node; `cuda` without a number is shared out among them.

    Raises ValueError when there is no GPU.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"trainer.device = {device!r}: torch {torch.__version__} finds no GPU here: use 'cpu'")
    return torch.device(f"cuda:{rank_here % torch.cuda.device_count()}" if device == "cuda" else device)


def _memory_GB(device: torch.device, n_here: int) -> float:
    """What there is for one of so many ranks of a node, of its memory or of that of its GPU."""
    if device.type == "cpu":
        return node_memory_GB() / n_here
    total = torch.cuda.get_device_properties(device).total_memory
    return total / 1e9 / math.ceil(n_here / torch.cuda.device_count())


def _usable(dataset: Dataset, job: Job) -> Dataset:
    hard = is_outlier(dataset, job.settings.energy_outlier_sigma, job.settings.max_force_eV_per_A)
    if hard.any():
        left_out = [dataset.id(i) for i in np.flatnonzero(hard).tolist()]
        log.info("left out %d frames far off in energy or force: %s", len(left_out), ", ".join(left_out))
    return dataset.subset(np.flatnonzero(~hard))


def _first_committee(job: Job, dataset: Dataset) -> Committee:
    """Return the committee to begin with; a warm one keeps its self energies, which its networks are made for.

    One that is carried to another level gets self energies that take up what differs by composition.
    """
    fresh = Committee.from_settings(job.potential, job.elements, job.seed)
    if not job.start:
        fresh.self_energies = torch.from_numpy(fit_self_energies(dataset.counts, dataset.energy))
        return fresh
    warm = load_committee(job.start)
    check_levels(read_metadata(job.start), job.start, dataset, transfer=job.transfer is not None)
    if job.transfer:
        warm.self_energies = torch.from_numpy(shift_self_energies(warm, dataset))
        return warm
    for name in ("elements", "aev", "hidden", "n_members"):
        if getattr(warm, name) != getattr(fresh, name):
            raise ValueError(
                f"{job.start}: cannot start from it: its {name} is {getattr(warm, name)}, the settings ask for"
                f" {getattr(fresh, name)}: set trainer.warm_start = false, or leave the potential as it was"
            )
    return warm


def _publish(
    job: Job, dataset: Dataset, committee: Committee, fitted: Fitted, layers: dict[str, dict[str, float]]
) -> None:
    state = fitted.state
    facts: dict[str, Any] = {
        "n_frames": len(dataset),
        "n_left_out": sum(receipt.n_frames for receipt in job.receipts) - len(dataset),
        "level": dataset.level.digest,
        "epochs": state.epoch,
        "best_epochs": state.plateau.best_epoch,
        "seconds": state.seconds,
        "frames_per_s": len(dataset) * state.epoch / max(state.seconds, 1e-9),
        "n_ranks": job.settings.ranks,
        "warm_start": bool(job.start),
        "valid": fitted.valid,
        "test": fitted.test,
    }
    if job.transfer:
        facts |= {"parent": job.start, "n_borrowed_forces": len(dataset.borrowed), "layers": layers}
    if fitted.finished:
        model = job.dest / "model.safetensors"
        metadata = {
            "training": facts,
            "level": json.loads(dataset.level.to_json()),
            "seed": job.seed,
            "job": job.digest,
        }
        facts |= {"model": str(model), "digest": save_committee(committee, model, metadata)}
    _write_result(job, {"state": "finished" if fitted.finished else "stopped", "facts": facts})
    if fitted.finished:
        (job.dest / "checkpoint.safetensors").unlink(missing_ok=True)


def _write_result(job: Job, result: dict[str, Any]) -> None:
    write_atomically(job.dest / "result.json", json.dumps({"job": job.digest} | result, indent=1).encode())


def _fail(job: Job, kind: FailureClass, message: str) -> int:
    """Say why on every rank that gets here; all of them say the same."""
    log.error("%s", message)
    _write_result(job, {"state": "failed", "kind": kind.value, "message": message})
    return 1


def _watch_caller(heartbeat: Path, stop: threading.Event) -> None:
    """Ask to stop when the heartbeat is taken away or let go, or does not change any more."""
    last, changed = "", time.monotonic()
    with suppress(FileNotFoundError):
        while time.monotonic() - changed < SILENCE_S:
            with heartbeat.open("r+") as file:
                if (beat := file.read()) != last:
                    last, changed = beat, time.monotonic()
                if beat.startswith(f"{socket.gethostname()} ") and _is_let_go(file):
                    break
            time.sleep(0.5)
    stop.set()


def _is_let_go(file: IO[str]) -> bool:
    """Does no process of this host hold the file's lock? Between hosts not every file system passes locks on."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _die_with_launcher() -> None:
    """Have Linux kill this rank when mpirun is killed: it could wait for ever in a collective."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def _alone(folder: Path, world: World) -> Iterator[None]:
    """Let rank 0 hold the folder's lock, so that what a killed caller left running ends before its successor begins."""
    if world.rank:
        yield
        return
    with (folder / "lock").open("a") as file:
        for waited_s in range(int(LOCK_WAIT_S) + 1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waited_s == int(LOCK_WAIT_S):
                    raise BlockingIOError(f"{folder}: another training is running here; stop it first") from None
                time.sleep(1.0)
        yield
