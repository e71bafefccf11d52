"""Do ranks come to the nodes that they are meant for?"""

from __future__ import annotations

import pytest

from shards.ranks import launch_words, own_nodes, spread


@pytest.mark.parametrize(
    ("ranks", "nodes", "hosts"),
    [
        (4, ["n1", "n2"], "n1:2,n2:2"),
        (5, ["n1", "n2", "n3"], "n1:2,n2:2,n3:1"),
        (2, ["n1", "n2", "n3"], "n1:1,n2:1"),
        (3, ["localhost"], "localhost:3"),
    ],
)
def test_ranks_are_spread_evenly_and_nodes_without_any_left_out(ranks: int, nodes: list[str], hosts: str) -> None:
    assert spread(ranks, nodes) == hosts


def test_workers_beside_each_other_share_the_nodes_of_their_block() -> None:
    block = {"SMELT_NODES": "n1 n2 n3 n4 ", "PARSL_WORKER_COUNT": "2", "SLURM_JOB_NODELIST": "n[1-4]"}
    assert own_nodes(block | {"PARSL_WORKER_RANK": "0"}) == ["n1", "n2"]
    assert own_nodes(block | {"PARSL_WORKER_RANK": "1"}) == ["n3", "n4"]
    crowded = block | {"PARSL_WORKER_COUNT": "8"}
    assert [own_nodes(crowded | {"PARSL_WORKER_RANK": str(n)}) for n in (0, 1, 2, 7)] == [
        ["n1"],
        ["n1"],
        ["n2"],
        ["n4"],
    ]


def test_worker_of_a_single_node_stays_there() -> None:
    worker = {"PARSL_WORKER_RANK": "3", "PARSL_WORKER_COUNT": "4", "SLURM_JOB_NODELIST": "n[1-4]"}
    assert own_nodes(worker | {"SLURMD_NODENAME": "n2"}) == ["n2"]
    assert own_nodes({}) == ["localhost"]


def test_words_of_a_launcher_are_filled_in() -> None:
    launcher = ["srun", "-N{nodes}", "--nodelist={nodelist}", "-n{ranks}"]
    assert launch_words(launcher, 4, {"SMELT_NODES": "n1 n2"}) == ["srun", "-N2", "--nodelist=n1,n2", "-n4"]
    assert launch_words(["mpirun", "--host", "{hosts}"], 3, {"SMELT_NODES": "n1 n2"})[-1] == "n1:2,n2:1"
