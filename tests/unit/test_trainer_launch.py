"""Do ranks come to the nodes that they are meant for?"""

from __future__ import annotations

import pytest

from trainer.launch import spread


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
