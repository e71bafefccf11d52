"""Does the time of all slots add up, and does each second stand where it belongs? Histories written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from campaign.accounting import Delay, PoolUse, Wait
from campaign.state import Replay, State
from campaign.summary import pool_row

POOLS = {
    "sample": {"slots": 1, "cores": 4, "nodes": 0},
    "label": {"slots": 4, "cores": 64, "nodes": 2},
    "train": {"slots": 1, "cores": 8, "nodes": 1},
}
FRAMES = [[name, i, 2, 0.0, name == "d"] for i, name in enumerate("abcd")]


class History:
    """A campaign of four frames, d of them held out, with a driver that starts at 100 s."""

    def __init__(self) -> None:
        self.replay = Replay()
        self.at(100, "campaign_started", name="", config_digest="", seed=0, level="", versions={}, revision="")
        self.start(100)
        self.at(100, "frames_queued", path="x", kind="bootstrap", generation=0, frames=FRAMES)

    def at(self, time: float, event: str, **fields: Any) -> None:
        self.replay.apply({"seq": self.replay.seq + 1, "time": time, "event": event, **fields})

    def start(self, time: float, **pools: Any) -> None:
        self.at(time, "driver_started", host="h", pid=1, config_digest="", pools=POOLS | pools)

    def submit(self, time: float, task: str, **inputs: Any) -> None:
        self.at(time, "task_submitted", task=task, stage=task.partition("-")[0], inputs={"frames": []} | inputs)

    def end(self, time: float, task: str, start: float, end: float) -> None:
        timing = {"host": "n1", "start": start, "end": end, "phases": {}}
        self.at(time, "task_finished", task=task, timing=timing, facts={})

    def lose(self, time: float, task: str) -> None:
        timing = {"host": "", "start": time - 1, "end": time, "phases": {}}
        self.at(time, "task_failed", task=task, timing=timing, failure={"kind": "node_lost", "message": "", "log": ""})

    @property
    def state(self) -> State:
        return self.replay.state()

    @property
    def label(self) -> PoolUse:
        return self.state.pools["label"]


def test_every_second_of_a_slot_is_in_one_account() -> None:
    history = History()
    history.submit(110, "label-1")  # until then the driver had not looked at it
    history.at(110, "slots_idle", reasons={"label": Wait.FRAMES})
    history.end(150, "label-1", start=115, end=140)
    history.at(160, "slots_idle", reasons={"label": Wait.MODEL})
    history.at(170, "stop_reached", reason="")
    assert history.label.busy == {"label": 25}
    assert history.label.idle == {
        Wait.DRIVER: 4 * 10 + 10,  # four slots before the first look, and the result on its way
        Wait.FRAMES: 3 * 40 + 4 * 10,
        Wait.SCHEDULER: 5,
        Wait.MODEL: 4 * 10,
    }
    assert history.label.seconds == 4 * 70


def test_task_that_has_not_ended_is_under_way() -> None:
    history = History()
    history.submit(110, "label-1")
    history.submit(120, "label-2")
    history.at(150, "stop_reached", reason="")
    assert history.label.under_way == 40 + 30
    assert history.label.seconds == 4 * 50


def test_free_slot_waits_for_the_driver_once_all_were_taken() -> None:
    history = History()
    history.at(100, "slots_idle", reasons={"train": Wait.LABELS})
    history.submit(130, "train-1", n_labels=0)
    history.end(150, "train-1", start=130, end=150)
    history.submit(152, "rank-1")
    use = history.state.pools["train"]
    assert use.idle == {Wait.LABELS: 30, Wait.DRIVER: 2}
    assert use.busy == {"train": 20}


def test_task_that_went_down_with_its_node_is_lost_time() -> None:
    history = History()
    history.submit(100, "label-1")
    history.lose(130, "label-1")
    assert history.label.idle[Wait.LOST] == 30
    assert history.label.busy == {}


@pytest.mark.parametrize("killed", [False, True])
def test_tasks_of_a_driver_that_stops_are_lost_and_start_anew(killed: bool) -> None:
    history = History()
    history.submit(100, "label-1")
    history.at(150, "merged" if killed else "driver_stopped", **MERGED if killed else {"reason": ""})
    history.start(1000)
    history.submit(1000, "label-1")
    history.end(1020, "label-1", start=1000, end=1020)
    assert history.label.idle[Wait.LOST] == 50
    assert history.label.busy == {"label": 20}
    assert history.label.seconds == 4 * (50 + 20)  # nothing counts between two drivers


MERGED = {"part": "train", "receipt": {"path": ""}, "frames": []}


def test_clock_of_a_node_that_is_wrong_takes_no_time_from_other_accounts() -> None:
    history = History()
    history.submit(100, "label-1")
    history.end(160, "label-1", start=50, end=500)
    assert history.label.busy == {"label": 60}
    assert history.label.seconds == 4 * 60


def test_next_driver_may_have_other_slots() -> None:
    history = History()
    history.at(110, "driver_stopped", reason="")
    history.start(200, label={"slots": 8, "cores": 8, "nodes": 1})
    history.at(210, "stop_reached", reason="")
    assert history.label.seconds == 4 * 10 + 8 * 10
    assert (history.label.slots, history.label.nodes) == (8, 1)


def test_older_ledger_that_names_no_pools_has_working_time_only() -> None:
    history = History()
    history.at(100, "driver_stopped", reason="")
    history.at(100, "driver_started", host="h", pid=1, config_digest="")
    history.submit(110, "label-1")
    history.end(150, "label-1", start=110, end=150)
    assert history.label.busy == {"label": 40}
    assert history.label.idle == {}


def test_slot_seconds_become_core_and_node_seconds() -> None:
    row = pool_row(PoolUse(slots=4, cores=64, nodes=2, busy={"label": 100.0}, idle={Wait.MODEL: 20.0}))
    assert (row["slot_s"], row["core_s"], row["node_s"]) == (120, 120 * 16, 60)


def test_delay_runs_from_the_label_to_the_first_model_that_was_trained_on_it() -> None:
    history = History()
    model = {"path": "m", "digest": "d", "metrics": {}}
    for time, frame in ((110, "a"), (120, "d"), (130, "b")):
        history.at(time, "labeled", frame=frame, receipt={"path": frame})
    history.submit(140, "train-1", n_labels=2)
    history.at(150, "labeled", frame="c", receipt={"path": "c"})  # too late for this training
    history.at(200, "model_trained", generation=1, n_labels=2, **model)
    assert history.state.delay == Delay(n_labels=2, seconds=90 + 70, longest_s=90)
    history.submit(210, "train-2", n_labels=3)
    history.at(250, "model_trained", generation=2, n_labels=3, **model)
    assert history.state.delay == Delay(n_labels=3, seconds=90 + 70 + 100, longest_s=100)
