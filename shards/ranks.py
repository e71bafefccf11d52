"""On which nodes may a task start MPI ranks, and which words start them there?"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory

__all__ = ["MPI_FOLDER", "NODES", "launch_words", "mpi_folder", "own_nodes", "spans_nodes", "spread"]

NODES = "SMELT_NODES"  # environment variable: nodes on which the workers of one manager start ranks, between blanks
# Environment variable: where Open MPI keeps what an mpirun needs. By default all of a user on a host share a folder,
# which one that ends removes while others start: each has to be given its own, by a short path (of sockets).
MPI_FOLDER = "OMPI_MCA_orte_tmpdir_base"
ACROSS = ("{hosts}", "{nodelist}", "{nodes}")


def mpi_folder() -> TemporaryDirectory[str]:
    """Make a folder to name in MPI_FOLDER; it is there as long as the context."""
    return TemporaryDirectory(prefix="smelt-", dir="/tmp")


def spans_nodes(launcher: tuple[str, ...]) -> bool:
    """May these words start ranks on other nodes than this one?"""
    return launcher[:1] == ("srun",) or any(place in word for word in launcher for place in ACROSS)


def launch_words(launcher: Sequence[str], ranks: int, environment: Mapping[str, str]) -> list[str]:
    """Return the words that start ranks on the task's own nodes.

    launcher: in its words {ranks} stands for their number, {hosts} for the nodes with the ranks of each, such as
    n1:2,n2:2, {nodelist} for the nodes alone, such as n1,n2, and {nodes} for their number.
    """
    nodes = own_nodes(environment) if spans_nodes(tuple(launcher)) else []
    names = {"ranks": ranks, "hosts": spread(ranks, nodes), "nodelist": ",".join(nodes), "nodes": len(nodes)}
    return [word.format(**names) for word in launcher]


def own_nodes(environment: Mapping[str, str]) -> list[str]:
    """Return the nodes on which a task may start ranks.

    A worker's: its equal part of those that NODES names, which it shares with the other workers beside it; only its
    own node when there is no NODES. By hand: those of the Slurm job. This host outside of one.
    """
    worker = int(environment.get("PARSL_WORKER_RANK", 0))
    n_workers = int(environment.get("PARSL_WORKER_COUNT", 1))
    if nodes := environment.get(NODES, "").split():
        first = worker * len(nodes) // n_workers
        return nodes[first : max(first + 1, (worker + 1) * len(nodes) // n_workers)]
    if "PARSL_WORKER_RANK" in environment or "SLURM_JOB_NODELIST" not in environment:
        return [environment.get("SLURMD_NODENAME", "localhost")]
    # Only Slurm itself knows all forms of node[1-3,7].
    command = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
    return subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=True).stdout.split()


def spread(ranks: int, nodes: Sequence[str]) -> str:
    """Return how many ranks go on which node, as mpirun --host wants it: evenly, the first nodes having one more."""
    if not nodes:
        return ""
    each, more = divmod(ranks, len(nodes))
    numbers = [each + (number < more) for number in range(len(nodes))]
    return ",".join(f"{node}:{number}" for node, number in zip(nodes, numbers, strict=True) if number)
