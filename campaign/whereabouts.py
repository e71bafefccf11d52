"""Where is a campaign at work, and what does it have from the scheduler? Asks squeue, from any host."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from campaign.lease import holder_of
from campaign.scheduler import SchedulerError, blocks_of, steps_of
from campaign.site import load_site
from campaign.state import State, Task
from campaign.worker import Work, work_under_way

__all__ = ["whereabouts"]


def whereabouts(run_dir: Path, state: State) -> dict[str, Any]:
    """Running tasks and blocks, in JSON values.

    tasks: with the host where each is at work, empty while it waits for a worker; none when no driver is at work.
    blocks: jobs that are pending or running. scheduler: why they are not known; empty when they are.
    """
    works = {work.task: work for work in work_under_way(run_dir)}
    blocks, silence = _blocks(run_dir)
    tasks = state.running if holder_of(run_dir) else ()
    return {"tasks": [_row(task, works) for task in tasks], "blocks": blocks, "scheduler": silence}


def _row(task: Task, works: Mapping[str, Work]) -> dict[str, Any]:
    work = works.get(task.id)
    row = {"task": task.id, "stage": task.stage, "host": "", "job": "", "seconds": time.time() - task.submitted}
    return row | {"host": work.host, "job": work.job, "seconds": time.time() - work.since} if work else row


def _blocks(run_dir: Path) -> tuple[list[dict[str, Any]], str]:
    path = run_dir / "site.toml"
    site = load_site(path) if path.exists() else None
    if site is None or not any(pool.slurm for pool in site.pools.values()):
        return [], ""
    find = steps_of if site.allocation else blocks_of
    try:
        return [asdict(block) for block in find(run_dir) if not block.has_ended], ""
    except SchedulerError as error:
        return [], str(error)
