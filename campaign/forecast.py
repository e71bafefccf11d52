"""How busy would a campaign keep a machine, and where would the rest go? Beside it the same with barriers.

Busy is the share of all node-seconds in which a stage works on the node, idle the rest, by what is waited for. In the
steady state every stage has work: it begins with the second model, and ends when fewer labels are left to hand out than
would fill all slots once more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from campaign.accounting import Wait
from campaign.config import CampaignConfig
from campaign.costs import Chance, Costs
from campaign.policy import decide
from campaign.simulation import Policy, World, decide_with_barriers
from campaign.site import LabelPool, Pool, Site, Slurm, TrainPool
from campaign.state import State
from campaign.summary import pool_row
from shards.settings import SettingsError

__all__ = ["ASSUMED", "compare", "forecast", "share_nodes"]

LOOP_S = 0.1  # what the driver takes for a decision and for what follows from it
# Four walker tasks on a node, one label, and one training over two nodes.
ASSUMED = Site(
    name="assumed",
    sample=Pool(slots=8, slurm=Slurm(max_blocks=2)),
    label=LabelPool(slots=1, slurm=Slurm()),
    train=TrainPool(slurm=Slurm(nodes_per_block=2, workers="block")),
)


def share_nodes(n_nodes: int, site: Site) -> dict[str, dict[str, int]]:
    """Slots, cores and nodes of each pool: walkers and trainings have what the site gives them, labels all the rest.

    Raises:
        SettingsError: a pool of the site has no nodes of its own, or there are too few.
    """
    sizes = {name: pool.size for name, pool in site.pools.items()}
    if without := [name for name, size in sizes.items() if not size["nodes"]]:
        raise SettingsError(f"{', '.join(without)}: no nodes of its own in this site; add a table {without[0]}.slurm")
    n_label = n_nodes - sizes["sample"]["nodes"] - sizes["train"]["nodes"]
    if n_label < 1:
        raise SettingsError(f"{n_nodes} nodes: walkers and trainings have {n_nodes - n_label} of them on this site")
    label = {name: n * n_label // sizes["label"]["nodes"] for name, n in sizes["label"].items()}
    return sizes | {"label": label}


def compare(config: CampaignConfig, pools: Mapping[str, Mapping[str, int]], costs: Costs, seed: int) -> dict[str, Any]:
    """Forecasts of the campaign as it is and with barriers between its stages."""
    return {
        "pools": pools,
        "asynchronous": forecast(config, pools, costs, seed),
        "barriers": forecast(config, pools, costs, seed, decide_with_barriers),
    }


def forecast(
    config: CampaignConfig,
    pools: Mapping[str, Mapping[str, int]],
    costs: Costs,
    seed: int,
    policy: Policy = decide,
) -> dict[str, Any]:
    """Simulate a whole campaign. Returns JSON values: how it ended, and what the nodes did, in its steady state and
    from start to end."""
    world = World(config.campaign, pools, Chance(config, costs, seed), policy, LOOP_S)
    n_steady = config.campaign.max_labels - pools["label"]["slots"]
    start = begin = end = world.state
    while not (state := world.step()).finished:
        if state.generation < 2:
            begin = end = state
        elif not state.stopping and state.n_labels + len(state.in_flight) <= n_steady:
            end = state
    return {
        "reason": state.finished,
        "labels": state.n_labels,
        "quarantined": len(state.quarantined),
        "generations": state.generation,
        "to_model_s": state.delay.seconds / max(1, state.delay.n_labels),
        "steady": _use(begin, end),
        "all": _use(start, state),
    }


def _use(begin: State, end: State) -> dict[str, Any]:
    """What the nodes did between two states."""
    uses = {name: use.since(begin.pools[name]) for name, use in end.pools.items()}
    nodes = {name: use.nodes / use.slots for name, use in uses.items()}  # for one slot
    node_s = sum(use.seconds * nodes[name] for name, use in uses.items()) or 1.0
    idle_s: dict[str, float] = defaultdict(float)
    for name, use in uses.items():
        for reason, seconds in use.idle.items():
            idle_s[reason] += seconds * nodes[name]
    return {
        "seconds": end.time - begin.time,
        "busy": sum(sum(use.busy.values()) * nodes[name] for name, use in uses.items()) / node_s,
        "idle": {reason: idle_s[reason] / node_s for reason in Wait},
        "pools": {name: pool_row(use) for name, use in uses.items()},
    }
