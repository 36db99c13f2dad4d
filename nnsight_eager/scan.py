"""The same run on fake tensors: shapes and types without weights and without computing.

    with model.scan("The Eiffel Tower is in"):
        print(model.transformer.h[5].hidden.shape)       # [1, seq, hidden]

    model.map("The Eiffel Tower is in")                  # every module that runs, in order, with shapes

torch's `FakeTensorMode` computes shapes, types and devices only. The model's parameters are fake ones while the forward goes
on, so weights need not be loaded; both sides run in the mode, so that tensors made in the block are fake as well. A model that
chooses by values cannot: transformers keeps an attention mask that it would drop where it is all ones.
"""

from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode

from .aliases import Aliases
from .errors import InputError, InvokeError, PathError, RunError
from .folding import folded
from .nested import described, mapped, small_tensors
from .paths import near, spelled
from .run import Call
from .shown import Column, Grid, Part, Shown
from .trace import Trace
from .tree import Tree
from .visits import OUTPUT, Visit


class Scan(Trace):
    """A trace on fake tensors; what is read are `FakeTensor`s, which have a shape, a type and a device and no values."""

    __slots__ = ("_mode", "_real")

    def __init__(self, tree: Tree, call: Call) -> None:
        """Nothing runs before the block is entered."""
        super().__init__(tree, "scan", call, None)
        if tree.memory.look_between(tree.root, "scan") is not None:
            raise InputError(
                "A scan of a model that is divided among ranks would show this rank's shapes.",
                "Scan it in one process, where the weights need not be loaded: `LanguageModel(name).scan(...)`.",
            )
        if call.function is not tree.root:
            raise InputError("A scan runs the forward pass of the model only.", "Leave `fn` away.")
        self._real = call

    def __enter__(self) -> "Scan":
        root = self._tree.root
        if any(isinstance(each, FakeTensor) for each in root.parameters()) or (self._run is not None and self._run.open):
            raise RunError("A scan of this model is open already.", "Leave its block before another is begun.")
        self._mode = mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._call = fake_call(mode, root, self._real)
        mode.__enter__()
        try:
            super().__enter__()
        except BaseException:
            mode.__exit__(None, None, None)
            raise
        return self

    def invoke(self, *inputs: Any, rows: Any = ..., **keywords: Any) -> NoReturn:
        """A scan has one input."""
        raise InvokeError("A scan has one input, so it has no invokes.", "Scan a list: `with model.scan([one, other]):`.")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            _say_no_values(error)
            return super().__exit__(kind, error, traceback)  # what is true leaves the block quietly
        except (DataDependentOutputException, DynamicOutputShapeException) as raised:  # by the rest of the model
            _say_no_values(raised)
            raise
        finally:
            self._mode.__exit__(None, None, None)


def _say_no_values(error: BaseException | None) -> None:
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        error.add_note("A scan has shapes and no values, and something here asks for a value.")


class Row(NamedTuple):
    """One module of a map: where it is, what goes in and comes out, and how often it runs in the pass."""

    path: str
    kind: str
    input: str
    output: str
    visits: int


class Map(Shown):
    """The modules that a forward pass runs, in the order they begin; printed as a table."""

    def __init__(self, rows: list[Row], aliases: Aliases) -> None:
        """`aliases` are the model's other names, in which it is shown and may be asked."""
        self.rows = rows
        self._aliases = aliases

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> Row:
        """The row of one module."""
        own = self._aliases.own(path)
        found = next((row for row in self.rows if row.path == own), None)
        if found is None:
            names = [self._aliases.shown(row.path) for row in self.rows]
            raise PathError(f"`{path}` does not run{near(path, names)}", "`.rows` lists what does.")
        return found

    def _parts(self) -> Iterator[Part]:
        shown = self._aliases.shown
        rows = [(shown(row.path), row.kind, row.input, row.output, str(row.visits)) for row in self.rows]
        columns = [Column("module"), Column("type", 12, look="type"), Column("input", 19), Column("output", 19)]
        if any(row.visits > 1 for row in self.rows):
            columns.append(Column("visits", right=True))
        yield Grid(columns, [(spelled(path), *said)[: len(columns)] for path, *said in folded(rows)])


def map_of(scan: Scan, modules: dict[str, torch.nn.Module], aliases: Aliases) -> Map:
    """Run the scan and note every call of these modules."""
    rows: dict[str, Row] = {}

    def watcher(path: str, module: torch.nn.Module) -> Any:
        def watch(visit: Visit) -> None:
            if visit.kind is OUTPUT:
                rows[path] = rows[path]._replace(output=_shown(visit.value))
            elif path in rows:
                rows[path] = rows[path]._replace(visits=rows[path].visits + 1)
            else:
                rows[path] = Row(path, type(module).__name__, _shown((visit.args, visit.kwargs)), "", 1)

        return watch

    with scan:
        for path, module in modules.items():
            scan.watch(module, watcher(path, module))
    return Map(list(rows.values()), aliases)


def _shown(value: Any) -> str:
    """The tensors in a value, the first three of them in words; a key/value cache has others in each layer."""
    every = [described(each) for each in small_tensors(value)]
    return ", ".join(every[:3]) + (f", {len(every) - 3} more" if len(every) > 3 else "")


def fake_call(mode: FakeTensorMode, root: torch.nn.Module, call: Call) -> Call:
    """The forward pass that `call` is, on fake arguments and with fake weights."""
    weights = {name: _fake(mode, each) for name, each in (*root.named_parameters(), *root.named_buffers())}
    args, kwargs = mapped((call.args, call.kwargs), lambda tensor: _fake(mode, tensor))
    return Call("forward", torch.func.functional_call, (root, weights, args, kwargs), {})


def _fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same form; of weights that are not loaded, as they would be on the processor."""
    if tensor.device.type == "meta":
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return mode.from_tensor(tensor)
