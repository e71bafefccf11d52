"""Is a simulated campaign a campaign: does its time add up, can its costs be measured, and what do barriers cost it?"""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import pytest
from campaign_world import World, settings

from campaign import cli
from campaign.config import CampaignConfig, load_campaign, parse_campaign
from campaign.costs import Chance, Costs, Spread, measure
from campaign.forecast import ASSUMED, forecast, share_nodes
from campaign.ledger import LedgerError, read_state
from campaign.policy import Label, Sample, Train
from campaign.reference import CONFIGS
from campaign.simulation import decide_with_barriers
from campaign.site import Site
from shards.outcome import FailureClass
from shards.settings import SettingsError

POOLS = share_nodes(450, ASSUMED)


@pytest.fixture(scope="module")
def full_size() -> CampaignConfig:
    return load_campaign(CONFIGS / "aluminum.toml")


def small_world(seed: int, costs: Costs) -> World:
    """A campaign of 600 labels on eight label slots."""
    limits = settings(max_labels=600, retrain_after=40, labels_ahead=150, queue_target=60)
    world = World(limits, slots={"sample": 2, "label": 8, "train": 1})
    config = parse_campaign({"campaign": {"name": "small", "elements": ["Al"]}})
    world._nature = Chance(config, costs, seed)
    return world


@pytest.mark.parametrize("seed", range(4))
def test_all_time_of_all_slots_is_in_the_accounts(seed: int) -> None:
    world = small_world(seed, Costs(lost_per_hour=0.05))
    state = world.run()
    for pool, n in world.slots.items():
        use = state.pools[pool]
        assert use.seconds == pytest.approx(n * (state.time - state.started), rel=1e-9)
        assert all(value >= 0 for value in (*use.busy.values(), *use.idle.values()))
    assert state.pools["label"].idle["lost"] > 0


def test_costs_of_a_simulated_run_can_be_measured(tmp_path: Path) -> None:
    truth = Costs(
        label=Spread(200.0, 0.4),
        train_once_s=30.0,
        train_label_s=0.5,
        triggered=(0.9, 0.5),
        failures={FailureClass.SCF: 0.05},
        sure=0.3,
        lost_per_hour=0.3,
    )
    world = small_world(1, truth)
    world.run()
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in world.events))
    assert read_state(tmp_path).n_labels == 600
    found = measure(tmp_path)
    # Three standard deviations of what so few tasks tell; label tasks are averages over up to three frames.
    assert found.label.median_s == pytest.approx(200, rel=0.15)
    assert found.train_label_s == pytest.approx(0.5, rel=0.2)
    assert found.quiet_task.median_s == pytest.approx(900, rel=0.1)
    assert found.triggered[0] == pytest.approx(0.9, abs=0.1)
    assert found.failures[FailureClass.SCF] == pytest.approx(0.05, abs=0.03)
    assert found.sure == pytest.approx(0.3, abs=0.1)
    assert 0.1 < found.lost_per_hour < 0.6


def test_what_an_earlier_run_has_none_of_is_assumed(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").touch()
    assert measure(tmp_path) == Costs(failures={})
    with pytest.raises(LedgerError, match="not a run directory"):
        measure(tmp_path / "none")


def test_times_are_log_normal_with_a_pareto_tail() -> None:
    rng = random.Random(3)
    draws = sorted(Spread(100.0, 0.5, tail=0.02).draw(rng) for _ in range(40_000))
    assert statistics.median(draws) == pytest.approx(100, rel=0.03)
    assert statistics.pstdev(map(math.log, draws[400:-2000])) == pytest.approx(0.44, abs=0.03)  # truncated, by integral
    beyond = sum(draw > 1000 for draw in draws) / len(draws)  # 4.6 sigma: none without a tail
    assert beyond == pytest.approx(0.02 * 10**-1.5 * math.exp(1.5**2 * 0.5**2 / 2), rel=0.3)


def test_full_size_campaign_keeps_450_nodes_busy_and_barriers_do_not(full_size: CampaignConfig) -> None:
    found = forecast(full_size, POOLS, Costs(), seed=0)
    steady = found["steady"]
    assert steady["busy"] >= 0.99
    assert steady["busy"] + sum(steady["idle"].values()) == pytest.approx(1.0)
    assert steady["seconds"] > 3600
    assert found["labels"] == 6700
    with_barriers = forecast(full_size, POOLS, Costs(), 0, decide_with_barriers)
    assert with_barriers["labels"] == 6700
    assert with_barriers["steady"]["busy"] < 0.5


def test_with_barriers_only_one_stage_works_at_a_time() -> None:
    world = small_world(0, Costs())
    world._policy = decide_with_barriers
    while not (state := world.step()).finished:
        assert sum(state.n_running[stage] > 0 for stage in ("sample", "label", "train")) <= 1
    kinds = [type(action) for _, action in world.actions]
    assert state.n_labels == 600
    assert all(kind in kinds for kind in (Sample, Label, Train))


def test_labels_get_the_nodes_that_walkers_and_trainings_leave() -> None:
    assert {name: size["nodes"] for name, size in POOLS.items()} == {"sample": 2, "label": 446, "train": 2}
    assert POOLS["label"]["slots"] == 446
    with pytest.raises(SettingsError, match="4 nodes: walkers and trainings have 4 of them"):
        share_nodes(4, ASSUMED)
    with pytest.raises(SettingsError, match=r"no nodes of its own in this site; add a table sample\.slurm"):
        share_nodes(450, Site(name="laptop"))


def test_command_prints_both_and_says_where_time_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[campaign]\nname = "small"\nelements = ["Al"]\nmax_labels = 400\nmax_generations = 50\n')
    assert cli._run(["simulate", str(config), "--nodes", "24"]) == 0
    page = capsys.readouterr().out
    for words in ("with barriers", "waiting for frames to label", "ends as configured: max_labels: 400 labels"):
        assert words in page
    assert cli._run(["simulate", str(config), "--nodes", "24", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["asynchronous"]["labels"] == table["barriers"]["labels"] == 400
    assert f"{table['asynchronous']['steady']['busy']:.2%}" in page
