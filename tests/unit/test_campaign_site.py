"""Is a wrong site file refused with the path of what is wrong, and what does Slurm get to see of a right one?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from campaign.pools import ParslPools
from campaign.site import load_site, parse_site
from shards.settings import SettingsError

SITES = Path(__file__).parents[2] / "configs" / "sites"


def on_slurm(pool: str = "label", slurm: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {"name": "test", "address": "127.0.0.1", pool: {"slots": 4, "slurm": slurm or {}, **changes}}


@pytest.mark.parametrize("path", sorted(SITES.glob("*.toml")), ids=lambda path: path.name)
def test_every_site_of_this_repository_can_be_used(path: Path) -> None:
    assert set(load_site(path).pools) == {"sample", "label", "train"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (on_slurm(slurm={"queue": "x"}), r"label\.slurm\.queue = 'x': unknown key \(known: partition, account, qos, "),
        (on_slurm(slurm={"nodes_per_blok": 2}), r"unknown key; did you mean nodes_per_block\?"),
        (on_slurm(slurm={"partition": "a b"}), r"label\.slurm\.partition = 'a b': "),
        (on_slurm(slurm={"scheduler_options": ["mem=0"]}), r"label\.slurm\.scheduler_options\.0 = 'mem=0': "),
        (on_slurm(nice=5), r"label\.nice = 5: must be 0 with label\.slurm"),
        (
            on_slurm(slurm={"nodes_per_block": 3}),
            r"label\.slots = 4: must be a multiple of label\.slurm's max_blocks \* nodes_per_block = 3",
        ),
        (
            on_slurm(slurm={"max_blocks": 3, "nodes_per_block": 2, "workers": "block"}),
            r"label\.slots = 4: must be a multiple of label\.slurm's max_blocks = 3",
        ),
        (on_slurm(slurm={"cores_per_node": 7}, cores=2), r"label\.slurm\.cores_per_node = 7: 4 tasks .* need 8"),
        (on_slurm(slurm={"gpus_per_node": 3}), r"label\.slurm\.gpus_per_node = 3: .* puts 4 tasks on a node"),
        (on_slurm("train", {"nodes_per_block": 2, "workers": "block"}), r"train\.launcher: starts all ranks on one"),
        ({"name": "test", "label": {"slurm": {}}}, r"address: missing"),
    ],
)
def test_wrong_site_is_named_with_its_path(table: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_site(table)


def test_all_contradictions_are_named_at_once() -> None:
    table = on_slurm(slurm={"nodes_per_block": 3}) | {"sample": {"nice": 1, "slurm": {}}}
    with pytest.raises(SettingsError) as error:
        parse_site(table)
    assert [line.partition(" = ")[0] for line in str(error.value).splitlines()] == ["sample.nice", "label.slots"]


def test_interface_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    site = parse_site(on_slurm() | {"address": "interface:none0"})
    with (
        pytest.raises(SettingsError, match=r"address = 'interface:none0': .*interfaces here: .*\blo\b"),
        ParslPools(site, tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())
