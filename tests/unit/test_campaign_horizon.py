"""Is nothing started in a block that is over before it could be?"""

from __future__ import annotations

from typing import Any

import pytest

from campaign.config import CampaignConfig, parse_campaign
from campaign.horizon import task_limits
from campaign.site import Site, parse_site
from shards.settings import SettingsError


def campaign(label_min: float = 30, train_min: float = 0) -> CampaignConfig:
    return parse_campaign(
        {
            "campaign": {"name": "c", "elements": ["Al"]},
            "labeler": {"engine": "emt", "time_limit_min": label_min},
            "trainer": {"max_minutes": train_min},
        }
    )


def site(**slurm: Any) -> Site:
    pools = {name: {"slurm": slurm} for name in ("sample", "label", "train")}
    return parse_site({"name": "test", "address": "127.0.0.1", **pools})


def test_limits_of_the_campaign_count_where_they_are_longer_than_the_site_says() -> None:
    limits = task_limits(campaign(label_min=30, train_min=45), site(walltime_min=60, task_min=20))
    assert limits == {"sample": 1200, "label": 1800, "train": 2700}
    assert task_limits(campaign(label_min=5), site(walltime_min=60, task_min=20)) == dict.fromkeys(limits, 1200)


def test_training_longer_than_a_block_may_be_started_and_goes_on_in_the_next() -> None:
    assert task_limits(campaign(train_min=600), site(walltime_min=60))["train"] == 600


def test_pool_beside_the_driver_has_no_limit() -> None:
    assert task_limits(campaign(), Site(name="here")) == {}


def test_block_too_short_for_any_task_is_refused() -> None:
    with pytest.raises(SettingsError) as error:
        task_limits(campaign(label_min=30), site(walltime_min=30))
    assert str(error.value) == (
        "label.slurm.walltime_min = 30: too short for a task of 30 minutes (label.slurm.task_min,"
        " labeler.time_limit_min)"
    )
