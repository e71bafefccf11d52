"""Does a campaign go on at a higher level, with its own frames and its own models carried over? GFN1- to GFN2-xTB."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from thread_pools import ThreadPools
from typer.testing import CliRunner

from campaign import driver
from campaign.cli import app
from campaign.config import parse_campaign, to_toml
from campaign.harvest import manifest_path
from campaign.ledger import read_events, read_state
from shards.manifest import Manifest
from shards.settings import SettingsError

pytestmark = pytest.mark.skipif(
    find_spec("rdkit") is None or find_spec("tblite") is None, reason="RDKit or tblite is not installed"
)

TBLITE = "tblite.ase.TBLite"
TABLE: dict[str, Any] = {
    "campaign": {"name": "levels", "elements": ["H", "C", "O"], "seed": 3, "n_bootstrap": 12, "holdout_fraction": 0.5,
                 "labels_per_task": 10, "retrain_after": 8, "queue_target": 6, "labels_ahead": 12, "max_labels": 24,
                 "max_generations": 20},
    "potential": {"radial_cutoff_A": 4.0, "angular_cutoff_A": 3.0, "first_shift_A": 0.8, "n_radial": 4,
                  "n_angular_radial": 2, "n_angular": 2, "hidden": [8, 8, 8], "n_members": 2},
    "builder": {"molecules": {"smiles": ["C", "O", "CO", "C=O"], "test_fraction": 0}},
    "sampler": {"timestep_fs": 0.5, "max_time_ps": 0.02, "min_time_ps": 0.0, "check_every": 5, "walkers_per_task": 6,
                "force_mean_threshold_eV_A": 1e-4, "minimum_distance_A": 0.5, "settle_steps": 0,
                "duplicate_distance": 0},  # frames that resemble a chosen one would be passed over
    "labeler": {"engine": TBLITE, "arguments": {"method": "GFN1-xTB", "verbosity": 0}},
    "trainer": {"ranks": 1, "batch": 8, "max_epochs": 4},
    "transfer": {"max_epochs": 4},
    "higher": {
        "campaign": {"n_bootstrap": 8, "retrain_after": 6, "max_labels": 14, "max_generations": 20},
        "labeler": {"arguments": {"method": "GFN2-xTB", "verbosity": 0}},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "ParslPools", ThreadPools)
        yield


@pytest.fixture(scope="module")
def run_dir(threads: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("levels") / "run"
    result = run(folder)
    assert result.exit_code == 0, result.output
    return folder


def run(folder: Path, **higher: Any) -> Result:
    changes = TABLE["higher"] | {"campaign": TABLE["higher"]["campaign"] | higher}
    config = folder.parent / "config.toml"
    config.write_text(to_toml(parse_campaign(TABLE | {"higher": changes})))
    return CliRunner().invoke(app, ["run", str(config), "--run-dir", str(folder)])


def labels(folder: Path, part: str) -> dict[str, str]:
    """Frame id -> method of its label."""
    shards = list(Manifest(manifest_path(folder, part)).shards())
    return {id: shard.labels_level.settings["method"] for shard in shards for id in shard.ids}


def test_higher_labels_are_of_frames_that_have_a_lower_one(run_dir: Path) -> None:
    lower, higher = labels(run_dir, "train") | labels(run_dir, "holdout"), run_dir / "higher"
    chosen = labels(higher, "train") | labels(higher, "holdout")
    assert len(chosen) == 14
    assert set(chosen.values()) == {"GFN2-xTB"}
    assert set(lower.values()) == {"GFN1-xTB"}
    assert set(chosen) <= set(lower)


def test_every_model_of_the_higher_level_is_carried_over_from_the_newest_of_the_lower(run_dir: Path) -> None:
    parent = read_state(run_dir).models[-1]
    state = read_state(run_dir / "higher")
    assert len(state.models) > 1
    for model in state.models:
        assert Path(model.metrics["parent"]) == run_dir.resolve() / parent.path
        changed = {name: layer["changed"] for name, layer in model.metrics["layers"].items()}
        assert changed["hidden1"] == changed["hidden3"] == 0 < changed["hidden2"]


def test_choices_tell_the_cost_of_each_level_and_the_gap_between_them(run_dir: Path) -> None:
    events = list(read_events(run_dir / "higher" / "ledger.jsonl"))
    facts = [event["facts"] for event in events if event["event"] == "task_finished" and "gap_meV" in event["facts"]]
    assert len(facts) > 1
    assert set(facts[0]["seconds"]) == {"lower"}
    assert set(facts[-1]["seconds"]) == {"lower", "higher"}
    assert all(each["gap_meV"] > 0 for each in facts)


def test_status_shows_both_levels(run_dir: Path) -> None:
    page = CliRunner().invoke(app, ["status", str(run_dir)]).output
    assert "levels  finished" in page
    assert "levels-higher  finished" in page
    summary = json.loads(CliRunner().invoke(app, ["status", "--json", str(run_dir)]).output)
    assert summary["labels"]["done"] == 24
    assert summary["higher"]["labels"]["done"] == 14
    assert summary["labels"]["by_level"] != summary["higher"]["labels"]["by_level"]


def test_campaign_that_has_ended_is_left_alone_and_goes_on_until_no_frame_is_left(run_dir: Path) -> None:
    ledger = run_dir / "higher" / "ledger.jsonl"
    before = ledger.read_bytes()
    assert run(run_dir).exit_code == 0
    assert ledger.read_bytes() == before
    assert run(run_dir, max_labels=1000).exit_code == 0
    state = read_state(run_dir / "higher")
    assert state.finished.startswith("nothing left to choose")
    assert state.models[-1].n_labels == state.n_train > 14
    held_out, below = labels(run_dir / "higher", "holdout"), labels(run_dir, "holdout")
    assert set(held_out) >= set(below) != set()
    assert set(held_out) | set(labels(run_dir / "higher", "train")) == set(below) | set(labels(run_dir, "train"))
    assert not set(labels(run_dir / "higher", "train")) & set(below)
    assert state.models[-1].holdout["n_frames"] == len(held_out)


def test_parent_of_the_same_level_is_refused(run_dir: Path) -> None:
    table = TABLE | {"higher": {"campaign": TABLE["higher"]["campaign"]}}
    config = run_dir.parent / "same.toml"
    config.write_text(to_toml(parse_campaign(table)))
    other = run_dir.parent / "other"
    other.symlink_to(run_dir)
    result = CliRunner().invoke(app, ["run", str(config), "--run-dir", str(other)])
    assert isinstance(result.exception, SettingsError)


def test_fault_of_the_higher_level_is_named_with_its_path() -> None:
    with pytest.raises(SettingsError, match=r"higher\.campaign\.max_label = 5: unknown key; did you mean max_labels"):
        parse_campaign(TABLE | {"higher": {"campaign": {"max_label": 5}}})
