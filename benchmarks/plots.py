"""The tables as a picture: bars of what a way adds, or lines of how it grows."""

from pathlib import Path
from typing import Any

from report import Table

COLOURS = {"plain hooks": "#8c8c8c", "nnsight_eager": "#1f77b4", "nnsight": "#d62728"}


def plot(tables: list[Table], path: Path) -> None:
    """Write one picture with a panel for each table; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No picture is drawn: matplotlib is not installed (pip install -e '.[bench]').")
        return
    figure = Figure(
        figsize=(8, 1 + sum(3 if table.axis else 0.6 + 0.3 * len(table.rows) for table in tables)), layout="constrained"
    )
    heights = [3 if table.axis else 0.6 + 0.3 * len(table.rows) for table in tables]
    panels = figure.subplots(len(tables), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for table, panel in zip(tables, panels, strict=True):
        panel.set_title(table.title, fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        (_lines if table.axis else _bars)(table, panel)
    figure.savefig(path, dpi=120)


def _bars(table: Table, panel: Any) -> None:
    """How long each way takes, as a part of the baseline."""
    rows = table.rows[::-1]
    panel.barh([row.way for row in rows], [row.ratio for row in rows], color=[_colour(row.way) for row in rows])
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_xlabel(f"time, {table.rows[0].way} = 1", fontsize=8)


def _lines(table: Table, panel: Any) -> None:
    """What each way adds, over the axis."""
    for way in table.ways[1:]:
        rows = [row for row in table.rows if row.way == way]
        panel.plot(
            [row.at for row in rows], [1e3 * max(row.added, 1e-7) for row in rows], marker=".", label=way, color=_colour(way)
        )
    panel.set(xscale="log", yscale="log")
    panel.set_xlabel(table.axis, fontsize=8)
    panel.set_ylabel("added, ms", fontsize=8)
    panel.legend(fontsize=7)


def _colour(way: str) -> str | None:
    """Ours and the two everybody knows have a colour of their own."""
    return COLOURS.get(way, "#6baed6" if way.startswith("nnsight_eager") else "#c7a17a")
