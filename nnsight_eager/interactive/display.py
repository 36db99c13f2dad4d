"""What is shown of a held run: where it is paused, what has run, what is in the model's own frame, what was changed.

    run.where()          # the module, the source line, local tensors, the tree
    run.edits            # a receipt
    run.locals()

Nothing here touches a point or goes on with a run.
"""

import inspect
import linecache
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple

import torch

from ..changes import Change
from ..coroutine import OUR_FOLDER
from ..nested import first_tensor, tensors
from ..outline import Branches, Row
from ..paths import spelled
from ..shown import Column, Grid, Line, Part, Shown
from ..summaries import one_line
from ..tracebacks import passes_on
from ..visits import Visit
from .journal import Changed, value_at

AROUND: Final = 3
"""How many lines of source are shown above and below the one where the model is."""

NOTHING: Final = "changed nothing: every value is what it was"

HERE: Final = "▶"
"""What stands before the line where the model is."""


class Where(Shown):
    """Where a run is paused: `print(run.where())`."""

    def __init__(self, headline: str, visit: Visit | None, frame: FrameType | None, rows: Sequence[Row]) -> None:
        self._headline = headline
        self._value = "" if visit is None else one_line(shown_value(visit))
        self._source = _source_at(frame, visit)
        self._locals = Locals(frame)
        self._rows = rows

    def _parts(self) -> Iterator[Part]:
        yield Line(self._headline, "title")
        if self._value:
            yield Line(f"  {self._value}")
        if self._source:
            file, *lines = self._source
            yield from (Line(), Line(file, "type"))
            yield from (Line(line, "paused" if line.startswith(HERE) else "", cut=True) for line in lines)
        if len(self._locals):
            yield from (Line(), *self._locals._parts())
        yield from (Line(), Branches(self._rows))


def shown_value(visit: Visit) -> Any:
    """What stands for a visit in one line: the output, or the first argument."""
    value = value_at(visit)
    found = first_tensor(value)
    return value if found is None else found


def model_frame(visit: Visit | None) -> FrameType | None:
    """The innermost frame of the model's own code: neither this package's nor one that only passes a call on."""
    frame = None if visit is None or visit.forward is None else visit.forward.frame
    while frame is not None and (frame.f_code.co_filename.startswith(OUR_FOLDER) or passes_on(frame.f_code)):
        frame = frame.f_back
    return frame


def _source_at(frame: FrameType | None, visit: Visit | None) -> list[str]:
    """File and line, and the lines around it; of a model that is about to be entered, its forward."""
    if frame is not None:
        file, line, name = frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname
    else:
        function = None if visit is None else inspect.unwrap(type(visit.module).forward)
        code = getattr(function, "__code__", None)
        if code is None:
            return []
        file, line, name = code.co_filename, _line_of_def(code), code.co_qualname
    lines = [(number, linecache.getline(file, number)) for number in range(max(1, line - AROUND), line + AROUND + 1)]
    shown = [f"{HERE if number == line else ' '} {number:>5}  {text.rstrip()}" for number, text in lines if text]
    return [f"{_as_imported(file)}:{line} in {name}", *shown]


def _line_of_def(code: CodeType) -> int:
    """Where a function's `def` stands; its first line is that of its first decorator."""
    first = code.co_firstlineno
    inside = min((line for *_, line in code.co_lines() if line is not None and line > first), default=first)
    lines = ((number, linecache.getline(code.co_filename, number)) for number in range(first, inside))
    return next((number for number, line in lines if line.lstrip().startswith(("def ", "async def "))), first)


def _as_imported(file: str) -> str:
    """A file from where Python imports it: `transformers/models/llama/modeling_llama.py`."""
    folders = [folder for folder in sys.path if folder and file.startswith(f"{folder}/")]
    return file.removeprefix(max(folders, key=len) + "/") if folders else file


class Locals(Shown, Mapping[str, Any]):
    """The local names of the paused forward, to be read: `run.locals()["hidden_states"]`."""

    def __init__(self, frame: FrameType | None) -> None:
        self._values = {} if frame is None else dict(frame.f_locals)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def _parts(self) -> Iterator[Part]:
        # What is called `_` is what the model's code did not want either.
        named = {name: value for name, value in self._values.items() if name.strip("_")}
        rows = [(name, one_line(value)) for name, value in named.items() if not isinstance(value, torch.nn.Module)]
        if not rows:
            yield Line("no frame of the model is paused", "dim")
            return
        yield Grid([Column("local name", look="type"), Column("value", least=40, broken=True)], rows)


class Receipt(NamedTuple):
    """One change: `size` is the norm of the change relative to that of the value."""

    point: str
    step: int
    size: float
    before: str
    after: str
    warning: str

    @property
    def shown_size(self) -> str:
        """The size in a few digits; nothing where there is nothing to compare."""
        return "" if self.size == float("inf") else f"{self.size:.3g}"

    @property
    def form(self) -> str:
        """Shape and type, before and after where they differ."""
        return self.before if self.before == self.after else f"{self.before} → {self.after}"


class Edits(Shown, Sequence[Receipt]):
    """What was changed in a run: `run.edits`."""

    def __init__(self, receipts: Sequence[Receipt]) -> None:
        self._receipts = receipts

    def __getitem__(self, number: Any) -> Any:
        return self._receipts[number]

    def __len__(self) -> int:
        return len(self._receipts)

    def _parts(self) -> Iterator[Part]:
        if not self._receipts:
            yield Line("nothing has been changed", "dim")
            return
        columns = Column("point"), Column("step", right=True), Column("change", right=True), Column("value", least=19)
        yield Grid(columns, [(each.point, str(each.step), each.shown_size, each.form) for each in self._receipts])
        for each in self._receipts:
            if each.warning:
                yield Line(f"! {each.point}, step {each.step}: {each.warning}", "warning")


def receipt(changed: Changed, path: str, unread: bool) -> Receipt:
    """What is said of a change."""
    warning = ""
    if changed.nothing:
        warning = NOTHING
    elif unread:
        warning = "nothing that the model returned depends on it"
    point = spelled(path, "skip" if changed.skipped else changed.place.kind)
    return Receipt(point, changed.place.step, changed.size, changed.before, changed.after, warning)


def idle(each: Change) -> Receipt:
    """What is said of an assignment after which everything is as before."""
    return Receipt(each.point, each.step, 0.0, each.before, each.after, NOTHING)


def stale(path: str, kind: str, step: int, value: str) -> Receipt:
    """What is said of a tensor that was changed in place after the model had gone on from it."""
    warning = "changed after the model had gone on from it: what it has read already is not changed"
    return Receipt(spelled(path, kind), step, float("inf"), value, value, warning)


def reached(result: Any) -> set[Any]:
    """The nodes of the gradient's graph that a result depends on; empty where none was recorded."""
    nodes = {each.grad_fn for each in tensors(result) if each.grad_fn is not None}
    todo = [*nodes]
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None and node not in nodes:
                nodes.add(node)
                todo.append(node)
    return nodes
