"""What the names of one body mean: its own, an earlier body's that it waits for, those of the code around it.

    names = Names(block, frame, body.wait, "invoke 1")
    begin([names_of_the_first_body, names])
    names.run()               # run the block
    end([names_of_the_first_body, names])     # what they bound is there in the frame

A name is looked up among the body's own bindings, then in the nearest earlier body whose code binds the same variable, then in
the frame around, as that was when the block was met (a loop may have gone on since), never in a later body. Whether a name
waits is told from what the earlier body's code stores, not from whether a value exists: a second run of a notebook cell would
read the first run's.
"""

import builtins
import contextlib
import ctypes
import sys
from collections.abc import Callable, Sequence
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any, Final

from .blocks import Block, refused
from .rewriting import CAUGHT, DELETED

# What `import`, `class` and warnings read directly from the globals of the code they are in.
OF_THE_MODULE: Final = ("__name__", "__package__", "__spec__", "__file__", "__loader__", "__annotations__")
CAN_DELETE: Final = sys.version_info < (3, 12)
"""Whether a function's variable can be deleted from outside: later versions make it `None`, with a warning."""


class Names(dict[str, Any]):
    """The names of one body. It stands as the body's builtins: what the body has not bound itself is looked up here.

    Builtins, because every look-up by name ends there: in nested functions, comprehensions and classes alike. (A dictionary
    with `__missing__` as globals is not asked by a class body; CPython 3.11 to 3.13.)
    """

    def __init__(  # pragma: no cover: called where nothing is traced until the user's frame goes on
        self, block: Block, frame: FrameType, wait: Callable[[Callable[[], bool], str], None], label: str
    ) -> None:
        """Take what the body may look up from the frame as it is now; `wait` pauses the body until something holds."""
        super().__init__(vars(builtins))
        self._block, self._wait = block, wait
        self._frame: FrameType | None = frame
        self._module, self._beyond = frame.f_globals, frame.f_builtins
        inside = isinstance(self._beyond, Names)  # the frame itself runs a block, whose names are its globals
        self._local = None if inside else block.local
        local = {**frame.f_locals, **self._module} if inside else frame.f_locals
        at_module = inside or local is self._module
        self._place = id(self._module if at_module else frame)
        self._needed = {*block.loads, *block.code.co_varnames[: block.code.co_argcount], *block.code.co_freevars}
        # In a function all its variables: a debugger or an `eval` in the body may ask for any.
        names = self._needed.intersection(local) if at_module else local
        self._around = {name: local[name] for name in names}
        self.bound: dict[str, Any] = {name: self._module[name] for name in OF_THE_MODULE if name in self._module}
        self.bound["__builtins__"] = self
        self.frame: Callable[[], FrameType | None] = _nowhere
        """The innermost frame that the body is paused at, if it is."""
        self._binders: Binders = {}
        self._number = 0
        self.ended = False
        self._label = label
        gone = block.deletes.intersection(local) if self._local is not None and not CAN_DELETE else ()
        if gone:
            raise refused(f"it deletes `{min(gone)}`, and from 3.12 on Python cannot delete a function's variable from outside")

    def begin(self, number: int, binders: "Binders") -> None:
        """Look names up in the earlier bodies too, from when the block around all of them has ended."""
        self._number, self._binders = number, binders
        for name in self._block.stores:
            binders.setdefault(name, []).append(self)
        if self._place == id(self._module):
            # What the module has not rebound since is looked up there: functions that a body calls may rebind it.
            fixed = {*self._block.code.co_varnames, *self._block.code.co_freevars}
            around, module = self._around, self._module
            self._around = {n: v for n, v in around.items() if n in fixed or module.get(n, around) is not v}

    def leave_frame(self) -> None:  # pragma: no cover: called where nothing is traced until the user's frame goes on
        """Keep what the body may look up and nothing else of the frame: nothing will be bound there."""
        self._frame = None
        self._around = {name: self._around[name] for name in self._needed.intersection(self._around)}

    def again(self) -> "Names":
        """The same names with nothing bound, to run the body once more."""
        names = Names.__new__(Names)
        dict.update(names, self)
        vars(names).update(vars(self), bound=dict(self.bound), ended=False)
        names.bound["__builtins__"] = names
        return names

    def seen(self) -> tuple[CodeType, dict[str, Any]]:
        """The body's code, and what that may look up, by name."""
        found = {}
        for name in sorted(self._needed):
            with contextlib.suppress(KeyError):  # its own
                found[name] = self[name]
        return self._block.code, found

    def run(self) -> None:
        """Run the body."""
        code = self._block.code
        closure = tuple(CellType(self._around[name]) for name in code.co_freevars)
        arguments = [self._around[name] for name in code.co_varnames[: code.co_argcount]]
        try:
            FunctionType(code, self.bound, code.co_name, None, closure)(*arguments)
        finally:
            self.ended = True

    def __getitem__(self, name: str) -> Any:
        """What a name means that this body has not bound; `KeyError` makes Python raise a `NameError` at the line."""
        if self._has_deleted(name):
            raise KeyError(name)
        for body in reversed(self._binders.get(name, ())):
            same = body._number < self._number and body._place_of(name) == self._place_of(name)
            if same and body._binds(name, self._wait):
                return body.bound[name]
        if name in self._around:
            return self._around[name]
        if self._local is not None and self._place_of(name) == self._place:
            raise KeyError(name)  # a variable of the function that has no value yet
        return self._module[name] if name in self._module else self._beyond[name]

    def export(self, settled: set[tuple[int, str]]) -> None:
        """Bind in the frame what the body has bound, and delete what it has deleted, unless a later one has `settled` that."""
        frame = self._frame
        assert frame is not None
        local = frame.f_locals
        for name in self._block.stores:
            place = self._place_of(name)
            target: Any = self._module if place == id(self._module) else local
            if (place, name) in settled:
                continue
            if name in self.bound:
                target[name] = self.bound[name]
            elif self._has_deleted(name) and name in target and (CAN_DELETE or target is not local or self._local is None):
                del target[name]
            if self._settles(name):
                settled.add((place, name))
        if self._local is not None:  # 3.13 writes through, and this does nothing
            ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(CAN_DELETE))

    def release(self) -> None:
        """Refer to the frame and to other bodies no longer; functions that the body made look names up where they belong."""
        at_module = self._place == id(self._module)
        for name in self._needed.intersection(self._binders) - {*self._around, *self.bound}:
            with contextlib.suppress(KeyError):  # a function made here may still look it up
                self._around[name] = self[name]
        self._frame, self._binders, self._wait, self.frame = None, {}, alone, _nowhere
        kept = frozenset[str]() if at_module else self._block.inner
        for name in self._block.stores - kept:
            self.bound.pop(name, None)
        self._around = {} if at_module else {name: self._around[name] for name in self._needed.intersection(self._around)}
        self.bound.pop("__builtins__", None)  # functions have it already, and without it nothing here refers to itself

    def _settles(self, name: str) -> bool:
        return name in self.bound or self._has_deleted(name)

    def _binds(self, name: str, wait: Callable[[Callable[[], bool], str], None]) -> bool:
        """Wait until this body has bound the name for the last time, or has ended; whether it has."""
        if not self._is_final(name):
            wait(lambda: self._is_final(name), f"`{name}`, which {self._label} binds")
        if self._has_deleted(name):
            raise KeyError(name)
        return name in self.bound

    def _is_final(self, name: str) -> bool:
        """Whether the body will not bind the name any more, as far as its code tells."""
        if self.ended or name not in self.bound:
            return self.ended
        frame = self.frame()
        while frame is not None and frame.f_code is not self._block.code:
            frame = frame.f_back
        return frame is not None and not self._block.bindings.ahead(name, frame.f_lasti)

    def _has_deleted(self, name: str) -> bool:
        return name not in self.bound and (name + DELETED in self.bound or name + CAUGHT in self.bound)

    def _place_of(self, name: str) -> int:
        """Where the variable of this name lives: two bodies mean the same one when it lives in the same place."""
        if name in self._block.globals or (self._local is not None and name not in self._local):
            return id(self._module)
        return self._place


Binders = dict[str, list[Names]]
"""By name, the bodies whose code binds it, in the order written."""


def begin(written: Sequence[Names]) -> None:
    """Let each of these bodies, given in the order written, find its names in the earlier ones."""
    binders: Binders = {}
    for number, names in enumerate(written):
        names.begin(number, binders)


def end(written: Sequence[Names]) -> None:
    """Bind in the frames what the bodies have bound: of several that bind one name, the last has the last word."""
    settled: set[tuple[int, str]] = set()
    for names in reversed(written):
        names.export(settled)
        names.ended = True  # also where the trace ended before it: there is nothing to wait for any more
    for names in written:
        names.release()


def _nowhere() -> None:
    """A body that is not paused."""


def alone(ready: Callable[[], bool], waits_for: str) -> None:
    """What a body waits with that stands alone: there is no earlier one to wait for."""
