"""Does every pool get its nodes of a large job, and none those of another?"""

from __future__ import annotations

from typing import Any

import pytest

from campaign.allocation import shares
from campaign.site import Site, parse_site
from shards.settings import SettingsError

MPIRUN = ["mpirun", "-np", "{ranks}", "--host", "{hosts}"]


def site(**pools: dict[str, Any]) -> Site:
    tables: dict[str, Any] = {name: {"slots": 24, "slurm": slurm} for name, slurm in pools.items()}
    if "train" in pools:
        tables["train"]["launcher"] = MPIRUN
    return parse_site({"name": "test", "address": "127.0.0.1", "allocation": True, **tables})


def nodes(number: int, cores: int = 64) -> dict[str, int]:
    return {f"n{i}": cores for i in range(1, number + 1)}


def test_pools_get_whole_nodes_of_their_own() -> None:
    wanted = site(sample={}, label={"max_blocks": 2}, train={"nodes_per_block": 2, "workers": "block"})
    assert shares(wanted, nodes(5)) == {"sample": [["n1"]], "label": [["n2"], ["n3"]], "train": [["n4", "n5"]]}


def test_pools_that_name_their_cores_share_nodes() -> None:
    wanted = site(
        sample={"cores_per_node": 24, "nodes_per_block": 2},
        label={"cores_per_node": 40, "nodes_per_block": 2},
        train={"nodes_per_block": 1},
    )
    assert shares(wanted, nodes(3)) == {"train": [["n1"]], "label": [["n2", "n3"]], "sample": [["n2", "n3"]]}


def test_job_that_is_too_small_is_refused_with_what_is_wanted() -> None:
    with pytest.raises(SettingsError) as error:
        shares(site(sample={}, label={"max_blocks": 3, "cores_per_node": 48}), nodes(3))
    assert str(error.value) == (
        "allocation = true: the job has 3 nodes of 64 cores, which is too little; wanted (max_blocks *"
        " nodes_per_block): sample 1 with all cores each, label 3 with 48 cores each"
    )


def test_what_a_job_is_asked_for_has_no_meaning_inside_of_one() -> None:
    with pytest.raises(SettingsError, match=r"label\.slurm\.partition = 'cpu': has no meaning with allocation = true"):
        site(label={"partition": "cpu"})
