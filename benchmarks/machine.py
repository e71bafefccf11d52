"""What can one thread of this machine do? Measured in a process of its own, which leaves the allocator of others alone.

Run: python -m benchmarks.machine, which prints the rates as JSON.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import interleave, settle
from potential.kernels import library

__all__ = ["Machine", "describe"]

KNOWN = "SMELT_BENCH_MACHINE"  # rates that were measured before, as JSON


@dataclass(frozen=True)
class Machine:
    """float32 operations per s (in torch's matrix products), and bytes per s (read and written together, in copies)."""

    flops: float
    bytes: float

    @classmethod
    def measure(cls) -> Machine:
        known = os.environ.get(KNOWN)
        if not known:
            command = [sys.executable, "-m", "benchmarks.machine"]
            known = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return cls(**json.loads(known))

    def seconds(self, flops: float = 0.0, exponentials: float = 0.0, n_bytes: float = 0.0) -> float:
        """The least time that such work could take here; an exponential or logarithm counts as 20 operations."""
        return max((flops + 20 * exponentials) / self.flops, n_bytes / self.bytes)


def describe() -> dict[str, Any]:
    """Hardware and software that a result belongs to."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    flags = torch.backends.cpu.get_cpu_capability()
    if library.available():
        flags += f", kernels {library.LEVELS[library.level()]}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    cores = len(os.sched_getaffinity(0))
    return {"cpu": cpu, "instructions": flags, "cores": cores, "gpu": gpu, "python": platform.python_version(),
            "torch": torch.__version__, "system": platform.platform()}  # fmt: skip


def _rates() -> Machine:
    settle()
    a, b, product = (torch.randn(1024, 1024) for _ in range(3))
    source, target = torch.zeros(8_000_000), torch.ones(8_000_000)
    times = interleave({"flops": lambda: torch.mm(a, b, out=product), "bytes": lambda: target.copy_(source)})
    amounts = {"flops": 2 * 1024**3, "bytes": 2 * 4 * len(source)}
    return Machine(**{name: amount / min(times[name].rounds) for name, amount in amounts.items()})


if __name__ == "__main__":
    print(json.dumps(asdict(_rates())))
