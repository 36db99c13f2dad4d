"""What was measured, as tables: in markdown, and as JSON to be shown again.

table = Table("Every layer's output", "", 100, [Row("bare", 5e-5, 5e-5, 9e-5, None, None)])
print(table.markdown())
"""

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from timing import Memory

PACKAGES = ("torch", "transformers", "greenlet", "nnsight", "transformer-lens", "pyvene", "torchlens")


@dataclass(frozen=True, slots=True)
class Row:
    """One way: its median in seconds, and the medians of the baselines that were measured in the same process."""

    way: str
    seconds: float
    baseline: float
    hooks: float | None
    memory: Memory | None
    baseline_memory: Memory | None
    at: int | None = None

    @property
    def added(self) -> float:
        """Seconds over the baseline."""
        return self.seconds - self.baseline

    @property
    def ratio(self) -> float:
        """The time of the baseline that it takes."""
        return self.seconds / self.baseline

    @property
    def of_hooks(self) -> float | None:
        """The time that plain hooks add that it adds."""
        return self.added / (self.hooks - self.baseline) if self.hooks and self.hooks != self.baseline else None

    @property
    def of_needed(self) -> float | None:
        """Its peak of memory as a part of what has to be there: the baseline's peak, and what its answer keeps."""
        if self.memory is None or self.baseline_memory is None or not self.baseline_memory.peak:
            return None
        return self.memory.peak / (self.baseline_memory.peak + self.memory.kept)


@dataclass(frozen=True, slots=True)
class Table:
    """The ways of one case; in a series, of each place `at` on the axis."""

    title: str
    axis: str
    rounds: int
    rows: list[Row]

    @property
    def ways(self) -> list[str]:
        """The names of the ways."""
        return list(dict.fromkeys(row.way for row in self.rows))

    def row(self, way: str, at: int | None = None) -> Row | None:
        """What was measured of a way."""
        return next((row for row in self.rows if row.way == way and row.at == at), None)

    def markdown(self) -> str:
        """The table for a reader."""
        return f"{self.title}, {self.rounds} rounds\n\n" + (self._series() if self.axis else self._single())

    def _single(self) -> str:
        baseline = self.rows[0].way
        lines = [["way", "median", f"of {baseline}", "added", "of what hooks add", "peak memory, of needed"]]
        for row in self.rows:
            lines.append([
                row.way, duration(row.seconds), f"{row.ratio:.3f}", duration(row.added),
                "" if row.of_hooks is None or row.way == baseline else f"{row.of_hooks:.2f}",
                "" if row.of_needed is None or row.way == baseline else f"{row.of_needed:.3f}",
            ])  # fmt: skip
        return markdown(lines)

    def _series(self) -> str:
        baseline, *others = self.ways
        lines = [[self.axis, baseline, *(f"{way}, added" for way in others)]]
        for at in dict.fromkeys(row.at for row in self.rows):
            first, rows = self.row(baseline, at), [self.row(way, at) for way in others]
            cells = ["" if row is None else duration(row.added) for row in rows]
            lines.append([f"{at:,}", "" if first is None else duration(first.seconds), *cells])
        return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """Lines of cells as a table whose first line is its head."""
    head, *body = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *body))


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= size or unit == "µs":
            amount = seconds / size
            return f"{amount:.{0 if abs(amount) >= 100 else 1 if abs(amount) >= 10 or unit != 's' else 2}f} {unit}"
    raise AssertionError


def header() -> str:
    """The machine and the versions, in one line."""
    packages = ", ".join(map(installed, PACKAGES))
    return f"{platform.machine()}, Python {platform.python_version()}, 1 thread, time of the processor; {packages}"


def installed(name: str) -> str:
    """The version of a package, or that it is missing."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def merged(tables: list[Table], others: list[Table]) -> list[Table]:
    """The tables with what another process has measured of its peer; its baselines stay in its own rows."""
    found = []
    for table in tables:
        known = {(row.way, row.at) for row in table.rows}
        same = [other for other in others if other.title == table.title]
        more = [row for other in same for row in other.rows if (row.way, row.at) not in known]
        found.append(Table(table.title, table.axis, table.rounds, [*table.rows, *more]))
    return found


def in_series(tables: list[Table]) -> list[Table]:
    """The tables with those of one title as one."""
    titles: dict[str, list[Table]] = {}
    for table in tables:
        titles.setdefault(table.title, []).append(table)
    return [
        Table(title, each[0].axis, each[0].rounds, [row for table in each for row in table.rows])
        for title, each in titles.items()
    ]


def write(path: Path, tables: list[Table]) -> None:
    """Keep the tables, with the machine they are of, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": header(), "tables": [asdict(table) for table in tables]}, indent=1) + "\n")


def read(path: Path) -> list[Table]:
    """What `write` has written."""
    found = []
    for table in json.loads(path.read_text())["tables"]:
        rows = [
            Row(**row | {name: row[name] and Memory(*row[name]) for name in ("memory", "baseline_memory")})
            for row in table.pop("rows")
        ]
        found.append(Table(**table, rows=rows))
    return found
