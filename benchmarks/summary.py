"""The tables of the README: what each piece of work costs beside the other tools, and what had to be reached.

print(summary({"overhead": read(folder / "overhead.json"), ...}))
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from report import Row, Table, duration, header, markdown

Found = Mapping[str, list[Table]]


class Bar(NamedTuple):
    """A bound on one way against another."""

    question: str
    work: str  # how the title of the table begins
    ours: str
    theirs: str
    most: float
    added: bool  # of added times, each over its own baseline, and not of whole times

    def reached(self, found: Found) -> Iterator[tuple[str, float]]:
        """The ratios that were measured, each way beside its own baseline."""
        for table in found.get(self.question, []):
            ours, theirs = table.row(self.ours), table.row(self.theirs)
            if table.title.startswith(self.work) and ours is not None and theirs is not None:
                yield table.title, ours.added / theirs.added if self.added else ours.ratio / theirs.ratio


BARS = (
    Bar("overhead", "Read 12 layers, an MLP", "nnsight_eager", "plain hooks", 0.8, True),
    Bar("overhead", "Read 12 layers, an MLP", "nnsight_eager", "nnsight", 0.2, True),
    Bar("overhead", "An empty trace, an MLP", "nnsight_eager", "nnsight", 0.15, True),
    Bar("overhead", "Wrapped and not traced", "nnsight_eager", "bare", 1.01, False),
    Bar("generation", "50 tokens of GPT-2", "nnsight_eager", "plain hooks", 1.01, False),
    Bar("cache", "Keep every module's output", "nnsight_eager", "transformer_lens", 1.0, False),
    Bar("patching", "", "nnsight_eager, a fork each", "plain hooks", 0.6, False),
    Bar("extraction", "", "nnsight_eager", "plain hooks", 1.02, False),
    Bar("startup", "Wrap a model of", "nnsight_eager", "nnsight", 0.1, False),
)


def summary(found: Found) -> str:
    """Both tables, below the machine and the versions."""
    return f"{header()}\n\n{costs(found)}\n\n{bars(found)}"


def costs(found: Found) -> str:
    """One line for each piece of work: the baseline, and what the others add to it."""
    lines = [["work", "baseline", "plain hooks", "nnsight_eager", "nnsight", "others"]]
    for table in (table for tables in found.values() for table in tables):
        at = table.rows[-1].at if table.axis else None  # of a series, the largest
        first = next(row for row in table.rows if row.at == at)
        rows = {row.way: row for row in table.rows if row.at == at}
        others = [way for way in rows if way not in ("plain hooks", "nnsight_eager", "nnsight", first.way)]
        title = f"{table.title} ({at:,} {table.axis})" if table.axis else table.title
        cells = [_cell(rows.get(way)) if way != first.way else "" for way in ("plain hooks", "nnsight_eager", "nnsight")]
        lines.append([title, duration(first.seconds), *cells, ", ".join(f"{way}: {_cell(rows[way])}" for way in others)])
    return markdown(lines)


def bars(found: Found) -> str:
    """What had to be reached, and what was."""
    lines = [["work", "against", "measured", "to be reached"]]
    for bar in BARS:
        for title, reached in bar.reached(found):
            lines.append([title, f"{bar.theirs}, {'added time' if bar.added else 'time'}", f"{reached:.3f}", f"≤ {bar.most}"])
    return markdown(lines)


def _cell(row: Row | None) -> str:
    """What is added, and the ratio of whole times."""
    return "" if row is None else f"{duration(row.added)} ({row.ratio:.2f} x)"
