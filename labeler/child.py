"""What runs inside the process that really computes? `python -m labeler JOB`: frames in, one answer file each.

It computes one frame after the other, each in its own folder, and knows nothing of time limits or shards: the parent
watches the clock, checks what comes out and publishes it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labeler.ase_engine import AseEngine
from labeler.composite_engine import CompositeEngine
from labeler.config import LabelerSettings
from labeler.engine import Answer, Engine, NotConverged
from labeler.gpaw_engine import GpawEngine
from labeler.pyscf_engine import PyscfEngine
from shards.frame import Frame
from shards.outcome import FailureClass
from shards.settings import parse_settings

__all__ = ["Report", "engine_of", "main", "read_report", "write_job"]

ANSWER, LOG = "answer.json", "log.txt"


@dataclass(frozen=True)
class Report:
    """What the child says about one frame: an answer, or a class of failure with a message."""

    seconds: float
    rung: int  # of the ladder: the one that converged, or the last that was tried
    answer: Answer | None = None
    failure: FailureClass | None = None
    message: str = ""


def engine_of(settings: LabelerSettings) -> Engine:
    if settings.engine == "gpaw":
        return GpawEngine(settings.gpaw)
    if settings.engine == "pyscf":
        return PyscfEngine(settings.pyscf, settings.memory_limit_GB)
    if settings.engine == "composite":
        return CompositeEngine(settings.composite, settings.memory_limit_GB)
    dotted = "ase.calculators.emt.EMT" if settings.engine == "emt" else settings.engine
    return AseEngine(settings.engine, dotted, settings.arguments)


def write_job(path: Path, settings: LabelerSettings, tasks: Sequence[tuple[Frame, Path]]) -> None:
    """Write what the child is to do: frames with the folder that each is computed in."""
    job = {"settings": settings.model_dump(mode="json"), "tasks": [_task(frame, folder) for frame, folder in tasks]}
    path.write_text(json.dumps(job), encoding="utf-8")


def read_report(folder: Path) -> Report:
    table = json.loads((folder / ANSWER).read_text(encoding="utf-8"))
    answer, failure = table.pop("answer"), table.pop("failure")
    if answer:
        for name in ("forces", "stress"):
            answer[name] = None if answer[name] is None else np.array(answer[name], dtype=np.float64)
    return Report(
        answer=Answer(**answer) if answer else None, failure=FailureClass(failure) if failure else None, **table
    )


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    settings = parse_settings(LabelerSettings, job["settings"])
    engine = engine_of(settings)
    _limit_memory(settings.memory_limit_GB)
    for task in job["tasks"]:
        folder = Path(task.pop("folder"))
        _enter(folder)
        report = _report(engine, Frame(**task))
        # A rank that fails alone must speak and end all, or the others wait for it in a collective for ever.
        lost = report.failure is not None and report.failure is not FailureClass.SCF
        if _rank(settings) == 0 or lost:
            _write_report(folder, report)
        if lost and settings.ranks > 1:
            _abort()


def _report(engine: Engine, frame: Frame) -> Report:
    start = time.perf_counter()
    rung = 0
    while True:
        try:
            answer = engine.compute(frame, rung)
            return Report(time.perf_counter() - start, rung, answer)
        except Exception as error:
            traceback.print_exc()
            failure = _class_of(error)
            if failure is not FailureClass.SCF or rung + 1 == engine.n_rungs:
                message = f"{type(error).__name__}: {error}"[:500]
                return Report(time.perf_counter() - start, rung, failure=failure, message=message)
        rung += 1


def _class_of(error: Exception) -> FailureClass:
    if isinstance(error, MemoryError):
        return FailureClass.MEMORY
    # Several ASE calculators have no type for it, only words.
    if isinstance(error, NotConverged) or "converge" in str(error).lower():
        return FailureClass.SCF
    return FailureClass.CRASH


def _enter(folder: Path) -> None:
    """Compute in `folder`, with everything that this process or a library prints going to its log."""
    os.chdir(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _task(frame: Frame, folder: Path) -> dict[str, Any]:
    arrays = {name: getattr(frame, name).tolist() for name in ("numbers", "positions", "cell", "pbc")}
    return {"folder": str(folder), **arrays, "charge": frame.charge, "spin": frame.spin}


def _write_report(folder: Path, report: Report) -> None:
    partial = folder / f"{ANSWER}.{os.getpid()}"
    partial.write_text(json.dumps(asdict(report), default=np.ndarray.tolist), encoding="utf-8")
    os.replace(partial, folder / ANSWER)


def _limit_memory(limit_GB: float) -> None:
    if limit_GB:
        resource.setrlimit(resource.RLIMIT_AS, (int(limit_GB * 1e9), resource.RLIM_INFINITY))


def _rank(settings: LabelerSettings) -> int:
    if settings.ranks == 1:
        return 0
    from mpi4py import MPI

    return int(MPI.COMM_WORLD.rank)


def _abort() -> None:
    from mpi4py import MPI

    sys.stderr.flush()
    MPI.COMM_WORLD.Abort(1)
