"""Does the policy lead a whole campaign to its end, whatever happens on the way? No files, no work, no real time."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest
from campaign_world import World, settings

from campaign.policy import (
    Evaluate,
    Finish,
    Label,
    Rank,
    Sample,
    Train,
    Verdict,
    decide,
    derive_seed,
    holdout_of,
    verdict,
)
from campaign.state import replay
from shards.outcome import FailureClass


def test_campaign_meets_its_number_of_labels_exactly_and_trains_on_all_of_them() -> None:
    world = World(settings(max_labels=83))
    state = world.run()
    assert state.finished.startswith("max_labels: 83")
    assert not state.failed
    assert state.n_labels == 83
    assert state.models[-1].n_labels == state.n_train
    assert not state.in_flight


def test_at_the_end_every_generation_is_evaluated_on_the_complete_held_out_set() -> None:
    state = World(settings()).run()
    assert state.n_holdout > 2
    assert len(state.models) > 2
    assert {model.n_holdout for model in state.models} == {state.n_holdout}


def test_walkers_and_labels_go_on_while_a_model_is_trained() -> None:
    world = World(settings(max_labels=200))
    world.run()
    trainings = [(start, start + 60) for start, action in world.actions if isinstance(action, Train)][1:-3]
    assert trainings
    for start, end in trainings:
        during = [type(action) for now, action in world.actions if start < now < end]
        assert Sample in during
        assert Label in during


def test_higher_level_chooses_one_batch_at_a_time_until_no_frame_is_left() -> None:
    world = World(settings(parent_run="..", max_labels=500), triggers=lambda generation: 10 if generation < 3 else 0)
    state = world.run()
    assert state.finished.startswith("nothing left to choose")
    assert not any(isinstance(action, Rank) for _, action in world.actions)
    choices = [now for now, action in world.actions if isinstance(action, Sample)]
    assert all(later - earlier >= 20 for earlier, later in pairwise(choices))  # each takes 20 s
    # All that was chosen is labeled and trained on.
    assert state.n_labels == state.n_candidates
    assert state.models[-1].n_labels == state.n_train


def test_higher_level_ends_at_its_number_of_labels() -> None:
    state = World(settings(parent_run="..", max_labels=57), triggers=lambda generation: 10).run()
    assert state.finished.startswith("max_labels: 57")
    assert state.n_labels == 57


def test_no_frame_is_given_to_two_label_tasks_unless_it_failed() -> None:
    rng = random.Random(1)
    fates = {}

    def fate(frame: str, attempt: int) -> str:
        return fates.setdefault((frame, attempt), "crash" if rng.random() < 0.2 else "")

    world = World(settings(), label_fate=fate)
    world.run()
    sent = [c.frame for _, action in world.actions if isinstance(action, Label) for c in action.candidates]
    assert len(sent) > len(set(sent)) >= 80
    for frame in set(sent):
        assert sent.count(frame) <= 1 + sum(fates.get((frame, attempt), "") != "" for attempt in (1, 2, 3))


def test_slots_are_never_exceeded() -> None:
    world = World(settings(), slots={"sample": 3, "label": 2, "train": 1})
    world.run()
    pools = {"build": "sample", "sample": "sample", "rank": "sample", "label": "label"}
    running: dict[str, str] = {}
    for event in world.events:
        if event["event"] == "task_submitted":
            running[event["task"]] = pools.get(event["stage"], "train")
        elif event["event"] in ("task_finished", "task_failed"):
            del running[event["task"]]
        counts = [list(running.values()).count(pool) for pool in ("sample", "label", "train")]
        assert counts[0] <= 3
        assert counts[1] <= 2
        assert counts[2] <= 1


def test_sampling_pauses_while_enough_candidates_wait() -> None:
    world = World(settings(queue_target=10, max_labels=300), slots={"sample": 4, "label": 1, "train": 1})
    longest = 0
    world.script.triggers = lambda generation: 3
    while not world.step().finished and len(world.actions) < 400:
        longest = max(longest, len(world.state.queue) if world.state.models else 0)
    assert longest <= 10 + 4 * 3


def test_labels_never_run_further_ahead_of_the_newest_model_than_allowed() -> None:
    world = World(settings(retrain_after=10, labels_ahead=14, max_labels=200))
    most = 0
    while not (state := world.step()).finished and len(world.actions) < 1000:
        if state.models:
            most = max(most, state.n_train - state.models[-1].n_labels)
    assert world.state.finished.startswith("max_labels")
    assert 10 <= most <= 14


def test_most_uncertain_candidates_of_the_newest_model_are_labeled_first() -> None:
    world = World(settings(), slots={"sample": 1, "label": 1, "train": 1})
    world.run()
    batches = [action.candidates for _, action in world.actions if isinstance(action, Label)]
    walkers = [batch for batch in batches if batch[0].kind == "walker"]
    assert all(a.spread >= b.spread for batch in walkers for a, b in pairwise(batch) if a.generation == b.generation)


def test_candidates_wait_for_the_newest_model_to_rank_them() -> None:
    world = World(settings(max_labels=300))
    world.run()
    assert any(isinstance(action, Rank) for _, action in world.actions)
    assert world.state.dropped["sure"] > 0
    generation = ranking = 0
    for event in world.events:
        if event["event"] == "model_trained":
            generation = event["generation"]
        if event["event"] == "task_submitted" and event["stage"] == "rank":
            ranking += 1
        if event["event"] in ("task_finished", "task_failed") and event["task"].startswith("rank"):
            ranking -= 1
    assert (generation > 2, ranking) == (True, 0)


def test_ranking_does_not_wait_for_a_training() -> None:
    world = World(settings(max_labels=300, labels_ahead=1000))
    world.run()
    trainings = [(start, start + 60) for start, action in world.actions if isinstance(action, Train)][1:-1]
    ranked = [now for now, action in world.actions if isinstance(action, Rank)]
    assert any(start < now < end for start, end in trainings for now in ranked)


def test_labelers_take_what_is_there_while_nothing_can_rank_it() -> None:
    world = World(settings(max_labels=300, labels_ahead=1000, queue_target=60))
    while not (state := world.step()).finished:
        n_free = world.slots["label"] - state.n_running["label"]
        assert state.n_running["rank"] or state.stopping or not (n_free and state.queue)


def test_one_stubborn_frame_is_set_aside_and_goes_alone_after_its_first_failure() -> None:
    stubborn = f"{3:032x}"
    world = World(settings(), label_fate=lambda frame, attempt: "crash" if frame == stubborn else "")
    state = world.run()
    assert not state.failed
    assert [q.frame for q in state.quarantined] == [stubborn]
    sent = [
        a.candidates for _, a in world.actions if isinstance(a, Label) and stubborn in {c.frame for c in a.candidates}
    ]
    assert [len(batch) for batch in sent[1:]] == [1, 1]


def test_unphysical_frames_are_not_tried_again() -> None:
    world = World(settings(), label_fate=lambda frame, attempt: "geometry" if frame.endswith("3") else "")
    state = world.run()
    assert state.label_failures["geometry"] == len(state.quarantined) > 1


def test_campaign_ends_with_the_reason_when_the_first_frames_all_fail() -> None:
    state = World(settings(), label_fate=lambda frame, attempt: "scf").run()
    assert state.failed
    assert (
        # Two tasks of three frames end at the same moment.
        "the first 6 frames all failed to be labeled; the last one: scf: simulated" in state.finished
    )


def test_campaign_ends_when_labels_start_to_fail_later() -> None:
    limits = settings(failure_window=20, max_labels=1000, max_generations=1000)
    world = World(limits, label_fate=lambda frame, attempt: "bad_label" if int(frame, 16) > 100 else "")
    state = world.run()
    assert state.failed
    assert re.match(r"1[1-3] of the last 20 frames failed to be labeled", state.finished)


def test_a_third_of_failing_frames_does_not_end_a_campaign() -> None:
    state = World(settings(), label_fate=lambda frame, attempt: "scf" if int(frame, 16) % 3 == 0 else "").run()
    assert not state.failed
    assert state.n_labels == 80


@pytest.mark.parametrize("stage", ["build", "sample", "rank", "train", "evaluate"])
def test_another_task_may_fail_twice_but_not_three_times(stage: str) -> None:
    twice = World(settings(), task_fate=lambda s, counter: "crash" if s == stage and counter <= 2 else "").run()
    assert not twice.failed
    ever = World(settings(), task_fate=lambda s, counter: "crash" if s == stage else "").run()
    assert ever.failed
    assert ever.finished == f"{stage} failed 3 times in a row; crash: simulated"


@pytest.mark.parametrize("stage", ["sample", "train"])
def test_lost_nodes_are_no_failures_of_a_stage_until_there_are_far_too_many(stage: str) -> None:
    often = World(settings(), task_fate=lambda s, n: "node_lost" if s == stage and n <= 19 else "").run()
    assert not often.failed
    ever = World(settings(), task_fate=lambda s, n: "node_lost" if s == stage else "").run()
    assert ever.finished == f"{stage} lost its node 20 times in a row; node_lost: simulated"


def test_lost_node_between_failures_neither_counts_nor_ends_their_row() -> None:
    fates = {1: "crash", 2: "node_lost", 3: "crash"}
    twice = World(settings(), task_fate=lambda s, n: fates.get(n, "") if s == "sample" else "").run()
    assert not twice.failed
    fates[4] = "crash"
    thrice = World(settings(), task_fate=lambda s, n: fates.get(n, "") if s == "sample" else "").run()
    assert thrice.finished.startswith("sample failed 3 times in a row")


def test_lost_nodes_are_no_attempts_of_a_frame_until_there_are_far_too_many() -> None:
    unlucky, killer = f"{3:032x}", f"{4:032x}"

    def fate(frame: str, attempt: int) -> str:
        return "node_lost" if frame == killer or (frame == unlucky and attempt < 20) else ""

    world = World(settings(), label_fate=fate)
    state = world.run()
    assert not state.failed
    assert [(q.frame, q.kind) for q in state.quarantined] == [(killer, "node_lost")]
    assert state.label_failures["node_lost"] == 19 + 20
    sent = [
        a.candidates for _, a in world.actions if isinstance(a, Label) and killer in {c.frame for c in a.candidates}
    ]
    assert {len(batch) for batch in sent[1:]} == {1}


def test_frames_that_a_label_task_hands_back_are_labeled_later() -> None:
    handed_back = set()

    def fate(frame: str, attempt: int) -> str:
        late = frame not in handed_back and int(frame, 16) % 3 == 0
        handed_back.update([frame] if late else [])
        return "postponed" if late else ""

    state = World(settings(), label_fate=fate).run()
    assert (state.failed, state.n_labels, dict(state.label_failures)) == (False, 80, {})
    assert len(handed_back) > 20


def test_something_missing_ends_the_campaign_at_once_and_blames_no_frame() -> None:
    state = World(settings(), task_fate=lambda stage, counter: "missing" if stage == "label" else "").run()
    assert state.failed
    assert state.finished == "missing: simulated"
    assert not state.quarantined
    assert all(candidate.attempts == 0 for candidate in state.queue)


def test_campaign_ends_when_walkers_of_the_newest_model_run_to_their_end() -> None:
    world = World(settings(max_labels=1000), triggers=lambda generation: 4 if generation < 3 else 0)
    state = world.run()
    assert re.match(r"nothing left to learn: 40 of 40 walkers of generation [34] ran to their end", state.finished)
    assert state.models[-1].n_labels == state.n_train


def test_campaign_makes_no_more_generations_than_asked() -> None:
    for n in (1, 2, 4):
        state = World(settings(max_labels=1000, max_generations=n)).run()
        assert state.finished.startswith("max_generations")
        assert len(state.models) == n
        assert state.models[-1].n_labels == state.n_train


def test_campaign_stops_when_its_time_is_up() -> None:
    world = World(settings(max_labels=10_000, max_generations=1000, max_hours=0.5))
    state = world.run()
    assert state.finished.startswith("max_hours")
    assert state.models[-1].n_labels == state.n_train
    assert 1800 <= state.active_s < 1800 + 300


def test_time_between_two_drivers_does_not_count() -> None:
    world = World(settings())
    world.now += 100
    world.emit("driver_stopped", reason="interrupted")
    world.now += 1e6
    world.emit("driver_started", host="here", pid=2, config_digest="", pools={})
    world.now += 50
    world.emit("stop_reached", reason="test")
    assert world.state.active_s == 150


def test_campaign_goes_on_after_its_end_when_its_limit_was_raised() -> None:
    world = World(settings(max_labels=60))
    first = world.run()
    world.emit("driver_stopped", reason="end")
    world.emit("driver_started", host="here", pid=2, config_digest="", pools={})
    world.settings = settings(max_labels=90)
    second = world.run()
    assert (first.n_labels, second.n_labels) == (60, 90)
    assert second.models[: len(first.models) - 1] != ()
    assert second.models[-1].n_labels == second.n_train


def test_runaway_walkers_without_any_candidate_end_the_campaign_with_advice() -> None:
    state = World(settings(), exploding=True).run()
    assert state.failed
    assert "all 40 walkers of generation 1 ran away (40)" in state.finished
    assert "sampler.timestep_fs" in state.finished


def test_finished_campaign_has_nothing_to_do() -> None:
    world = World(settings())
    world.run()
    assert isinstance(world.actions[-1][1], Finish)
    assert decide(world.state, world.settings, world.slots, world.now) == []


def test_replaying_the_events_gives_the_state_that_was_decided_on() -> None:
    world = World(settings(), label_fate=lambda frame, attempt: "crash" if frame.endswith("7") else "")
    world.run()
    assert replay(world.events) == world.state


def test_nothing_is_held_out_or_evaluated_when_not_asked() -> None:
    world = World(settings(holdout_fraction=0.0))
    state = world.run()
    assert state.n_holdout == 0
    assert not any(isinstance(action, Evaluate) for _, action in world.actions)


def test_verdict_per_class_of_failure() -> None:
    three = settings(attempts=3, losses=7)
    allowed = {
        kind: next(n for n in range(1, 9) if verdict(kind, n, three) is Verdict.QUARANTINE) for kind in FailureClass
    }
    assert allowed == {
        FailureClass.CRASH: 3,
        FailureClass.WALLTIME: 3,
        FailureClass.NODE_LOST: 7,
        FailureClass.MEMORY: 2,
        FailureClass.SCF: 2,
        FailureClass.GEOMETRY: 1,
        FailureClass.BAD_LABEL: 1,
        FailureClass.MISSING: 3,
    }


def test_holdout_takes_its_share_and_does_not_depend_on_company() -> None:
    frames = [f"{n:032x}" for n in range(5000)]
    chosen = holdout_of(frames, 0.1)
    assert abs(len(chosen) / 5000 - 0.1) < 0.02  # five standard deviations
    assert all((frame in chosen) == bool(holdout_of([frame], 0.1)) for frame in frames[:200])


def test_seeds_differ_between_stages_and_tasks_and_never_change() -> None:
    seeds = {derive_seed(7, stage, counter) for stage in ("sample", "train") for counter in range(1000)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(7, "sample", 1) == 1181094300
