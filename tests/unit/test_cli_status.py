"""What the figures of a campaign are, against a history written by hand."""

import io
import json
import os
import time
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from campaign import cli
from campaign.config import load_campaign
from campaign.lease import Lease
from campaign.ledger import Ledger, read_state
from campaign.reference import CONFIGS, document, reference_files
from campaign.scheduler import block_name
from campaign.site import Site, load_site, parse_site
from campaign.stop import Request, stop_request
from campaign.summary import plot_learning_curve, summarise, write_summary
from campaign.view import LiveView, page
from shards import Frame, Label, Level, write_labels

RECEIPT = {
    "path": "labels/a.h5",
    "kind": "labels",
    "n_frames": 1,
    "n_atoms": 2,
    "n_bytes": 1,
    "digest": "d",
    "level": "l",
}
TIMING = {"host": "here", "start": 100.0, "end": 130.0, "phases": {"dynamics": 30.0}}
WALKERS = {
    "walkers": 10,
    "timeouts": 3,
    "exploded": 1,
    "too_close": 0,
    "steps": 5000,
    "atom_steps": 80000,
    "triggers": {"force_mean": 6},
}
POOLS = {
    "sample": {"slots": 1, "cores": 1, "nodes": 0},
    "label": {"slots": 4, "cores": 32, "nodes": 2},
    "train": {"slots": 1, "cores": 1, "nodes": 0},
}
HOLDOUT = {
    "n_frames": 2,
    "force_rmse_eV_per_A": 0.25,
    "force_mae_eV_per_A": 0.2,
    "energy_rmse_eV_per_atom": 0.012,
    "force_spread_eV_per_A": 0.3,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Four frames: two labeled (one held out), one quarantined after an SCF failure, one in flight; one model."""
    now = iter(range(1000, 2000))
    frame = Frame([13, 13], [[0, 0, 0], [2.0, 2.0, 0]])
    (tmp_path / "labels").mkdir()
    write_labels(tmp_path / "labels" / "a.h5", Level("emt", "3.29"), [(frame, Label(1.0, [[0.0] * 3] * 2))])
    with Ledger(tmp_path, clock=lambda: float(next(now))) as ledger:
        ledger.append(
            "campaign_started", name="hand", config_digest="c", seed=7, level="l", versions={"torch": "2"}, revision="r"
        )
        ledger.append("driver_started", host="elsewhere", pid=1, config_digest="c", pools=POOLS)
        rows = [[name, i, 2, 0.0, name == "b"] for i, name in enumerate("abcd")]
        ledger.append("frames_queued", path="candidates/x.h5", kind="bootstrap", generation=0, frames=rows)
        ledger.append("task_submitted", task="label-1", stage="label", inputs={"frames": list("abcd")})
        ledger.append("labeled", frame="a", receipt=RECEIPT)
        ledger.append("labeled", frame="b", receipt=RECEIPT)
        failure = {"kind": "scf", "message": "no convergence", "log": "x.log"}
        ledger.append("label_failed", frame="c", failure=failure)
        ledger.append("quarantined", frame="c", failure=failure)
        ledger.append(
            "model_trained",
            generation=1,
            path="models/gen-001/model.safetensors",
            digest="m",
            n_labels=1,
            metrics={"n_ranks": 2},
        )
        ledger.append("model_evaluated", generation=1, n_labels=1, metrics=HOLDOUT)
        ledger.append("task_submitted", task="sample-1", stage="sample", inputs={"generation": 1})
        ledger.append("task_finished", task="sample-1", timing=TIMING, facts=WALKERS)
        ledger.append("task_submitted", task="train-2", stage="train", inputs={"generation": 2, "n_labels": 1})
    return tmp_path


def test_status_as_json_says_what_the_history_says(run_dir, capsys):
    assert cli._run(["status", str(run_dir), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["name"], said["status"], said["generations"]) == ("hand", "interrupted", 1)
    assert said["labels"] == {
        "done": 2,
        "train": 1,
        "holdout": 1,
        "queued": 0,
        "in_flight": 1,
        "quarantined": 1,
        "failures": {"scf": 1},
        "dropped": {},
        "by_level": [{"engine": "emt", "version": "3.29", "level": Level("emt", "3.29").digest, "labels": 2}],
    }
    assert said["walkers"]["ended"] == {"run": 10, **{k: v for k, v in WALKERS.items() if k != "walkers"}}
    assert said["model"]["training"]["n_ranks"] == 2
    assert [row["holdout"] for row in said["learning_curve"]] == [HOLDOUT]
    assert said["stages"]["sample"]["seconds"] == 30.0
    assert said["stages"]["train"]["running"] == 1
    # Four label slots for the 11 s from the driver's start to the last event, one of them taken 2 s later.
    label = said["pools"]["label"]
    assert (label["slot_s"], label["core_s"], label["node_s"]) == (44, 4 * 11 * 8, 22)
    assert (label["under_way_s"], label["idle_s"]) == (9, {"driver": 35})


def test_page_shows_every_figure(run_dir):
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(page(summarise(run_dir, read_state(run_dir))))
    text = console.export_text()
    for figure in (
        "2 done (1 to train on, 1 held out, by emt 3.29)",
        "0 queued, 1 running, 1 set aside",
        "scf 1",
        "10 ended (force_mean 6, time out 3, ran away 1)",
        "generation 1, 1 labels, 2 ranks; held out: force 0.250 eV/A, energy 12.0 meV/atom",
        "training generation 2 starts",
        "0:00:30",
        "core time 0:00:00 of labeling, 0:03:07 of everything",
        "20.5%   driver 79.5%",
    ):
        assert figure in text


@pytest.fixture
def at_work(run_dir, monkeypatch):
    """A driver of this process, with a label at work on a node and blocks that a false squeue tells of."""
    write_site(run_dir)
    work = run_dir / "scratch" / "label-1" / "work.json"
    work.parent.mkdir(parents=True)
    work.write_text(json.dumps({"task": "label-1", "host": "node7", "since": time.time() - 90, "job": "12"}))
    (run_dir / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{run_dir / 'bin'}{os.pathsep}{os.environ['PATH']}")
    name = block_name(run_dir, "label")
    rows = [
        f"12|cpu|RUNNING|1|node7|None|2026-11-21T10:00:00|59:30|{name}",
        f"13|cpu|PENDING|2||Priority|N/A|1:00:00|{name}",
        f"11|cpu|TIMEOUT|1|node6|None|2026-11-21T09:00:00|0:00|{name}",
    ]
    write_command(run_dir / "bin" / "squeue", "\n".join(["cat <<'END'", *rows, "END"]))
    with Lease(run_dir):
        yield run_dir


def write_site(run_dir):
    site = parse_site({"name": "a", "address": "127.0.0.1", "label": {"slurm": {}}})
    (run_dir / "site.toml").write_text(document("For tests.", site))


def write_command(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_status_tells_where_tasks_are_and_what_the_scheduler_has(at_work, capsys):
    with Ledger(at_work) as ledger:
        ledger.append("pool_waits", pool="train", reason="sbatch: no such partition")
    assert cli._run(["status", str(at_work)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "hand running" in text
    assert "12 label cpu RUNNING node7 59:30" in text
    assert "13 label cpu PENDING 2 1:00:00 Priority, expected to start: N/A" in text
    assert "TIMEOUT" not in text
    assert "label-1 node7 12 0:01:3" in text
    assert "1 of train waiting for a worker" in text
    assert "waiting train: sbatch: no such partition" in text
    assert "failures labels: scf 1" in text


def test_status_is_told_as_well_where_the_scheduler_does_not_answer(at_work, capsys):
    write_command(at_work / "bin" / "squeue", "echo squeue: error: Unable to contact slurm controller >&2; exit 1")
    assert cli._run(["status", str(at_work), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["blocks"], said["scheduler"]) == ([], "squeue: Unable to contact slurm controller")
    assert [task["host"] for task in said["tasks"]] == ["node7", ""]


def test_stop_waits_for_the_driver_and_says_for_what(at_work, capsys, monkeypatch):
    asked = []

    def end_the_task(seconds):
        asked.append(stop_request(at_work))
        (at_work / "scratch" / "label-1" / "work.json").unlink(missing_ok=True)
        if len(asked) == 2:
            (at_work / "lock").write_text("")

    monkeypatch.setattr(cli.time, "sleep", end_the_task)
    assert cli._run(["stop", str(at_work)]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == "waiting for label-1 on node7"
    assert second.startswith(f"waiting for the driver (pid {os.getpid()} on ")
    assert last == "stopped; smelt run goes on from here"
    assert asked == [Request.DRAIN, Request.DRAIN]
    assert cli._run(["stop", "--now", str(at_work)]) == 0
    assert capsys.readouterr().out == f"no driver is at work on {at_work}\n"


def test_running_training_is_followed_by_its_last_whole_epoch(run_dir):
    folder = run_dir / "models" / "gen-002"
    folder.mkdir(parents=True)
    rows = [{"epoch": i, "seconds": i, "valid": {"force_eV_per_A": [0.1 * i, 0.3 * i]}} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"epoch": 3, "val')
    training = summarise(run_dir, read_state(run_dir))["training"]
    assert (training["generation"], training["epoch"]) == (2, 2)
    assert training["validation"]["force_eV_per_A"] == pytest.approx(0.4)


def test_training_on_labels_without_forces_or_stress_is_followed_too(run_dir):
    folder = run_dir / "models" / "gen-002"
    folder.mkdir(parents=True)
    valid = {"energy_meV_per_atom": [2.0, 4.0], "force_eV_per_A": [None, None], "stress_GPa": [None, None]}
    row = {"epoch": 1, "seconds": 1, "valid": valid}
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row | {'epoch': i})}\n" for i in (1, 2)))
    summary = summarise(run_dir, read_state(run_dir))
    assert summary["training"]["validation"] == {"energy_meV_per_atom": 3.0}
    console = Console(record=True, width=200)
    console.print(page(summary))
    assert "epoch 2: validation 3.0 meV/atom" in console.export_text()


def test_without_a_terminal_there_is_one_line_for_what_has_moved(run_dir):
    stream = io.StringIO()
    state = read_state(run_dir)
    with LiveView(run_dir, Console(file=stream, width=80)) as view:
        view(state)
        view(state)  # nothing has moved
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert "labels: 2 done, 0 queued, 1 running, 1 failed" in lines[0]


def test_summary_is_left_as_json_and_as_a_picture(run_dir):
    summary = write_summary(run_dir, read_state(run_dir))
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert (run_dir / "learning-curve.png").read_bytes().startswith(b"\x89PNG")


def test_learning_curve_of_one_model_is_drawn(tmp_path):
    plot_learning_curve([{"n_labels": 10, "generation": 1, "holdout": HOLDOUT}], tmp_path / "curve.png", "one")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_learning_curve_of_labels_without_forces_has_energies_alone(tmp_path):
    energies = {name: value for name, value in HOLDOUT.items() if "force" not in name}
    rows = [{"n_labels": 10, "generation": 1, "holdout": holdout} for holdout in (HOLDOUT, energies)]
    for row, path in zip(rows, ("both.png", "energies.png"), strict=True):
        plot_learning_curve([row], tmp_path / path, "one")
    both, alone = (imread(tmp_path / path) for path in ("both.png", "energies.png"))
    assert alone.shape[1] == both.shape[1] / 2


def test_committed_reference_files_are_those_the_settings_make():
    for name, text in reference_files().items():
        assert (CONFIGS / name).read_text(encoding="utf-8") == text, "run python -m campaign.reference"


def test_reference_files_say_the_defaults(tmp_path):
    minimal = tmp_path / "minimal.toml"
    minimal.write_text('[campaign]\nname = "reference"\nelements = ["Al"]\n')
    assert load_campaign(CONFIGS / "reference.toml") == load_campaign(minimal)
    assert load_site(CONFIGS / "sites" / "local.toml") == Site(name="this machine")
