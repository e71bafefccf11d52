"""How far did a campaign get, in figures and in one plot? Reads a run directory's files, also while a driver writes."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from campaign.accounting import PoolUse
from campaign.harvest import PARTS, manifest_path
from campaign.lease import Holder, holder_of
from campaign.state import Model, StageTally, State, Walkers
from campaign.stop import stop_request
from campaign.tasks import model_folder, progress_path
from shards.files import write_atomically
from shards.manifest import Manifest
from shards.reader import ShardError, open_shard

__all__ = ["plot_learning_curve", "pool_row", "summarise", "write_summary"]

SUMMARY = "summary.json"
PLOT = "learning-curve.png"
TAIL_BYTES = 65536
PANELS = (
    ("force_rmse_eV_per_A", 1.0, "force RMSE, eV/Å", "#1f5fa8"),
    ("energy_rmse_eV_per_atom", 1e3, "energy RMSE, meV/atom", "#b8442c"),
)


def summarise(run_dir: Path, state: State) -> dict[str, Any]:
    """Say where a campaign is, in JSON values: seconds, and errors on the held-out set in eV/A and eV/atom."""
    driver = holder_of(run_dir)
    return {
        "name": state.name,
        "run_dir": str(run_dir),
        "status": "draining" if driver and stop_request(run_dir) else _status(state, driver),
        "reason": state.finished or state.stopping,
        "elapsed_s": state.active_s + (max(0.0, time.time() - state.time) if driver else 0.0),
        "driver": {"host": driver.host, "pid": driver.pid} if driver else None,
        "config_digest": state.config_digest,
        "seed": state.seed,
        "revision": state.revision,
        "versions": dict(state.versions),
        "generations": state.generation,
        "labels": _labels(run_dir, state),
        "walkers": _walkers(run_dir, state),
        "model": _model(state.models[-1]) if state.models else None,
        "training": _training(run_dir, state),
        "learning_curve": [_model(model) for model in state.models],
        "stages": _stages(state),
        "pools": {name: pool_row(use) for name, use in state.pools.items()},
        "per_label": _per_label(state),
        "waits": dict(state.waits),
    }


def write_summary(run_dir: Path, state: State) -> dict[str, Any]:
    """Write summary.json and, once a model was measured, learning-curve.png into the run directory."""
    summary = summarise(run_dir, state)
    write_atomically(run_dir / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    measured = [row for row in summary["learning_curve"] if row["holdout"]]
    if measured:
        plot_learning_curve(measured, run_dir / PLOT, title=summary["name"])
    return summary


def plot_learning_curve(models: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Plot errors on the held-out set against the number of training labels, both logarithmic.

    models: rows of a summary's learning curve, each with its `holdout` table. Where labels have no forces, energies
    are alone.
    """
    # Here, because it takes half a second that `smelt status` does not need.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    panels = [panel for panel in PANELS if all(panel[0] in row["holdout"] for row in models)]
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, factor, label, colour) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        points = [(row["n_labels"], factor * row["holdout"][name], row["generation"]) for row in models]
        axes.loglog([x for x, _, _ in points], [y for _, y, _ in points], "o-", color=colour)
        for x, y, generation in points:
            axes.annotate(str(generation), (x, y), (4, 5), textcoords="offset points", fontsize=8)
        axes.margins(0.08)
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8)))
            axis.set_major_formatter(FormatStrFormatter("%g"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("labels in the training set")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{title}: errors on {models[-1]['holdout']['n_frames']} held-out cells, by generation")
    beside = path.with_name(f".{path.name}.part")
    figure.savefig(beside, dpi=150, format="png")
    os.replace(beside, path)


def _status(state: State, driver: Holder | None) -> str:
    """running | finished | failed | stopped (in good order) | interrupted (its driver is gone without a word)"""
    if driver:
        return "running"
    if state.finished:
        return "failed" if state.failed else "finished"
    return "interrupted" if state.driver else "stopped"


def _labels(run_dir: Path, state: State) -> dict[str, Any]:
    return {
        "done": state.n_labels,
        "train": state.n_train,
        "holdout": state.n_holdout,
        "queued": len(state.queue),
        "in_flight": len(state.in_flight),
        "quarantined": len(state.quarantined),
        "failures": dict(state.label_failures),
        "dropped": dict(state.dropped),
        "by_level": [{**level, "labels": state.n_labels} for level in _levels(run_dir)],
    }


def _levels(run_dir: Path) -> list[dict[str, str]]:
    """The level of theory, which is one for the whole campaign, as the first label that can be read says it."""
    merged = [receipt.path for part in PARTS for receipt in Manifest(manifest_path(run_dir, part)).receipts()[:1]]
    for path in [*map(Path, merged), *sorted((run_dir / "labels").glob("*.h5"))]:
        try:
            level = open_shard(path, verify=False).level
        except ShardError:  # merged and removed in this moment
            continue
        if level is not None:
            return [{"engine": level.engine, "version": level.version, "level": level.digest}]
    return []


def _walkers(run_dir: Path, state: State) -> dict[str, Any]:
    """Walkers that have ended, and those that are on their way in the sampling tasks that run."""
    progress = [_read_json(progress_path(run_dir, task.id)) for task in state.running if task.stage == "sample"]
    return {
        "ended": _row(state.walkers),
        "ended_newest_model": _row(state.walkers_newest),
        "active": sum(table.get("active", 0) for table in progress),
        "active_steps": sum(table.get("steps", 0) for table in progress),
    }


def _training(run_dir: Path, state: State) -> dict[str, Any] | None:
    """The training that is running: its generation, and what its last epoch wrote."""
    generations = [task.inputs["generation"] for task in state.running if task.stage == "train"]
    if not generations:
        return None
    metrics = model_folder(run_dir, generations[0]) / "metrics.jsonl"
    return {"generation": generations[0], **_last_epoch(metrics)}


def _row(record: Walkers | StageTally) -> dict[str, Any]:
    table = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in table.items()}


def _model(model: Model) -> dict[str, Any]:
    return {
        "generation": model.generation,
        "path": model.path,
        "digest": model.digest,
        "n_labels": model.n_labels,
        "training": dict(model.metrics),
        "holdout": dict(model.holdout),
    }


def _stages(state: State) -> dict[str, Any]:
    running = Counter(task.stage for task in state.running)
    return {name: {**_row(tally), "running": running[name]} for name, tally in state.stages.items()}


def pool_row(use: PoolUse) -> dict[str, Any]:
    """Where the time of a pool's slots went, in slot-seconds: by stage at work, by reason idle, and of tasks that have
    not ended. In all also as core-seconds and node-seconds."""
    return {
        "slots": use.slots,
        "cores": use.cores,
        "nodes": use.nodes,
        "slot_s": use.seconds,
        "core_s": use.seconds * _share(use.cores, use.slots),
        "node_s": use.seconds * _share(use.nodes, use.slots),
        "busy_s": dict(use.busy),
        "idle_s": dict(use.idle),
        "under_way_s": use.under_way,
        "waits_for": use.waits_for,
    }


def _per_label(state: State) -> dict[str, Any] | None:
    """What labels cost on average, in core-seconds of labeling and of everything, idle time included; and how long, in
    seconds, those that a model was trained on had waited for it."""
    label = state.pools["label"]
    if not state.n_labels:
        return None
    everything = sum(use.seconds * _share(use.cores, use.slots) for use in state.pools.values())
    return {
        "label_core_s": label.busy.get("label", 0.0) * _share(label.cores, label.slots) / state.n_labels,
        "core_s": everything / state.n_labels,
        "to_model_s": {"mean": _share(state.delay.seconds, state.delay.n_labels), "longest": state.delay.longest_s},
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _last_epoch(metrics: Path) -> dict[str, Any]:
    """The newest whole line of a trainer's metrics, validation errors as means over members; empty before the first."""
    lines = _tail(metrics).split(b"\n")[1:-1]
    if not lines:
        return {}
    row = json.loads(lines[-1])
    # What labels do not have, such as the stress of molecules, has no error.
    errors = {name: sum(values) / len(values) for name, values in row["valid"].items() if None not in values}
    return {"epoch": row["epoch"], "seconds": row["seconds"], "validation": errors}


def _tail(path: Path) -> bytes:
    """A newline and the end of a file; empty when there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return b"\n" + file.read()
    except FileNotFoundError:
        return b""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return table if isinstance(table, dict) else {}
