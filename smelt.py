"""What do users import? `from smelt import load_committee`; each name is loaded when it is first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potential.committee import Committee as Committee
    from potential.model_file import load_committee as load_committee
    from shards import Frame as Frame
    from shards import Label as Label
    from shards import Level as Level
    from shards import Manifest as Manifest
    from shards import open_shard as open_shard
    from shards import write_frames as write_frames
    from shards import write_labels as write_labels
    from shards.convert import convert as convert
    from shards.convert import from_atoms as from_atoms
    from shards.convert import to_atoms as to_atoms

_HOMES = {
    "Committee": "potential.committee",
    "load_committee": "potential.model_file",
    "Frame": "shards",
    "Label": "shards",
    "Level": "shards",
    "Manifest": "shards",
    "open_shard": "shards",
    "write_frames": "shards",
    "write_labels": "shards",
    "convert": "shards.convert",
    "from_atoms": "shards.convert",
    "to_atoms": "shards.convert",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'smelt' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
