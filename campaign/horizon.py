"""How late in the life of a block may something be started there, so that it is over before the block is?"""

from __future__ import annotations

import math
from collections.abc import Mapping

from campaign.config import CampaignConfig
from campaign.site import Site
from shards.settings import SettingsError

__all__ = ["BLOCK_END", "MARGIN_S", "task_limits"]

BLOCK_END = "SMELT_BLOCK_END"  # environment variable of workers: seconds since the epoch
MARGIN_S = 30  # before the real end: for what comes after the last result


def task_limits(config: CampaignConfig, site: Site) -> Mapping[str, float]:
    """Seconds that a task may take, for every pool on Slurm: none is started in the last so many of a block.

    A label task is counted by one frame, because it hands back those for which it is too late (labeler.stage.label).

    Raises:
        SettingsError: a block is too short for anything.
    """
    limits, faults = {}, []
    for name, pool in site.pools.items():
        if pool.slurm is None:
            continue
        limit_min = pool.slurm.task_min
        if name == "label":
            limit_min = max(limit_min, config.labeler.time_limit_min)
        walltime_min = math.inf if site.allocation else pool.slurm.walltime_min
        if name == "train" and config.trainer.max_minutes < walltime_min - 1:
            # A longer one goes on in the next block.
            limit_min = max(limit_min, config.trainer.max_minutes)
        if 60 * limit_min + MARGIN_S >= 60 * walltime_min:
            faults.append(
                f"{name}.slurm.walltime_min = {walltime_min}: too short for a task of {limit_min:g} minutes"
                f" ({name}.slurm.task_min{', labeler.time_limit_min' if name == 'label' else ''})"
            )
        limits[name] = 60 * limit_min
    if faults:
        raise SettingsError("\n".join(faults))
    return limits
