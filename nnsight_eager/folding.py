"""Rows of modules that differ in the number of a layer only, as one row.

folded([("h.0.mlp", "[1, 9, 768]"), ("h.1.mlp", "[1, 9, 768]"), ("h.2.mlp", "[1, 9, 768]")])
# [("h.0…2.mlp", "[1, 9, 768]")]
"""

from collections.abc import Iterable, Sequence

Row = tuple[str, ...]
"""A path, and what is said of the module there."""

Names = tuple[str, ...]
Split = Sequence[tuple[Names, Row]]
"""Rows whose path is taken apart."""


def folded(rows: Iterable[Row]) -> list[Row]:
    """The rows, where the first of those was that a row stands for; folded are numbers that follow one another."""
    split: Split = [(tuple(path.split(".")), tuple(said)) for path, *said in rows]
    for place in reversed(range(max((len(names) for names, _ in split), default=0))):
        split = _folded_at(place, split)
    return [(".".join(names), *said) for names, said in split]


class _Run:
    """Rows that differ in one number, which goes from `first` to `last`."""

    def __init__(self, number: int) -> None:
        self.first = self.last = number

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}…{self.last}"


def _folded_at(place: int, rows: Split) -> Split:
    """Fold the numbers that stand at one place of the paths."""
    found: list[tuple[Names, _Run | str, Names, Row]] = []
    latest: dict[tuple[Names, Names, Row], _Run] = {}
    for names, said in rows:
        before, name, behind = names[:place], "".join(names[place : place + 1]), names[place + 1 :]
        if not name.isdecimal():
            found.append((before, name, behind, said))
            continue
        run = latest.get((before, behind, said))
        if run is not None and run.last + 1 == int(name):
            run.last += 1
        else:
            run = latest[before, behind, said] = _Run(int(name))
            found.append((before, run, behind, said))
    return [((*before, *([str(name)] if str(name) else []), *behind), said) for before, name, behind, said in found]
