"""Does every stage work where a site puts it? One short task per pool, on the same way as those of a campaign."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.data import atomic_numbers, covalent_radii
from rich.console import Console

from campaign.config import CampaignConfig, parse_campaign
from campaign.doctor import PARTS, Finding, Part, PartError, findings, show
from campaign.site import Site
from campaign.tasks import labeler_there
from campaign.versions import versions
from labeler.config import LabelerSettings
from labeler.stage import label, level
from shards.atoms import from_atoms
from shards.ranks import own_nodes
from shards.reader import open_shard
from shards.writer import write_frames
from trainer.launch import run_ranks

__all__ = ["DEFAULT_CAMPAIGN", "check_site"]

# What is tried when no campaign is named: cheap DFT, two ranks.
DEFAULT_CAMPAIGN = parse_campaign(
    {
        "campaign": {"name": "doctor", "elements": ["Al"]},
        "labeler": {"gpaw": {"cutoff_eV": 150.0, "kpoint_spacing_per_A": 1.0}},
    }
)
RANKS_S = 300.0
TICK_S = 0.5
# In one write, so that lines of ranks do not mix.
SAY = "import socket, sys; sys.stdout.write(f'sum {int(total)} on {socket.gethostname()}\\n')"
HELLO = f"from mpi4py import MPI; total = MPI.COMM_WORLD.allreduce(1); {SAY}"
ALL_REDUCE = f"""
import horovod.torch as hvd, torch
hvd.init()
total = hvd.allreduce(torch.ones(1), op=hvd.Sum)
{SAY}
"""


def check_site(site: Site, config: CampaignConfig, console: Console) -> bool:
    """Print one line per check; whether all went well.

    Its files are in a folder of their own in the current one, which nodes must see as a run directory would be seen.

    Raises:
        SchedulerError, SettingsError: the pools of the site cannot be started at all.
    """
    # Here, because workers import this module, too.
    from campaign.pools import ParslPools

    folder = Path(tempfile.mkdtemp(prefix="smelt-doctor-", dir=Path.cwd()))
    with ParslPools(site, folder) as pools:
        futures = {pool: pools.submit(pool, examine, pool, site, config, versions(), folder) for pool in site.pools}
        said: dict[str, str] = {}
        verdicts = []
        while futures:
            time.sleep(TICK_S)
            for pool, reason in pools.waits().items():
                if reason and pool in futures and said.get(pool) != reason:
                    console.print(f"{'waits':8}{pool:8}{reason}", soft_wrap=True, highlight=False)
                    said[pool] = reason
            for pool in [pool for pool, future in futures.items() if future.done()]:
                verdicts += [show(finding, console, f"{pool:8}") for finding in _outcome(futures.pop(pool))]
    if all(verdicts):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        console.print(f"logs are in {folder}", soft_wrap=True)
    return all(verdicts)


def _outcome(future: Future[dict[str, Any]]) -> list[Finding]:
    if error := future.exception():
        return [Finding("worker", "BROKEN", " ".join(f"{type(error).__name__}: {error}".split()), False)]
    return [Finding(**row) for row in future.result()["findings"]]


def examine(
    pool: str, site: Site, config: CampaignConfig, driver: Mapping[str, str], folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """All checks of a pool, on one of its workers.

    driver: versions of the packages there. folder: where all nodes can write.
    """
    parts = [Part("worker", _worker), Part("versions", partial(_versions, driver)), _named("scratch")]
    slurm = site.pools[pool].slurm
    if pool == "sample":
        parts += [_named("torch"), _named("kernels")]
    if slurm and slurm.gpus_per_node:
        parts.append(Part("GPU", _gpu))
    if pool == "label":
        parts.append(
            Part(
                config.labeler.engine.rpartition(".")[2], partial(_engine, labeler_there(config, site), config, folder)
            )
        )
    if pool == "train":
        for name, program in (("MPI", HELLO), ("Horovod", ALL_REDUCE)):
            check = partial(_ranks, program, config.trainer.ranks, site.train.launcher, folder)
            parts.append(Part(name, check))
    return {"findings": [asdict(finding) for finding in findings(parts)]}


def _named(name: str) -> Part:
    return next(part for part in PARTS if part.name == name)


def _worker(scratch: Path) -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"on {socket.gethostname()}" + (f", job {job}" if job else "")


def _versions(driver: Mapping[str, str], scratch: Path) -> str:
    here = versions()
    different = [
        f"{name} {here.get(name, 'missing')} here, {v} there" for name, v in driver.items() if here.get(name) != v
    ]
    if different:
        raise PartError(f"not those of the driver: {'; '.join(different)}")
    return f"as the driver's: {', '.join(f'{name} {version}' for name, version in here.items())}"


def _gpu(scratch: Path) -> str:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
    if not torch.cuda.is_available():
        raise PartError(f"asked for, but torch {torch.__version__} sees none (CUDA_VISIBLE_DEVICES {visible})")
    total = float(torch.ones(1000, device="cuda").sum())
    return f"{torch.cuda.get_device_name(0)} adds up to {total:g} (CUDA_VISIBLE_DEVICES {visible})"


def _engine(labeler: LabelerSettings, config: CampaignConfig, folder: Path, scratch: Path) -> str:
    """Label a body-centred cell of two atoms of the first element, at the distance of two covalent radii."""
    elements = config.campaign.elements
    theory = level(labeler, elements)
    edge_A = 4 / 3**0.5 * covalent_radii[atomic_numbers[elements[0]]]
    atoms = Atoms([elements[0]] * 2, scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[edge_A] * 3, pbc=True)
    frames = write_frames(scratch / "frames.h5", [from_atoms(atoms)])
    outcome = label(Path(frames.path), [0], labeler, elements, scratch / "labels", folder / "scratch" / "doctor")
    failures = [failure["message"] for failure in outcome.facts.get("failures", {}).values()]
    if outcome.failure or failures:
        raise PartError(outcome.failure.message if outcome.failure else failures[0])
    result = open_shard(Path(outcome.receipts[0].path)).label(0)
    ranks = f" on {labeler.ranks} ranks" if labeler.ranks > 1 else ""
    steps = f", {result.scf_steps} SCF steps" if result.scf_steps else ""
    return (
        f"{theory.version}: {result.energy:.2f} eV for 2 atoms of {elements[0]} in {result.seconds:.1f} s{steps}{ranks}"
    )


def _ranks(program: str, ranks: int, launcher: tuple[str, ...], folder: Path, scratch: Path) -> str:
    """Start ranks as a training does, and see what each says."""
    shared = Path(tempfile.mkdtemp(prefix="ranks-", dir=folder))
    log = shared / "log"
    status = run_ranks(
        ["-c", program],
        ranks=ranks,
        launcher=launcher,
        nice=0,
        log=log,
        heartbeat=shared / "heartbeat",
        environment=os.environ,
        time_limit_s=RANKS_S,
    )
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line.split()[-1] for line in lines if line.startswith(f"sum {ranks} on ")]
    if status or len(said) != ranks:
        last = lines[-1] if lines else "they said nothing"
        raise PartError(f"{len(said)} of {ranks} ranks add up, exit status {status}: {last} (log: {log})")
    hosts, n_nodes = sorted(set(said)), len(own_nodes(os.environ))
    if len(hosts) < min(n_nodes, ranks):
        raise PartError(
            f"{ranks} ranks on {', '.join(hosts)} only, where there are {n_nodes} nodes: see train.launcher"
        )
    return f"{ranks} ranks on {', '.join(hosts)} add up"
