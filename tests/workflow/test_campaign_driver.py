"""Does the driver carry a whole campaign through the real stages? Without Parsl: tasks run in threads of this process.

Frames of five atoms cannot be labeled: the calculator refuses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from thread_pools import ThreadPools

from campaign import driver
from campaign.config import CampaignConfig, parse_campaign
from campaign.driver import run_campaign
from campaign.ledger import read_events
from campaign.policy import holdout_of
from campaign.site import Site
from campaign.state import State
from campaign.stop import Request, request_stop
from shards.manifest import Manifest
from shards.settings import SettingsError

CALCULATORS = Path(__file__).parents[1] / "calculators"


def campaign(**changes: Any) -> CampaignConfig:
    loop = {
        "name": "threads",
        "elements": ["Al"],
        "seed": 5,
        "n_bootstrap": 12,
        "holdout_fraction": 0.5,
        "labels_per_task": 8,
        "retrain_after": 20,
        "queue_target": 10,
        "max_labels": 22,
        "max_generations": 2,
        "attempts": 2,
    }
    return parse_campaign(
        {
            "campaign": loop | changes,
            "potential": {
                "radial_cutoff_A": 4.5,
                "angular_cutoff_A": 3.5,
                "n_radial": 4,
                "n_angular_radial": 2,
                "n_angular": 2,
                "hidden": [4],
                "n_members": 2,
            },
            "builder": {"n_atoms": [4, 8], "density_g_cm3": [2.0, 2.8], "minimum_distance_A": 2.0},
            "sampler": {
                "max_time_ps": 0.1,
                "min_time_ps": 0.0,
                "check_every": 5,
                "walkers_per_task": 5,
                "force_mean_threshold_eV_A": 0.001,
            },
            "labeler": {"engine": "faulty_calculator.Faulty", "arguments": {"fault": "fail", "n_atoms": 5}},
            "trainer": {"ranks": 1, "batch": 8, "max_epochs": 4},
        }
    )


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "ParslPools", ThreadPools)
        patch.syspath_prepend(CALCULATORS)
        patch.setenv("PYTHONPATH", str(CALCULATORS))
        yield


@pytest.fixture(scope="module")
def run_dir(threads: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign that is asked to drain on its way, and taken up again."""
    folder = tmp_path_factory.mktemp("campaign") / "run"

    def stop_soon(state: State) -> None:
        if state.n_labels >= 4:
            request_stop(folder, Request.DRAIN)

    with pytest.raises(KeyboardInterrupt, match="smelt stop"):
        run_campaign(campaign(), folder, Site(name="threads"), stop_soon)
    run_campaign(campaign(), folder, Site(name="threads"))
    return folder


@pytest.fixture(scope="module")
def state(run_dir: Path) -> State:
    return driver.Ledger(run_dir).replay.state()


def test_campaign_reaches_its_labels_in_spite_of_frames_that_fail(state: State) -> None:
    assert (state.failed, state.n_labels) == (False, 22)
    assert state.quarantined
    assert state.label_failures["crash"] >= 2 * len(state.quarantined)


def test_drained_campaign_lets_tasks_end_and_starts_no_more(run_dir: Path) -> None:
    events = list(read_events(run_dir / "ledger.jsonl"))
    stop = next(n for n, event in enumerate(events) if event["event"] == "driver_stopped")
    assert events[stop]["reason"] == "smelt stop"
    submitted = {event["task"] for event in events[:stop] if event["event"] == "task_submitted"}
    ended = {event["task"] for event in events[:stop] if event["event"] in ("task_finished", "task_failed")}
    assert len(submitted - ended) <= 3  # withheld from workers that were free
    assert sum(event["event"] == "labeled" for event in events[:stop]) < 22


def test_every_quarantined_frame_has_its_reason_and_a_log_that_says_more(state: State) -> None:
    for frame in state.quarantined:
        assert "the licence server did not answer" in frame.message
        assert "CalculationFailed" in Path(frame.log).read_text()


def test_held_out_labels_are_never_trained_on(state: State, run_dir: Path) -> None:
    ids = {
        part: {i for shard in Manifest(run_dir / "data" / part / "manifest.jsonl").shards() for i in shard.ids}
        for part in ("train", "holdout")
    }
    walkers = [e["frames"] for e in read_events(run_dir / "ledger.jsonl") if e["event"] == "frames_queued"][1:]
    from_walkers = {row[0] for rows in walkers for row in rows}
    labeled = ids["train"] | ids["holdout"]
    assert not ids["train"] & ids["holdout"]
    assert holdout_of(sorted(labeled & from_walkers), 0.5) == ids["holdout"]
    assert (len(ids["train"]), len(ids["holdout"])) == (state.n_train, state.n_holdout)


def test_learning_curve_covers_every_generation_on_the_same_frames(state: State) -> None:
    assert len(state.models) >= 2
    assert {model.holdout["n_frames"] for model in state.models} == {state.n_holdout}
    assert all(model.holdout["force_rmse_eV_per_A"] > 0 for model in state.models)
    assert [model.n_labels for model in state.models] == sorted({model.n_labels for model in state.models})


def test_finished_campaign_is_left_alone_and_a_raised_limit_continues_it(run_dir: Path, state: State) -> None:
    assert run_campaign(campaign(), run_dir, Site(name="threads")) == state
    raised = campaign(max_labels=26, max_generations=3)
    longer = run_campaign(raised, run_dir, Site(name="threads"))
    assert (longer.n_labels, longer.failed) == (26, False)
    assert longer.models[: len(state.models)][0].digest == state.models[0].digest


def test_other_settings_are_refused(run_dir: Path) -> None:
    with pytest.raises(SettingsError, match=r"campaign\.seed: 5 -> 6"):
        run_campaign(campaign(seed=6), run_dir, Site(name="threads"))


def test_same_seed_gives_the_same_bootstrap_frames(threads: None, run_dir: Path, tmp_path: Path) -> None:
    def until_frames(state: State) -> None:
        if state.n_bootstrap:
            raise StopIteration

    with pytest.raises(StopIteration):
        run_campaign(campaign(), tmp_path / "again", Site(name="threads"), until_frames)
    queued = [
        next(e["frames"] for e in read_events(folder / "ledger.jsonl") if e["event"] == "frames_queued")
        for folder in (run_dir, tmp_path / "again")
    ]
    assert queued[0] == queued[1]
    last = list(read_events(tmp_path / "again" / "ledger.jsonl"))[-1]
    assert (last["event"], last["reason"]) == ("driver_stopped", "StopIteration: ")
