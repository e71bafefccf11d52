"""What does the scheduler of this machine have, and which site file is a first guess for it?"""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from campaign.reference import document
from campaign.scheduler import SchedulerError, ask
from campaign.site import LabelPool, Pool, Site, Slurm, TrainPool, parse_site
from shards.settings import SettingsError

__all__ = ["NodeKind", "guess_site", "survey", "write_site"]

LONG_MIN, SHORT_MIN = 720, 240  # wanted for labels; for walkers and trainings
CORES_PER_WALKER, CORES_PER_LABEL = 16, 8
MOST_BLOCKS = 4
SRUN = ("srun", "--ntasks={ranks}", "--mpi=pmix")
MPIRUN = ("mpirun", "-np", "{ranks}", "--host", "{hosts}", "--oversubscribe", "--bind-to", "none")


@dataclass(frozen=True)
class NodeKind:
    """Nodes of a partition that are alike."""

    partition: str
    is_default: bool
    n_nodes: int
    cores: int
    memory_MB: int
    gpus: int
    limit_min: int  # longest job; 0: as long as one likes
    features: str

    def __str__(self) -> str:
        limit = f"up to {self.limit_min / 60:g} h" if self.limit_min else "for any time"
        return (
            f"{self.partition}{' (default)' if self.is_default else ''}: {self.n_nodes} nodes of {self.cores} cores,"
            f" {self.memory_MB / 1000:.0f} GB, {self.gpus or 'no'} GPUs, {limit}"
            + (f", features {self.features}" if self.features else "")
        )


def write_site(dest: Path) -> list[str]:
    """Ask the scheduler what it has and write a site file; returns what was found, line by line.

    Raises:
        SettingsError: `dest` is there already.
        SchedulerError: no Slurm here, or no answer.
    """
    if dest.exists():
        raise SettingsError(f"{dest}: is there already; name another file")
    kinds = survey()
    if not kinds:
        raise SchedulerError("sinfo: there is no partition that is up")
    loaded = os.environ.get("LOADEDMODULES", "").split(":")
    modules = " ".join(filter(None, loaded))
    site = guess_site(
        kinds,
        name=f"{_configured('ClusterName') or 'Slurm'} cluster",
        address=_address(),
        modules=modules,
        has_pmix="pmix" in ask("srun", "--mpi=list"),
    )
    found = [f"partition {kind}" for kind in kinds] + [f"account {account}" for account in _accounts()]
    header = [
        f"A first guess, made by `smelt site` on {socket.gethostname()} from what Slurm said. To be checked: partition",
        "and account of each stage, environment (module load ...), how many nodes, and walltime; then",
        f"`smelt doctor --site {dest}`. cpu.toml, nvidia.toml and amd.toml of configs/sites are examples with reasons.",
        *(["Found:"] if found else []),
        *(f"  {line}" for line in found),
    ]
    dest.write_text(document("\n".join(header), site), encoding="utf-8")
    return found


def survey() -> list[NodeKind]:
    """All partitions that are up. Raises SchedulerError."""
    rows = ask("sinfo", "--noheader", "--exact", "--format=%P|%a|%D|%c|%m|%G|%l|%f").splitlines()
    return [_kind(*row.split("|")) for row in rows if row.split("|")[1] == "up"]


def _kind(partition: str, up: str, n: str, cores: str, memory: str, gres: str, limit: str, features: str) -> NodeKind:
    return NodeKind(
        partition=partition.rstrip("*"),
        is_default=partition.endswith("*"),
        n_nodes=int(n),
        cores=int(cores.rstrip("+")),
        memory_MB=int(memory.rstrip("+")),
        # gpu:4, gpu:a100:4(S:0-1), gpu:a:2,gpu:b:2
        gpus=sum(int(number) for number in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres)),
        limit_min=_minutes(limit),
        features="" if features == "(null)" else features,
    )


def _minutes(limit: str) -> int:
    """Of Slurm's [days-]hours:minutes:seconds, or minutes:seconds; 0 for infinite."""
    days, _, clock = limit.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts):
        return 0
    hours, minutes, _ = [0] * (3 - len(parts)) + [int(part) for part in parts]
    return 1440 * int(days or 0) + 60 * hours + minutes


def guess_site(kinds: Sequence[NodeKind], *, name: str, address: str, modules: str, has_pmix: bool) -> Site:
    """A site with walkers on GPUs where there are some, labels on up to four nodes, trainings on two."""
    plain = max(kinds, key=lambda kind: (kind.gpus == 0, kind.is_default, kind.n_nodes))
    fast = max(kinds, key=lambda kind: (kind.gpus > 0, kind.is_default, kind.n_nodes))
    fast = fast if fast.gpus else plain
    n_walkers = fast.gpus or max(1, fast.cores // CORES_PER_WALKER)
    n_labels = max(1, plain.cores // CORES_PER_LABEL)
    n_blocks = min(MOST_BLOCKS, plain.n_nodes)
    n_ranked = min(2, plain.n_nodes)
    site = Site(
        name=name,
        environment=(f"module load {modules}",) if modules else (),
        address=address,
        sample=Pool(
            slots=n_walkers,
            cores=max(1, fast.cores // n_walkers),
            slurm=Slurm(partition=fast.partition, walltime_min=_walltime(fast, SHORT_MIN), gpus_per_node=fast.gpus),
        ),
        label=LabelPool(
            slots=n_labels * n_blocks,
            slurm=Slurm(partition=plain.partition, walltime_min=_walltime(plain, LONG_MIN), max_blocks=n_blocks),
        ),
        train=TrainPool(
            launcher=SRUN if has_pmix else MPIRUN,
            slurm=Slurm(
                partition=plain.partition,
                walltime_min=_walltime(plain, SHORT_MIN),
                nodes_per_block=n_ranked,
                workers="block",
            ),
        ),
    )
    return parse_site(site.model_dump(mode="json", exclude_none=True))  # finds contradictions


def _walltime(kind: NodeKind, wanted_min: int) -> int:
    return min(wanted_min, kind.limit_min or wanted_min)


def _configured(name: str) -> str:
    found = re.search(rf"^{re.escape(name)}\s*=\s*(\S+)", ask("scontrol", "show", "config"), re.MULTILINE)
    return found[1] if found else ""


def _accounts() -> list[str]:
    """Of this user; none where Slurm keeps no accounts."""
    try:
        rows = ask("sacctmgr", "-nP", "show", "associations", f"user={getpass.getuser()}", "format=account,qos")
    except SchedulerError:
        return []
    return [f"{account}, qos {qos}" if qos else account for account, _, qos in (r.partition("|") for r in rows.split())]


def _address() -> str:
    """Where nodes reach this host: by the network on which it reaches the controller."""
    controller = _configured("SlurmctldHost[0]")
    host = controller.partition("(")[2].rstrip(")") or controller
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return socket.gethostname()
        address = str(probe.getsockname()[0])
    for interface, addresses in psutil.net_if_addrs().items():
        if interface != "lo" and any(entry.address == address for entry in addresses):
            return f"interface:{interface}"
    return address
