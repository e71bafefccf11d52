"""Is what Slurm says of a machine understood, and made into a site that can be used?"""

from __future__ import annotations

from pathlib import Path

import pytest

from campaign.reference import document
from campaign.site import load_site
from campaign.survey import guess_site, survey

SINFO = """\
standard*|up|5860|256|229376+|(null)|1-00:00:00|cpu,rome
standard*|up|12|256|1031616|(null)|1-00:00:00|cpu,rome,highmem
gpu|up|28|64|515072|gpu:mi210:4(S:0-3)|12:30:00|(null)
mixed|up|2|128+|515072|gpu:a100:2,gpu:v100:2|infinite|(null)
short|up|4|64|1000|gpu:2|30:00|(null)
closed|drain|4|64|1000|(null)|30:00|(null)
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sinfo = tmp_path / "sinfo"
    sinfo.write_text(f"#!/bin/sh\ncat <<'END'\n{SINFO}END\n")
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_partitions_are_understood_in_all_ways_slurm_writes_them(machine: Path) -> None:
    kinds = survey()
    assert [(k.partition, k.is_default, k.n_nodes, k.cores, k.gpus, k.limit_min) for k in kinds] == [
        ("standard", True, 5860, 256, 0, 1440),
        ("standard", True, 12, 256, 0, 1440),
        ("gpu", False, 28, 64, 4, 750),
        ("mixed", False, 2, 128, 4, 0),
        ("short", False, 4, 64, 2, 30),
    ]
    assert (
        str(kinds[0]) == "standard (default): 5860 nodes of 256 cores, 229 GB, no GPUs, up to 24 h, features cpu,rome"
    )


@pytest.mark.parametrize("n_kinds", [1, 5])
def test_first_guess_can_be_used(machine: Path, n_kinds: int) -> None:
    site = guess_site(survey()[:n_kinds], name="a", address="interface:ib0", modules="gcc openmpi", has_pmix=False)
    (machine / "site.toml").write_text(document("header", site))
    assert load_site(machine / "site.toml") == site
    assert site.sample.slurm is not None
    assert site.label.slurm is not None
    assert (site.sample.slurm.partition, site.sample.slots) == (("gpu", 4) if n_kinds == 5 else ("standard", 16))
    assert (site.label.slurm.partition, site.label.slots, site.label.slurm.walltime_min) == ("standard", 128, 720)
    assert site.environment == ("module load gcc openmpi",)


def test_guess_respects_short_limits_and_few_nodes(machine: Path) -> None:
    site = guess_site(survey()[4:], name="a", address="here", modules="", has_pmix=True)
    assert {pool.slurm.walltime_min for pool in site.pools.values() if pool.slurm} == {30}
    assert site.train.launcher[0] == "srun"
