"""How does a training survive being killed? Its whole state in one file, replaced at once; no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shards.files import write_atomically

__all__ = ["read_checkpoint", "write_checkpoint"]


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
