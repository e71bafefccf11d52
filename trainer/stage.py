"""How do labels become a committee, and how good is a committee on labels? Files in, files out.

A worker that trains waits for its ranks, which load torch: it does not itself, unless it evaluates a committee, too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from potential.config import PotentialSettings
from shards.files import write_atomically
from shards.manifest import Manifest, ManifestError
from shards.outcome import Clock, Failure, FailureClass, Outcome
from shards.settings import SettingsError
from trainer.config import TrainerSettings, TransferSettings
from trainer.job import Job, read_job, write_job
from trainer.launch import DEFAULT_LAUNCHER, TERMINAL, run_ranks

__all__ = ["DEFAULT_LAUNCHER", "evaluate", "train", "transfer"]

NO_LIMIT_S = 30 * 86400.0
# Beyond max_minutes: reading, describing, the last epoch, publishing.
OVERHEAD_S = 900.0


def train(
    manifest: Path,
    potential: PotentialSettings,
    settings: TrainerSettings,
    elements: Sequence[str],
    dest: Path,
    *,
    seed: int,
    start: Path | None = None,
    launcher: Sequence[str] = DEFAULT_LAUNCHER,
    nice: int = 0,
) -> Outcome:
    """Train a committee on the labels of `manifest` as they are now, and publish dest/model.safetensors.

    A training that was stopped in `dest` is taken up where it was, on the data it began with; one that was
    finished there is handed back as it is. start: model to begin from, used when settings.warm_start is set. The
    outcome's facts hold model, digest, n_frames, epochs, seconds, and per-member errors "valid" and "test".
    """
    make_job = partial(Job.of_manifest, manifest, potential, settings, elements, dest, seed, start)
    return _train("train", make_job, dest, launcher, nice)


def _train(stage: str, make_job: Callable[[], Job], dest: Path, launcher: Sequence[str], nice: int) -> Outcome:
    clock, log = Clock(), dest / "train.log"
    dest.mkdir(parents=True, exist_ok=True)
    with clock.phase("train"):
        try:
            job = make_job()
        except ManifestError as error:
            return Outcome(stage, clock.timing(), failure=Failure(FailureClass.BAD_LABEL, str(error)))
        job = _taken_up(job, dest / "job.json")
        result = _result(job)
        if result.get("state") != "finished":
            result = _run(job, launcher, nice, log)
    failure = None
    if result["state"] != "finished":
        failure = Failure(FailureClass(result["kind"]), result["message"], str(log))
    return Outcome(stage, clock.timing(), failure=failure, facts=result.get("facts", {}))


def transfer(
    manifest: Path,
    model: Path,
    settings: TrainerSettings,
    transfer: TransferSettings,
    dest: Path,
    *,
    seed: int,
    replay: Path | None = None,
    launcher: Sequence[str] = DEFAULT_LAUNCHER,
    nice: int = 0,
) -> Outcome:
    """Carry the committee at `model` to the level of the labels of `manifest`; publish dest/model.safetensors.

    replay: manifest of labels of the lower level, for transfer.forces = "replayed". The outcome's facts are those of
    `train`, and parent, n_borrowed_forces, and layers: how many of each layer's parameters changed, and by how much.

    Raises:
        ModelFileError: `model` cannot be read. SettingsError: forces to be replayed, and nothing to replay.
    """
    if (transfer.forces == "replayed") != (replay is not None):
        raise SettingsError(
            f"transfer.forces = {transfer.forces!r}: labels to replay go with 'replayed', and only there"
        )
    from potential.model_file import load_committee

    elements = load_committee(model).elements
    training, shape = transfer.apply_to(settings), PotentialSettings()  # the model has its own shape
    make_job = partial(Job.of_manifest, manifest, shape, training, elements, dest, seed, model, transfer, replay)
    return _train("transfer", make_job, dest, launcher, nice)


def evaluate(model: Path, manifests: Sequence[Path], dest: Path | None = None) -> Outcome:
    """Compare a committee with labels; facts as `evaluation.evaluate_committee` says, also written to `dest`.

    Raises:
        ModelFileError, ShardError, ManifestError: what cannot be read.
    """
    from trainer.evaluation import evaluate_committee

    clock = Clock()
    with clock.phase("evaluate"):
        shards = [shard for manifest in manifests for shard in Manifest(manifest).shards()]
        facts = evaluate_committee(model, shards)
    if dest is not None:
        dest.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(dest, json.dumps(facts, indent=1).encode())
    return Outcome("evaluate", clock.timing(), facts=facts)


def _taken_up(job: Job, path: Path) -> Job:
    """Return the job that was begun at `path` if it differs from `job` only by labels that came in since."""
    if path.exists():
        begun = read_job(path)
        known = {receipt.digest for receipt in job.receipts}
        same = replace(job, receipts=begun.receipts)
        if same.digest == begun.digest and all(receipt.digest in known for receipt in begun.receipts):
            job = same if _result(begun).get("state") != "finished" else job
    write_job(job, path)
    return job


def _result(job: Job) -> dict[str, Any]:
    """Return what the ranks said about this very job, if anything."""
    path = job.dest / "result.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return result if result.get("job") == job.digest else {}


def _run(job: Job, launcher: Sequence[str], nice: int, log: Path) -> dict[str, Any]:
    (job.dest / "result.json").unlink(missing_ok=True)
    limit_s = job.settings.max_minutes * 60 + OVERHEAD_S if job.settings.max_minutes else NO_LIMIT_S
    environment = dict(os.environ)
    if sys.stderr.isatty():
        environment[TERMINAL] = os.ttyname(sys.stderr.fileno())
    try:
        status = run_ranks(
            ["-m", "trainer", str(job.dest / "job.json")],
            ranks=job.settings.ranks,
            launcher=launcher,
            nice=nice,
            log=log,
            heartbeat=job.dest / "running",
            environment=environment,
            time_limit_s=limit_s,
        )
    except FileNotFoundError as error:
        return _failed(FailureClass.MISSING, f"cannot start the ranks: {error}")
    except TimeoutError as error:
        return _failed(FailureClass.WALLTIME, str(error))
    result = _result(job)
    if result.get("state") == "stopped":
        facts = result["facts"]
        return _failed(FailureClass.WALLTIME, f"stopped after {facts['epochs']} epochs; train again to go on") | {
            "facts": facts
        }
    return result or _crash(status, log)


def _failed(kind: FailureClass, message: str) -> dict[str, Any]:
    return {"state": "failed", "kind": kind.value, "message": message}


def _crash(status: int, log: Path) -> dict[str, Any]:
    if status in (-9, 137):
        return _failed(FailureClass.MEMORY, "the ranks were killed (signal 9), most often for want of memory")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    return _failed(FailureClass.CRASH, f"the ranks ended with exit status {status} and no result: {last}")
