"""How does a committee rest on disk? One safetensors file: weights as tensors, all else as JSON in its header."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from potential.aev import AEVParameters
from potential.committee import Committee

__all__ = ["FORMAT_VERSION", "ModelFileError", "load_committee", "read_metadata", "save_committee"]

FORMAT_VERSION = 1
SELF_ENERGIES = "self_energies"


class ModelFileError(ValueError):
    """A file that is not a committee of ours, or not all of it. The message begins with its path."""


def save_committee(committee: Committee, path: Path, metadata: dict[str, Any]) -> str:
    """Publish the committee at `path`, all at once, and return its digest (also set on the committee).

    metadata: JSON values to keep beside the weights, such as the digest of the level of theory and facts of the
    training. The parent folder must exist.
    """
    path = Path(path)
    tensors = {name: value.detach().cpu().contiguous() for name, value in committee.state_dict().items()}
    tensors[SELF_ENERGIES] = committee.self_energies.detach().cpu().contiguous()
    header = {
        "format_version": FORMAT_VERSION,
        "elements": committee.elements,
        "aev": asdict(committee.aev),
        "hidden": committee.hidden,
        "n_members": committee.n_members,
        "checksum": _checksum(tensors),
        "metadata": metadata,
    }
    content = safetensors.torch.save(tensors, metadata={"smelt": json.dumps(header)})
    _publish(content, path)
    committee.digest = _digest(content)
    return committee.digest


def load_committee(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Committee:
    """Read a committee, its parameters in `dtype`.

    Raises:
        ModelFileError: no such file, cut short, altered, of another format version, or not a committee.
    """
    path = Path(path)
    content = _read(path)
    header = _header(content, path)
    try:
        tensors = safetensors.torch.load(content)
        committee = Committee(header["elements"], _aev_parameters(header["aev"]), header["hidden"], header["n_members"])
        if _checksum(tensors) != header["checksum"]:
            raise ModelFileError(f"{path}: weights do not match their checksum: the file was altered")
        committee.self_energies = tensors.pop(SELF_ENERGIES)
        committee.to(torch.float64).load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ModelFileError(f"{path}: damaged model file: {' '.join(str(error).split())}") from error
    committee.digest = _digest(content)
    return committee.to(device=device, dtype=dtype)


def read_metadata(path: Path | str) -> dict[str, Any]:
    """What `save_committee` was given as metadata. Raises ModelFileError as load_committee does."""
    path = Path(path)
    metadata: dict[str, Any] = _header(_read(path), path)["metadata"]
    return metadata


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error


def _header(content: bytes, path: Path) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    try:
        table = json.loads(content[8 : 8 + length])
        header: dict[str, Any] = json.loads(table["__metadata__"]["smelt"])
        version = header["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path}: not a committee of smelt, or cut short") from error
    if version != FORMAT_VERSION:
        raise ModelFileError(f"{path}: format version {version}: this smelt reads version {FORMAT_VERSION}")
    return header


def _aev_parameters(table: dict[str, Any]) -> AEVParameters:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return AEVParameters(**values)


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _publish(content: bytes, path: Path) -> None:
    """Written beside, synced, renamed: whoever reads `path` sees all of it or none."""
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
