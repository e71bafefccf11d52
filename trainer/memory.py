"""How much memory is there, and what of a data set does a rank keep in it? The rest is read from shards when its turn
comes, through memory maps, so that all ranks of a node share one copy: the system's cache of the files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Plan", "make_plan", "node_memory_GB"]

GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Plan:
    """What a rank keeps of its structures: descriptors with all that they are made from, and their derivatives."""

    descriptors: bool
    derivatives: bool
    reason: str


def make_plan(descriptors_GB: float, derivatives_GB: float, allowed_GB: float, derivatives_allowed: bool) -> Plan:
    """Decide from sizes. derivatives_GB: what the derivatives take beside the descriptors."""
    descriptors = descriptors_GB <= allowed_GB
    derivatives = derivatives_allowed and descriptors_GB + derivatives_GB <= allowed_GB
    kept = "all kept" if derivatives else "the latter recomputed" if descriptors else "streamed from the shards"
    reason = (
        f"{descriptors_GB:.3g} GB with descriptors, {derivatives_GB:.3g} GB more with derivatives,"
        f" {allowed_GB:.3g} GB allowed: {kept}"
    )
    return Plan(descriptors, derivatives, reason)


def node_memory_GB() -> float:
    """Memory of this node, or what the batch system allows on it if that is less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    membership = Path("/proc/self/cgroup")
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, group = line.split(":", 2)
        for folder, name in ((GROUPS, "memory.max"), (GROUPS / "memory", "memory.limit_in_bytes")):
            if controllers in ("", "memory"):
                found += _limits(folder / group.lstrip("/"), name)
    return min(found) / 1e9


def _limits(folder: Path, name: str) -> list[int]:
    """Limits of a control group and of those that it is in."""
    files = [parent / name for parent in (folder, *folder.parents) if (parent / name).exists()]
    return [int(text) for text in (file.read_text().strip() for file in files) if text.isdecimal()]
