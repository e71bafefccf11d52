"""How are rows shown? One table, and last how many reach their bars and which do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Row

__all__ = ["show"]

WIDTH = 190


def show(rows: Sequence[Row], out: TextIO, title: str = "") -> None:
    table = Table(title=title, title_justify="left", header_style="bold")
    for column, justify in (
        ("work", "left"), ("measured", "right"), ("at least", "right"), ("aim", "right"), ("", "left"),
        ("ours", "right"), ("peer", "right"), ("roofline", "right"), ("agreement", "left"),
    ):  # fmt: skip
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(
            row.work,
            _value(row),
            _number(row.at_least, row.unit),
            _number(row.aim, row.unit),
            _verdict(row),
            row.ours,
            row.peer,
            "" if row.roofline is None else f"{100 * row.roofline:.0f} %",
            row.agreement,
        )
    console = Console(file=out, width=WIDTH)
    console.print(table)
    for line in _summary(rows):
        console.print(line, highlight=False)


def _value(row: Row) -> str:
    spread = "" if row.quartiles is None else " ({:.3g}-{:.3g})".format(*row.quartiles)
    return f"{_number(row.value, row.unit)}{spread}"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"


def _verdict(row: Row) -> str:
    if row.at_least is None:
        return ""
    if not row.reaches(row.at_least):
        return "[red]below[/red]"
    return "[green]aim[/green]" if row.reaches(row.aim) else "[yellow]met[/yellow]"


def _summary(rows: Sequence[Row]) -> list[str]:
    barred = [row for row in rows if row.at_least is not None]
    below = [row.work for row in barred if not row.reaches(row.at_least)]
    at_aim = sum(row.reaches(row.aim) for row in barred)
    lines = [f"{len(barred) - len(below)} of {len(barred)} rows are at or above 'at least', {at_aim} at their aim."]
    return lines + ([f"Not there yet: {'; '.join(below)}."] if below else [])
