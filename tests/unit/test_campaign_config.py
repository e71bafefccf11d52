"""Are wrong configurations refused with the dotted path, and right ones kept to the letter?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from campaign.config import STOP_FIELDS, changed_fields, config_digest, load_campaign, parse_campaign, to_toml
from campaign.driver import run_campaign
from campaign.lease import Lease, LeaseError
from campaign.site import Site, load_site
from shards.settings import SettingsError

LEAST: dict[str, Any] = {"campaign": {"name": "c", "elements": ["Al"]}, "labeler": {"engine": "emt"}}


def with_campaign(**fields: Any) -> dict[str, Any]:
    return LEAST | {"campaign": LEAST["campaign"] | fields}


def test_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    table = LEAST | {
        "potential": {"hidden_by_element": {"Al": [8, 8]}},
        "builder": {"composition": {"Al": 1.0}},
        "labeler": {
            "engine": "some.Class",
            "arguments": {"a b": 'q"\\\n', "deep": [{"x": 1.5, "y": True}], "big": 1e300},
        },
    }
    config = parse_campaign(table)
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert load_campaign(tmp_path / "c.toml") == config
    assert config_digest(load_campaign(tmp_path / "c.toml")) == config_digest(config)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"campaign": {"name": "c"}}, r"campaign\.elements: missing; it has no default"),
        (with_campaign(sed=1), r"campaign\.sed = 1: unknown key; did you mean seed\?"),
        (with_campaign(elements=["Al", "Xx"]), r"campaign\.elements = .*not chemical symbols: Xx"),
        (with_campaign(elements=["Al", "Al"]), r"campaign\.elements = .*every element once"),
        (with_campaign(max_labels=10), r"campaign\.max_labels = 10: must be at least campaign\.n_bootstrap = 100"),
        (with_campaign(n_bootstrap=7), r"campaign\.n_bootstrap = 7: .* 7 labels; cross-validation needs at least 8"),
        (with_campaign(holdout_fraction=0.9), r"campaign\.holdout_fraction = 0\.9: .*less than or equal to 0\.5"),
        (LEAST | {"sampler": {"timestep_fs": 50.0}}, r"sampler\.timestep_fs = 50\.0: .*less than or equal to 5"),
        (LEAST | {"walker": {}}, r"walker = \{\}: unknown key.* \(known: campaign, potential, builder"),
        (
            LEAST | {"builder": {"composition": {"Ni": 1.0}}},
            r"builder\.composition: Ni not in campaign\.elements \(Al\)",
        ),
        (
            LEAST | {"potential": {"hidden_by_element": {"Cu": [4]}}},
            r"potential\.hidden_by_element: Cu not in campaign\.elements \(Al\)",
        ),
    ],
)
def test_wrong_setting_is_named_with_its_path_and_what_is_allowed(table: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_campaign(table)


def test_site_of_this_repository_is_valid_and_wrong_ones_are_named(tmp_path: Path) -> None:
    site = load_site(Path(__file__).parents[2] / "configs" / "sites" / "local.toml")
    assert set(site.pools) == {"sample", "label", "train"}
    (tmp_path / "s.toml").write_text('name = "x"\n[label]\nslots = 0\n[train]\nrank = 2\n')
    with pytest.raises(SettingsError) as error:
        load_site(tmp_path / "s.toml")
    assert "label.slots = 0: input should be greater than or equal to 1" in str(error.value)
    assert "train.rank = 2: unknown key" in str(error.value)


def test_only_stop_fields_may_change_on_a_run_directory(tmp_path: Path) -> None:
    old = parse_campaign(LEAST)
    (tmp_path / "config.toml").write_text(to_toml(old))
    new = parse_campaign(with_campaign(seed=5, max_labels=5000))
    assert changed_fields(old, new) == {"campaign.seed": (0, 5), "campaign.max_labels": (1000, 5000)}
    assert {"campaign.max_labels"} == set(changed_fields(old, new)) & STOP_FIELDS
    with pytest.raises(SettingsError, match=r"started with other settings \(campaign\.seed: 0 -> 5\); only campaign"):
        run_campaign(new, tmp_path, Site(name="s"))


def test_nothing_starts_in_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SettingsError, match="not empty, and not a run directory"):
        run_campaign(parse_campaign(LEAST), tmp_path, Site(name="s"))


def test_lease_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    with Lease(tmp_path), pytest.raises(LeaseError):
        run_campaign(parse_campaign(LEAST), tmp_path, Site(name="s"))
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
