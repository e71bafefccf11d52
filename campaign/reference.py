"""What do configuration files look like that name every field with its meaning and its default?

The text is made from the settings classes, so that it cannot say anything else than they do.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from campaign.config import CampaignConfig
from campaign.site import LabelPool, Pool, Site, Slurm, TrainPool
from shards.settings import Settings

__all__ = ["CONFIGS", "document", "reference_files"]

WIDTH = 118
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CONFIG_HEADER = """\
Every field of a campaign's configuration: its meaning, its unit, how to choose it, and its default.

A configuration of your own needs only campaign.name, campaign.elements and what differs from here.
This file is made from the settings' own documentation: python -m campaign.reference"""
SITE_HEADER = """\
One machine without a batch system, such as a laptop: what a campaign uses when no site is named.
A site file of your own needs only what differs from here. Every field is named, with its default.

This file is made from the settings' own documentation: python -m campaign.reference"""
SLURM_HEADER = """\
A Slurm machine: every field of a pool that gets its nodes from Slurm, with its default. cpu.toml, nvidia.toml and
amd.toml beside this file are examples to start from.

This file is made from the settings' own documentation: python -m campaign.reference"""
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def reference_files() -> dict[Path, str]:
    """Path below configs/ -> text."""
    # The fields that have no default.
    config = CampaignConfig.model_validate_json('{"campaign": {"name": "reference", "elements": ["Al"]}}')
    return {
        Path("reference.toml"): document(CONFIG_HEADER, config),
        Path("sites", "local.toml"): document(SITE_HEADER, Site(name="this machine")),
        Path("sites", "slurm.toml"): document(SLURM_HEADER, _on_slurm()),
    }


def _on_slurm() -> Site:
    return Site(
        name="a Slurm machine",
        address="interface:ib0",
        sample=Pool(slurm=Slurm()),
        label=LabelPool(slurm=Slurm()),
        train=TrainPool(slurm=Slurm()),
    )


def document(header: str, settings: Settings) -> str:
    """The TOML text of settings, with the meaning of every field."""
    return "\n".join([*_comment(header), *_tables("", type(settings), settings)]) + "\n"


def _tables(path: str, kind: type[Settings], value: Settings) -> Iterator[str]:
    """The lines of one table: its plain fields, then the tables in it, as TOML wants them."""
    inner = []
    for name, field in kind.model_fields.items():
        content = getattr(value, name)
        if content is None:
            continue
        if _is_table(content):
            inner.append((f"{path}.{name}".lstrip("."), field, content))
            continue
        yield ""
        yield from _comment(_documentation(field))
        yield f"{name} = {_toml(content)}{_allowed(field)}"
    for where, field, content in inner:
        yield from _table(where, field, content)


def _table(path: str, field: FieldInfo, content: Any) -> Iterator[str]:
    yield from ("", "")
    yield from _comment(_documentation(field))
    if isinstance(content, Settings):
        yield f"[{path}]"
        yield from _tables(path, type(content), content)
        return
    for number, row in enumerate(content):
        if number > 0:
            yield ""
        yield f"[[{path}]]"
        if number == 0:
            yield from _tables(path, type(row), row)
        else:
            yield from (f"{name} = {_toml(getattr(row, name))}" for name in type(row).model_fields)


def _is_table(content: Any) -> bool:
    return isinstance(content, Settings) or (
        isinstance(content, tuple) and bool(content) and isinstance(content[0], Settings)
    )


def _documentation(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _allowed(field: FieldInfo) -> str:
    """What the field's type alone does not say, as a comment behind its value."""
    if get_origin(field.annotation) is Literal:
        return "  # " + " | ".join(_toml(choice) for choice in get_args(field.annotation))
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in SIGNS.items()
        if hasattr(rule, name)
    ]
    return f"  # {', '.join(bounds)}" if bounds else ""


def _comment(text: str) -> list[str]:
    return [
        f"# {line}".rstrip()
        for paragraph in text.split("\n")
        for line in textwrap.wrap(paragraph, WIDTH, break_on_hyphens=False) or [""]
    ]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{name} = {_toml(item)}' for name, item in value.items())} }}" if value else "{}"
    return repr(value)


if __name__ == "__main__":
    for name, text in reference_files().items():
        (CONFIGS / name).write_text(text, encoding="utf-8")
