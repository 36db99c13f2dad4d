"""A model as an outline: one line for each module, modules that are alike in one line, what has run, where a run is paused.

Outline(Seen(model))                    # what `print(model)` shows
Outline(Seen(model, states, shapes))    # of a run: "ran", "running" or "paused", and the last shapes, by identity
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from .shown import LOOKS, Column, Grid, Line, Part, Shown, plain, styled

if TYPE_CHECKING:
    from rich.text import Text

MARKS: Final = {"ran": "✓ ", "running": "… ", "paused": "▶ ", "": "  "}
IN_A_NOTEBOOK: Final = MARKS | {"paused": "● "}  # a triangle is what folds and unfolds there

MANY: Final = 40
"""How many lines are shown in a notebook before those deep in the model are folded away."""


class Row(NamedTuple):
    """One line of an outline; several modules that are alike are one line."""

    depth: int
    name: str
    kind: str
    state: str
    shape: str


class Seen:
    """A model and what is known of its modules, by their identity."""

    def __init__(
        self,
        root: torch.nn.Module,
        states: Mapping[int, str] | None = None,
        shapes: Mapping[int, str] | None = None,
        other_name: Callable[[str], str] = str,
    ) -> None:
        """`other_name` gives the path as it is written of one in the model's own names."""
        self._root = root
        self._states = states or {}
        self._shapes = shapes or {}
        self._other_name = other_name
        self._looks: dict[int, int] = {}
        self._known: dict[object, int] = {}
        self._on_the_way: set[int] = set()

    def rows(self, at: str = "", brief: bool = False) -> list[Row]:
        """The modules at and below a path; `brief` opens only those in which the run is, and leaves their options away."""
        self._look(self._root)
        return [*self._below(self._root.get_submodule(at), at, 0, brief)]

    def _below(self, module: torch.nn.Module, path: str, depth: int, brief: bool) -> Iterator[Row]:
        yield Row(depth, self._name(path), self._kind(module, brief), self._state(module), self._shapes.get(id(module), ""))
        if brief and id(module) not in self._on_the_way:
            return
        children = [(name, child) for name, child in module._modules.items() if child is not None]
        opened = any(id(child) in self._on_the_way for _, child in children)
        while children:
            (first, child), alike = children[0], self._alike(children)
            if alike > 1:
                numbers, kind = f"{first} … {children[alike - 1][0]}", f"{alike} x {self._kind(child, brief)}"
                yield Row(depth + 1, numbers, kind, self._state(child), self._shapes.get(id(child), ""))
                if not opened and not brief:  # what is in them is told once
                    yield from [*self._below(child, f"{path}.{first}".lstrip("."), depth + 1, brief)][1:]
                    opened = True
            else:
                yield from self._below(child, f"{path}.{first}".lstrip("."), depth + 1, brief)
            children = children[alike:]

    def _alike(self, children: Sequence[tuple[str, torch.nn.Module]]) -> int:
        """How many modules from the first one on are shown in one line: numbered ones that look the same."""
        _, first = children[0]
        if id(first) in self._on_the_way:
            return 1
        like_first = (name.isdigit() and self._look(child) == self._look(first) for name, child in children)
        return max(1, sum(takewhile(bool, like_first)))

    def _look(self, module: torch.nn.Module) -> int:
        """A number that two modules have in common when they are of one kind, in them is the same, and the same has run."""
        known = self._looks.get(id(module))
        if known is None:
            below = [(name, child) for name, child in module._modules.items() if child is not None]
            looks = tuple((name, self._look(child)) for name, child in below)
            state = self._states.get(id(module), "")
            if state in ("paused", "running") or any(id(child) in self._on_the_way for _, child in below):
                self._on_the_way.add(id(module))
            known = self._known.setdefault((type(module), self._options(module), state, looks), len(self._known))
            self._looks[id(module)] = known
        return known

    def _state(self, module: torch.nn.Module) -> str:
        """Whether it has run; of a list of modules, which is never called, whether they have."""
        own = self._states.get(id(module), "")
        called = inspect.getattr_static(type(module), "forward", None) is not torch.nn.Module.forward
        below = set() if own or called else {self._state(child) for _, child in module._modules.items() if child is not None}
        if not below:
            return own
        return "ran" if below == {"ran"} else "running" if below & {"ran", "running", "paused"} else ""

    def _name(self, path: str) -> str:
        """The name as it is written, and the model's own where that is another."""
        name, other = (each.rpartition(".")[2] or "model" for each in (path, self._other_name(path)))
        return name if name == other else f"{other} ({name})"

    def _kind(self, module: torch.nn.Module, brief: bool) -> str:
        """The class, and with it what torch shows of a module that has no other in it."""
        options = "" if brief or module._modules else self._options(module)
        return f"{type(module).__name__}({options})" if options else type(module).__name__

    @staticmethod
    def _options(module: torch.nn.Module) -> str:
        try:
            return str(module.extra_repr())
        except Exception:  # somebody else's code, which must not hide all other modules
            return "…"


class Outline(Shown):
    """A module and what is in it: `print(model)`; of a run held by hand, with what has run and where it is paused."""

    def __init__(self, rows: Callable[[], Sequence[Row]], notes: Callable[[], Sequence[str]] = list) -> None:
        """Both are looked up when they are shown; the notes come below."""
        self._rows = rows
        self._notes = notes

    def _parts(self) -> Iterator[Part]:
        yield Branches(self._rows())
        notes = self._notes()
        if notes:
            yield from (Line("with"), *(Line(f"  {each}") for each in notes))


class Branches(NamedTuple):
    """Rows as a tree."""

    rows: Sequence[Row]

    def lines(self, width: int) -> "Iterator[Text]":
        """One line each, what is said of the modules below each other."""
        columns = Column("module"), Column("type", least=12, look="type"), Column("shape", least=19, look="dim")
        return Grid(columns, [*self._texts()], headed=False).lines(width)

    def _texts(self) -> Iterator[tuple[str, ...]]:
        for row, guides in zip(self.rows, self._guides(), strict=True):
            name = f"{guides}{self._mark(row, MARKS)}{row.name}"
            yield name, row.kind, row.shape, "paused" if row.state == "paused" else ""

    def _guides(self) -> Iterator[str]:
        """The lines that lead to each row, from the one above it and past it to those below."""
        more = [False] * (2 + max(row.depth for row in self.rows))  # whether the branch of that depth goes on below
        found = []
        for row in reversed(self.rows):
            above = "".join("│   " if each else "    " for each in more[1 : row.depth])
            found.append(above + ("├── " if more[row.depth] else "└── ") * bool(row.depth))
            more[row.depth :] = [True, *[False] * (len(more) - row.depth - 1)]
        return reversed(found)

    def html(self) -> str:
        """The tree with its branches folded where there are many, but for those that lead to the paused place."""
        widths = (
            max(2 * row.depth + len(plain(row.name)) for row in self.rows) + 4,
            min(44 if any(row.shape for row in self.rows) else 80, max(len(plain(row.kind)) for row in self.rows)) + 2,
        )
        return "".join(self._html(0, len(self.rows), widths))

    def _html(self, start: int, end: int, widths: tuple[int, int]) -> Iterator[str]:
        """The rows from `start` to `end`, those below others in them."""
        while start < end:
            row = self.rows[start]
            below = next((n for n in range(start + 1, end) if self.rows[n].depth <= row.depth), end)
            line, style = self._line(row, widths), f"margin-left:2ch;{LOOKS['paused'][1] if row.state == 'paused' else ''}"
            if below == start + 1:
                yield f'<div style="{style}">{line}</div>'
            else:
                leads_there = any(each.state == "paused" for each in self.rows[start + 1 : below])
                opened = " open" if leads_there or row.depth < 2 or len(self.rows) <= MANY else ""
                folds = f"display:list-item;list-style-position:outside;cursor:pointer;{style}"
                inside = "".join(self._html(start + 1, below, widths))
                yield f'<details{opened}><summary style="{folds}">{line}</summary>'
                yield f'<div style="margin-left:2ch">{inside}</div></details>'
            start = below

    def _mark(self, row: Row, marks: Mapping[str, str]) -> str:
        """What stands before the name; nothing where no module has run."""
        return marks[row.state] if any(each.state for each in self.rows) else ""

    def _line(self, row: Row, widths: tuple[int, int]) -> str:
        cut = "display:inline-block;vertical-align:bottom;white-space:pre;overflow:hidden;text-overflow:ellipsis"
        state = "" if row.state == "paused" else row.state
        return (
            '<span style="white-space:nowrap">'
            + styled(f"{self._mark(row, IN_A_NOTEBOOK)}{row.name}", state, f"{cut};width:{widths[0] - 2 * row.depth}ch")
            + styled(row.kind, "type", f"{cut};width:{widths[1]}ch")
            + styled(row.shape, "dim", "white-space:pre")
            + "</span>"
        )
