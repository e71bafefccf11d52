"""What does a person see of a campaign: the page that `smelt status` prints, and the same page live during a run?"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from campaign.accounting import Wait
from campaign.state import State
from campaign.summary import summarise

__all__ = ["LiveView", "page"]

REFRESH_S = 0.5
LINE_EVERY_S = 5.0  # least time between two lines where there is no terminal
HEARTBEAT_S = 60.0  # longest time between them
LONGEST_TASKS = 20
LIVE_GENERATIONS = 6  # so that the page fits a terminal
WAITS = {
    Wait.FRAMES: "waiting for frames to label",
    Wait.LABELS: "waiting for labels",
    Wait.MODEL: "waiting for a model",
    Wait.RANKING: "waiting for a ranking",
    Wait.END: "nothing left to do",
    Wait.SCHEDULER: "waiting for the scheduler",
    Wait.DRIVER: "waiting for the driver",
    Wait.LOST: "lost with a node or a driver",
}
STYLES = {
    "running": "cyan",
    "draining": "yellow",
    "finished": "green",
    "failed": "bold red",
    "interrupted": "yellow",
    "stopped": "yellow",
}


class LiveView:
    """Show a campaign while it runs: call it with the driver's states.

    On a terminal a page that is redrawn in place and taken away at the end; elsewhere one line whenever something
    has moved.
    """

    def __init__(self, run_dir: Path, console: Console) -> None:
        self._run_dir = run_dir
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._shown = -REFRESH_S
        self._marks: tuple[object, ...] = ()

    def __enter__(self) -> LiveView:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, state: State) -> None:
        age = time.monotonic() - self._shown
        if self._live and age >= REFRESH_S:
            self._live.update(page(summarise(self._run_dir, state), newest=LIVE_GENERATIONS), refresh=True)
            self._shown = time.monotonic()
        elif not self._live and self._is_due(state, age):
            self._console.print(_line(summarise(self._run_dir, state)), soft_wrap=True, highlight=False)
            self._shown = time.monotonic()

    def _is_due(self, state: State, age: float) -> bool:
        """A new generation, and why nodes do not come, is told at once; labels and walkers at intervals; and now and
        then that it is alive."""
        marks = (state.generation, len(state.quarantined), dict(state.waits), state.n_labels, state.walkers.run)
        moved = self._marks != marks
        at_once = self._marks[:3] != marks[:3]
        if at_once or (moved and age >= LINE_EVERY_S) or age >= HEARTBEAT_S:
            self._marks = marks
            return True
        return False


def _line(summary: Mapping[str, Any]) -> str:
    """The state of a campaign in one line."""
    labels = summary["labels"]
    parts = [
        _clock(summary["elapsed_s"]),
        f"generation {summary['generations']}",
        f"labels: {labels['done']} done, {labels['queued']} queued, {labels['in_flight']} running,"
        f" {labels['quarantined']} failed",
        f"walkers: {summary['walkers']['ended']['run']} ended, {summary['walkers']['active']} active",
    ]
    parts += [f"{pool} waits: {reason}" for pool, reason in summary["waits"].items()]
    if summary["training"]:
        parts.append(_training_note(summary["training"]))
    if summary["model"] and summary["model"]["holdout"]:
        parts.append(f"error: {_errors_note(summary['model']['holdout'])}")
    return " | ".join(parts)


def page(summary: Mapping[str, Any], newest: int = 1000) -> RenderableType:
    """The state of a campaign as a page: what there is now, its `newest` generations, time per stage."""
    title = Text.assemble(
        (summary["name"], "bold"),
        "  ",
        (summary["status"], STYLES[summary["status"]]),
        f"  generation {summary['generations']}  {_clock(summary['elapsed_s'])}",
    )
    parts: list[RenderableType] = [title, _now(summary)]
    if summary["learning_curve"]:
        parts.append(_learning_curve(summary["learning_curve"][-newest:]))
    if summary["stages"]:
        parts.append(_stages(summary["stages"]))
        parts.append(pools_table(summary["pools"]))
    if summary.get("scheduler"):
        parts.append(Text.assemble(("scheduler  ", "bold"), f"the blocks are not known: {summary['scheduler']}"))
    if summary.get("blocks"):
        parts.append(_blocks(summary["blocks"]))
    if summary.get("tasks"):
        parts.append(_tasks(summary["tasks"]))
    if summary["reason"]:
        parts.append(Text.assemble(("reason  ", "bold"), summary["reason"]))
    return Group(*parts)


def _now(summary: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _facts(summary):
        table.add_row(name, text)
    return table


def _facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    labels, walkers = summary["labels"], summary["walkers"]
    level = "".join(f", by {row['engine']} {row['version']}" for row in labels["by_level"])
    yield (
        "labels",
        (
            f"{labels['done']} done ({labels['train']} to train on, {labels['holdout']} held out{level}),"
            f" {labels['queued']} queued, {labels['in_flight']} running, {labels['quarantined']} set aside"
        ),
    )
    if labels["failures"]:
        yield "failures", f"labels: {_counts(labels['failures'])}"
    for stage, row in summary["stages"].items():
        if row["failures"]:
            yield "failures", f"{stage} tasks: {_counts(row['failures'])}"
    if labels["dropped"]:
        yield "dropped", _counts(labels["dropped"])
    ended = walkers["ended"]
    if ended["run"] or walkers["active"]:
        yield (
            "walkers",
            (
                f"{ended['run']} ended ({_endings(ended)}), {walkers['active']} active;"
                f" {ended['steps'] + walkers['active_steps']:,} steps"
            ),
        )
    if summary["per_label"]:
        yield "per label", _cost_note(summary["per_label"])
    for pool, reason in summary["waits"].items():
        yield "waiting", f"{pool}: {reason}"
    if summary["training"]:
        yield "training", _training_note(summary["training"])
    if summary["model"]:
        yield "model", _model_note(summary["model"])


def _endings(ended: Mapping[str, Any]) -> str:
    ways = {
        **ended["triggers"],
        "time out": ended["timeouts"],
        "ran away": ended["exploded"],
        "too close": ended["too_close"],
    }
    return _counts({way: n for way, n in ways.items() if n})


def _model_note(model: Mapping[str, Any]) -> str:
    ranks = model["training"].get("n_ranks")
    trained = f"generation {model['generation']}, {model['n_labels']} labels" + (f", {ranks} ranks" if ranks else "")
    return f"{trained}; held out: {_errors_note(model['holdout'])}" if model["holdout"] else trained


def _cost_note(cost: Mapping[str, Any]) -> str:
    waits = cost["to_model_s"]
    note = f"core time {_clock(cost['label_core_s'])} of labeling, {_clock(cost['core_s'])} of everything"
    if not waits["longest"]:
        return note
    return f"{note}; first used by a model {_clock(waits['mean'])} later, at most {_clock(waits['longest'])}"


def _training_note(training: Mapping[str, Any]) -> str:
    note = f"generation {training['generation']}"
    if "epoch" not in training:
        return f"training {note} starts"
    errors = training["validation"]
    # Labels of some levels have no forces.
    force = f"{errors['force_eV_per_A']:.3f} eV/A, " if "force_eV_per_A" in errors else ""
    energy = f"{errors['energy_meV_per_atom']:.1f} meV/atom" if "energy_meV_per_atom" in errors else ""
    return f"training {note}, epoch {training['epoch']}: validation {force}{energy}"


def _errors_note(holdout: Mapping[str, Any]) -> str:
    force = f"force {holdout['force_rmse_eV_per_A']:.3f} eV/A, " if "force_rmse_eV_per_A" in holdout else ""
    return f"{force}energy {1000 * holdout['energy_rmse_eV_per_atom']:.1f} meV/atom on {holdout['n_frames']} cells"


def _learning_curve(models: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("errors on the held-out set, never trained on (forces in eV/A, energies in meV/atom)")
    for name in ("generation", "labels", "held out", "force RMSE", "force MAE", "energy RMSE", "energy MAE"):
        table.add_column(name, justify="right", no_wrap=True)
    for model in models:
        holdout = model["holdout"]
        table.add_row(
            str(model["generation"]),
            str(model["n_labels"]),
            str(holdout.get("n_frames", "")),
            _figure(holdout.get("force_rmse_eV_per_A"), 1),
            _figure(holdout.get("force_mae_eV_per_A"), 1),
            _figure(holdout.get("energy_rmse_eV_per_atom"), 1000),
            _figure(holdout.get("energy_mae_eV_per_atom"), 1000),
        )
    return table


def _stages(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("stages")
    table.add_column("stage")
    for name in ("tasks", "running", "failed", "worker time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("last failure", overflow="fold")
    for name, row in stages.items():
        numbers = (str(row["tasks"]), str(row["running"]), str(row["failed"]), _clock(row["seconds"]))
        table.add_row(name, *numbers, row["last_failure"])
    return table


def pools_table(pools: Mapping[str, Mapping[str, Any]]) -> Table:
    """Where the time of every pool's slots went; rows of a summary."""
    table = _table("time of all slots")
    table.add_column("pool")
    for name in ("slots", "nodes", "slot-hours", "worked", "under way"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("waited for", overflow="fold")
    for name, row in pools.items():
        total = row["slot_s"]
        if total and row["slots"]:
            worked = f"{sum(row['busy_s'].values()) / total:.1%}"
            under_way = f"{row['under_way_s'] / total:.1%}"
            idle = sorted(row["idle_s"].items(), key=lambda item: -item[1])
            waited = ", ".join(f"{reason} {seconds / total:.1%}" for reason, seconds in idle if seconds > 5e-4 * total)
            nodes = str(row["nodes"] or "")
            table.add_row(name, str(row["slots"]), nodes, f"{total / 3600:.3g}", worked, under_way, waited)
    return table


def forecast_page(result: Mapping[str, Any]) -> RenderableType:
    """What campaign.forecast.compare has found."""
    runs = [result["asynchronous"], result["barriers"]]
    spans = [run[span] for span in ("steady", "all") for run in runs]
    table = _table("share of all node time, as configured and with barriers between stages")
    for name in ("", "steady state", "with barriers", "start to end", "with barriers"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_row("busy", *(f"{span['busy']:.2%}" for span in spans), style="bold")
    for reason, words in WAITS.items():
        table.add_row(words, *(f"{span['idle'][reason]:.2%}" for span in spans))
    table.add_section()
    table.add_row("duration", *(_clock(span["seconds"]) for span in spans))
    for name, note in (("labels", str), ("generations", str), ("to_model_s", _clock)):
        words = "from a label to its first model" if name == "to_model_s" else name
        table.add_row(words, "", "", *(note(run[name]) for run in runs))
    ends = [
        Text(f"ends {how}: {run['reason']}") for how, run in zip(("as configured", "with barriers"), runs, strict=True)
    ]
    return Group(table, *ends, Text("\nsteady state, as configured"), pools_table(runs[0]["steady"]["pools"]))


def _blocks(blocks: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("blocks")
    for name in ("job", "stage", "partition", "state", "nodes", "time left"):
        table.add_column(name, no_wrap=True)
    table.add_column("waits for", overflow="fold")
    for row in blocks:
        waits = f"{row['reason']}, expected to start: {row['start']}" if row["state"] == "PENDING" else ""
        nodes = row["nodes"] or str(row["n_nodes"])
        table.add_row(row["job"], row["pool"], row["partition"], row["state"], nodes, row["time_left"], waits)
    return table


def _tasks(tasks: Sequence[Mapping[str, Any]]) -> Table:
    """Those that workers are at, longest first, and how many wait for a worker."""
    at_work = sorted((row for row in tasks if row["host"]), key=lambda row: -row["seconds"])
    waiting = Counter(row["stage"] for row in tasks if not row["host"])
    table = _table("running tasks")
    for name in ("task", "on", "job", "for"):
        table.add_column(name, no_wrap=True)
    for row in at_work[:LONGEST_TASKS]:
        table.add_row(row["task"], row["host"], row["job"], _clock(row["seconds"]))
    if len(at_work) > LONGEST_TASKS:
        table.add_row(f"and {len(at_work) - LONGEST_TASKS} more")
    for stage, n in waiting.items():
        table.add_row(f"{n} of {stage}", "waiting for a worker")
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="dim", box=SIMPLE_HEAD, pad_edge=False)


def _counts(table: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in table.items())


def _figure(value: float | None, factor: float) -> str:
    return "" if value is None else f"{factor * value:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
