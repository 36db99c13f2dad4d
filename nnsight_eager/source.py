"""The operations inside a module's forward, each a point.

print(model.transformer.h[5].attn.source)                      # the forward's text, its operations beside their lines
with model.trace("The Eiffel Tower is in"):
    attention = model.transformer.h[5].attn.source.attention_interface_1
    attention.input                                            # the first argument of the call; `.inputs` has all
    attention.output, attention.source                         # what it returns; the operations of what it calls
"""

import ast
import builtins
import inspect
from collections.abc import Iterator
from functools import cached_property
from types import FunctionType
from typing import Any, Final, Protocol

import torch

from .calls import OperationPart, called_at, module_called, no_operation
from .ears import Memory
from .errors import OutsideTraceError, RunEndedError, SourceError
from .further import AtNextVisit
from .operations import Dissected, dissected
from .paths import path_in, spelled
from .peeling import held, peeled
from .points import Points
from .run import Run
from .taps import own_forward
from .visits import INPUT, Visit

UNKNOWN: Final = object()


class Trees(Protocol):
    """What the envoys of one model share."""

    root: torch.nn.Module
    memory: Memory

    def run(self) -> Run:
        """The run that points of this tree belong to."""


class Source:
    """The operations of a function, by name: `attn.source.self_c_proj_0`, `attn.source["self_c_proj_0"]`.

    Printed, it is the function's text with the operations beside their lines; `dir`, `len` and iteration give their names. In a
    trace, looking at it has the forward run so that its operations can be asked for from here on.
    """

    def __init__(self, owner: torch.nn.Module, path: str, tree: Trees, names: tuple[str, ...], called: Any) -> None:
        """The operations of `called`, the owner's forward or what its operation `names` calls; if unknown, any name may be."""
        self._owner = owner
        self._path = path
        self._tree = tree
        self._names = names
        self._function: FunctionType | None = None
        self._found: Dissected | None = None
        if called is not UNKNOWN:
            self._function, _ = peeled(called)
            self._found = dissected(self._function)

    def __getattr__(self, name: str) -> "OperationPoint":
        found = self.__dict__.get("_found")
        if name.startswith("_") and (found is None or name not in found.operations):  # IPython probes these
            raise AttributeError(name)
        if found is not None and name not in found.operations:
            raise AttributeError(str(no_operation(self._where, name, found)))
        return self._point(name)

    def __getitem__(self, name: str) -> "OperationPoint":
        if self._found is not None and name not in self._found.operations:
            raise no_operation(self._where, name, self._found)
        return self._point(name)

    def _point(self, name: str) -> "OperationPoint":
        return OperationPoint(self._owner, self._path, self._tree, (*self._names, name), self._callee(name))

    @property
    def _where(self) -> str:
        return f"{self._path}.source{''.join(f'.{name}.source' for name in self._names)}"

    def _callee(self, name: str) -> Any:
        """What an operation calls, where that can be told without running anything."""
        if self._found is None or self._function is None:
            return UNKNOWN
        callee = self._found.operations[name].callee
        return UNKNOWN if callee is None else _meant(callee, self._function, self._owner if not self._names else UNKNOWN)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(self if self._found is not None else ())})

    def __iter__(self) -> Iterator[str]:
        return iter(self._known.operations)

    def __len__(self) -> int:
        return len(self._known.operations)

    def __bool__(self) -> bool:
        return True

    def __contains__(self, name: object) -> bool:
        return name in self._known.operations

    @property
    def _known(self) -> Dissected:
        if self._found is None:
            raise SourceError(
                f"Which function `{spelled(self._where.removesuffix('.source'))}` calls is known when it is called.",
                "Read its `.input` in a trace, and look at its `.source` there.",
            )
        return self._found

    def __repr__(self) -> str:
        """Its text: on the left the operations, beside the line they begin on."""
        if self._found is None:
            return f"<{spelled(self._where)}: known when it is called>"
        assert self._function is not None
        code = self._function.__code__
        head = f"{spelled(self._where)}: {code.co_qualname} ({code.co_filename}, line {self._found.first_line})"
        return "\n".join([head, *_listing(self._found)])


def _listing(found: Dissected) -> Iterator[str]:
    """The lines of a function, each behind its number and the names of what begins on it."""
    on_line: dict[int, list[str]] = {}
    for operation in found.operations.values():
        on_line.setdefault(operation.line, []).append(operation.name)
    width = max(map(len, found.operations), default=0)
    for number, text in enumerate(found.lines, found.first_line):
        *others, last = on_line.get(number, [""])
        for name in others:
            yield f"{name:>{width}} ┐"
        yield f"{last:>{width}} {'→' if last else ' '} {number:4} {text}"


class OperationPoint(Points):
    """One call or assignment in a forward: `.output` is what it gives, `.input` and `.inputs` are what it is called with.

    An assignment's input and output are the value on its way to the variable. `.skip(value)` leaves the call out.
    """

    def __init__(self, owner: torch.nn.Module, path: str, tree: Trees, names: tuple[str, ...], callee: Any) -> None:
        """`callee` is what it calls, where that is known."""
        self._owner = owner
        self._owner_path = path
        self._tree = tree
        self._names = names
        self._callee = callee
        self._path = f"{path}.source.{'.source.'.join(names)}"

    def _run(self) -> Run:
        return self._tree.run()

    @property
    def _module(self) -> torch.nn.Module:  # type: ignore[override]
        """The part of the owner that this operation is, in the run that is open."""
        return part_of(self._run(), self._owner, self._owner_path, self._names)

    @property
    def source(self) -> Source:
        """The operations of the function that is called: `attn.source.attention_interface_1.source`.

        Which function that is may be known only when it is called: paused at the operation's input, it is.
        """
        called = self._callee
        visit = self._paused()
        if visit is not None and called is UNKNOWN:
            called = called_at(visit)
        module = module_called(called, self._owner)
        if module is not None:
            path = self._tree.memory.aliases.shown(path_in(self._tree.root, module))
            raise SourceError(f"`{spelled(self._path)}` calls a module.", f"Its own source is `{spelled(path, 'source')}`.")
        return Source(self._owner, self._owner_path, self._tree, self._names, called)

    def _paused(self) -> Visit | None:
        """The visit of this operation that the run is paused at, if it is."""
        try:
            at = self._run().at
        except OutsideTraceError:
            return None
        return at if at is not None and at.module is self._module and at.kind is INPUT else None

    def next(self) -> "NextOperationPoint":
        """This operation's next visit after now, in whatever step: for one in a loop, and for the next token."""
        return NextOperationPoint(self._owner, self._owner_path, self._tree, self._names, self._callee)

    def __repr__(self) -> str:
        return f"<{spelled(self._path)}>"


class NextOperationPoint(AtNextVisit, OperationPoint):
    """An operation at its next visit after now: what `operation.next()` gives."""


def part_of(run: Run, owner: torch.nn.Module, path: str, names: tuple[str, ...]) -> OperationPart:
    """The part that an operation is: one for all runs of a model."""
    around = part_of(run, owner, path, names[:-1]) if len(names) > 1 else None
    return run.part((id(owner), names), lambda: OperationPart(owner, path, names, around))


def source_of(owner: torch.nn.Module, path: str, tree: Trees) -> Source:
    """The operations of a module's forward; in a trace they can be asked for from here on."""
    source = Source(owner, path, tree, (), own_forward(owner))
    try:
        run = tree.run()
        run.listen(part_of(run, owner, path, ()))
    except (OutsideTraceError, RunEndedError):
        pass
    return source


def _meant(node: ast.expr, function: FunctionType, owner: Any) -> Any:
    """What an expression in a function means that looks up names and attributes only; `UNKNOWN` where that cannot be told."""
    if isinstance(node, ast.Attribute):
        whole = _meant(node.value, function, owner)
        computed = isinstance(inspect.getattr_static(type(whole), node.attr, None), (property, cached_property))
        return UNKNOWN if whole is UNKNOWN or computed else getattr(whole, node.attr, UNKNOWN)
    if not isinstance(node, ast.Name):
        return UNKNOWN
    code = function.__code__
    if node.id in code.co_varnames or node.id in code.co_cellvars:
        return owner if code.co_varnames[:1] == (node.id,) else UNKNOWN
    if node.id in code.co_freevars:
        return held((function.__closure__ or ())[code.co_freevars.index(node.id)])
    return function.__globals__.get(node.id, getattr(builtins, node.id, UNKNOWN))
