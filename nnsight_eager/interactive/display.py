"""What is shown of a held run: where it is paused, what has run, what is in the model's own frame, what was changed.

    run.where()          # the module, the source line, local tensors, the tree
    run.edits            # a receipt
    run.locals()

Nothing here touches a point or goes on with a run.
"""

import inspect
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple

import torch

from ..changes import Change
from ..coroutine import OUR_FOLDER
from ..nested import described, first_tensor, tensors
from ..paths import spelled
from ..shown import Shown
from ..visits import OUTPUT, Visit
from .journal import Changed, Journal, value_at

AROUND: Final = 3
"""How many lines of source are shown above and below the one where the model is."""

NOTHING: Final = "changed nothing: every value is what it was"

MARKS: Final = {"ran": "✓", "running": "…", "paused": "▶", "": " "}


def one_line(value: Any) -> str:
    """A value in one line: of a tensor its shape, type, device, mean ± deviation, range, what is not finite, gradient."""
    if not isinstance(value, torch.Tensor):
        return described(value) if isinstance(value, (tuple, list)) or first_tensor(value) is not None else _short(repr(value))
    words = [described(value), str(value.device)]
    if value.numel() and value.device.type != "meta" and not _is_fake(value):
        words += _statistics(value.detach())
    if value.requires_grad:
        words.append("grad" if value.is_leaf else f"grad: {type(value.grad_fn).__name__}")
    return "  ".join(words)


def _statistics(value: torch.Tensor) -> list[str]:
    """What the values of a tensor are like; of the finite ones, where some are not."""
    if value.dtype == torch.bool:
        return [f"{int(value.sum()):,} of {value.numel():,} true"]
    if value.is_complex():
        value = value.abs()
    finite = value[value.isfinite()] if value.is_floating_point() else value
    words = []
    if finite.numel():
        form = "{:.4g}" if finite.is_floating_point() else "{}"
        low, high = (form.format(each.item()) for each in finite.aminmax())
        if value.is_floating_point():
            deviation = float(finite.double().std(correction=0))
            words.append(f"mean {float(finite.double().mean()):.4g} ± {deviation:.4g}")
        words.append(f"range {low} … {high}")
    for what, count in (("NaN", int(value.isnan().sum())), ("infinite", int(value.isinf().sum()))):
        if count:
            words.append(f"{count:,} {what}")
    return words


def _form(shape: torch.Size, dtype: torch.dtype) -> str:
    """A shape and a type as `described` writes them of a tensor."""
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def _is_fake(value: torch.Tensor) -> bool:
    return type(value).__name__ == "FakeTensor"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}…"


class Row(NamedTuple):
    """One line of a tree of modules; several modules that are alike are one line."""

    depth: int
    name: str
    kind: str
    state: str
    shape: str


def rows_of(
    root: torch.nn.Module,
    journal: Journal | None = None,
    visit: Visit | None = None,
    step: int = 0,
    other_name: Callable[[str], str] = str,
    at: str = "",
) -> list[Row]:
    """The modules at and below `at` as lines: what has run in this step, what is running, and where the run is paused."""
    states: dict[int, str] = {}
    if journal is not None:
        states = {key: "ran" for (key, kind), place in journal.last.items() if kind is OUTPUT and place.step == step}
        states |= {id(going.visit.module): "running" for going in journal.going}
    if visit is not None:
        states[id(visit.module)] = "paused"
    shapes = {} if journal is None else {key: _form(*form) for key, form in journal.forms.items()}
    return [*_rows(root.get_submodule(at), at, 0, states, shapes, other_name)]


def _rows(
    module: torch.nn.Module,
    path: str,
    depth: int,
    states: dict[int, str],
    shapes: dict[int, str],
    other_name: Callable[[str], str],
) -> Iterator[Row]:
    name, other = _last(path), _last(other_name(path))
    both = name if name == other else f"{other} ({name})"
    yield Row(depth, both, type(module).__name__, states.get(id(module), ""), shapes.get(id(module), ""))
    children = [(key, child) for key, child in module._modules.items() if child is not None]
    while children:
        alike = 1
        if children[0][0].isdigit():
            while alike < len(children) and _look(children[alike][1], states) == _look(children[0][1], states):
                alike += 1
        (first, child), (last, _) = children[0], children[alike - 1]
        if alike > 1 and "paused" not in _look(child, states) and "running" not in _look(child, states):
            shape = shapes.get(id(child), "")
            state = "ran" if "ran" in _look(child, states) else ""
            yield Row(depth + 1, f"{first} … {last}", f"{alike} x {type(child).__name__}", state, shape)
        else:
            alike = 1
            yield from _rows(child, f"{path}.{first}" if path else first, depth + 1, states, shapes, other_name)
        children = children[alike:]


def _last(path: str) -> str:
    """A module's own name."""
    return path.rpartition(".")[2] or "model"


def _look(module: torch.nn.Module, states: dict[int, str]) -> tuple[str, ...]:
    """What two modules that are shown in one line have in common: what is in them, and what has run."""
    return tuple(
        word for each in module.modules() for word in (type(each).__name__, each.extra_repr(), states.get(id(each), ""))
    )


def tree_of(rows: Sequence[Row]) -> Any:
    """Lines as rich's tree."""
    from rich.text import Text
    from rich.tree import Tree

    styles = {"ran": "green", "running": "yellow", "paused": "bold reverse", "": "dim"}
    above: list[Tree] = []
    for row in rows:
        text = Text(f"{MARKS[row.state]} {row.name}", styles[row.state])
        text.append(f"  {row.kind}", "cyan").append(f"  {row.shape}", "dim")
        del above[row.depth :]
        above.append(above[-1].add(text) if above else Tree(text))
    return above[0]


class ModelTree(Shown):
    """A module and what is in it, as lines; in a run held by hand, what has run and where it is paused."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __rich__(self) -> Any:
        return tree_of(self._rows)


class Where(Shown):
    """Where a run is paused: `print(run.where())`."""

    def __init__(self, headline: str, visit: Visit | None, frame: FrameType | None, rows: Sequence[Row]) -> None:
        self._headline = headline
        self._value = "" if visit is None else one_line(shown_value(visit))
        self._source = _source_at(frame, visit)
        self._locals = Locals(frame)
        self._rows = rows

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = [Text(self._headline, "bold")]
        if self._value:
            parts.append(Text(f"  {self._value}"))
        if self._source:
            parts += [Text(), Text(self._source[0], "cyan"), Text("\n".join(self._source[1:]))]
        if len(self._locals):
            parts += [Text(), self._locals.__rich__()]
        return Group(*parts, Text(), tree_of(self._rows))


def shown_value(visit: Visit) -> Any:
    """What stands for a visit in one line: the output, or the first argument."""
    value = value_at(visit)
    found = first_tensor(value)
    return value if found is None else found


def model_frame(visit: Visit | None) -> FrameType | None:
    """The innermost frame of the model's own code: neither this package's nor that in which torch calls a module."""
    frame = None if visit is None or visit.forward is None else visit.forward.frame
    while frame is not None and (frame.f_code.co_filename.startswith(OUR_FOLDER) or _is_torchs(frame.f_code)):
        frame = frame.f_back
    return frame


def _is_torchs(code: CodeType) -> bool:
    return code.co_filename.endswith(("torch/nn/modules/module.py", "torch/_dynamo/eval_frame.py"))


def _source_at(frame: FrameType | None, visit: Visit | None) -> list[str]:
    """File and line, and the lines around it; of a model that is about to be entered, its forward."""
    if frame is not None:
        file, line, name = frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname
    else:
        function = None if visit is None else inspect.unwrap(type(visit.module).forward)
        code = getattr(function, "__code__", None)
        if code is None:
            return []
        file, line, name = code.co_filename, code.co_firstlineno, code.co_qualname
    lines = [(number, linecache.getline(file, number)) for number in range(max(1, line - AROUND), line + AROUND + 1)]
    shown = [f"{'▶' if number == line else ' '} {number:>5}  {text.rstrip()}" for number, text in lines if text]
    return [f"{_as_imported(file)}:{line} in {name}", *shown]


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

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("name", "value", box=None, pad_edge=False)
        for name, value in self._values.items():
            if name != "self" and not isinstance(value, torch.nn.Module):
                table.add_row(name, one_line(value))
        return table


class Receipt(NamedTuple):
    """One change: `size` is the norm of the change relative to that of the value."""

    point: str
    step: int
    size: float
    before: str
    after: str
    warning: str


class Edits(Shown, Sequence[Receipt]):
    """What was changed in a run: `run.edits`."""

    def __init__(self, receipts: Sequence[Receipt]) -> None:
        self._receipts = receipts

    def __getitem__(self, number: Any) -> Any:
        return self._receipts[number]

    def __len__(self) -> int:
        return len(self._receipts)

    def __rich__(self) -> Any:
        from rich.table import Table

        if not self._receipts:
            return "nothing has been changed"
        warned = any(each.warning for each in self._receipts)
        table = Table("point", "step", "change", "value", *(["warning"] if warned else []))
        for each in self._receipts:
            form = each.before if each.before == each.after else f"{each.before} → {each.after}"
            size = "" if each.size == float("inf") else f"{each.size:.3g}"
            table.add_row(each.point, str(each.step), size, form, *([each.warning] if warned else []))
        return table


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
