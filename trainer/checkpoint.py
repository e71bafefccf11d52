"""How does a training survive being killed? Its whole state in one file, replaced at once; no pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

__all__ = ["read_checkpoint", "write_atomically", "write_checkpoint"]


def write_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Publish tensors and JSON values at `path`; floats come back bit by bit."""
    write_atomically(path, save(tensors, metadata={"state": json.dumps(state)}))


def read_checkpoint(path: Path, job: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return tensors and state; None when there is no checkpoint, or it is of another job than `job`.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state: dict[str, Any] = json.loads(file.metadata()["state"])
            tensors: dict[str, Tensor] = {name: torch.clone(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a checkpoint ({error}): delete it to train from the start") from error
    return (tensors, state) if state["job"] == job else None


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside, sync, rename: readers see the old file or the new one, whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
