"""What the names of one body mean: its own, an earlier body's that it waits for, those of the code around it.

    names = Names(block, frame, body.wait, "invoke 1")
    in_order([names_of_the_first_body, names])
    names.run()               # run the block
    names.export()            # what it bound is there in the frame

A name is looked up among the body's own bindings, then in the nearest earlier body whose code binds the same variable, then in
the frame around, as that was when the block was met (a loop may have gone on since), never in a later body. Whether a name
waits is told from what the earlier body's code stores, not from whether a value exists: a second run of a notebook cell would
read the first run's.
"""

import builtins
import ctypes
import sys
from collections.abc import Callable, Sequence
from types import CellType, FrameType, FunctionType
from typing import Any, Final

from .blocks import Block, local_names, refused
from .rewriting import DELETED

# What `import`, `class` and warnings read directly from the globals of the code they are in.
OF_THE_MODULE: Final = ("__name__", "__package__", "__spec__", "__file__", "__loader__", "__annotations__")
CAN_DELETE: Final = sys.version_info < (3, 12)
"""Whether a function's variable can be deleted from outside: later versions make it `None`, with a warning."""


class Names(dict[str, Any]):
    """The names of one body. It stands as the body's builtins: what the body has not bound itself is looked up here.

    Builtins, because every look-up by name ends there: in nested functions, comprehensions and classes alike. (A dictionary
    with `__missing__` as globals is not asked by a class body; CPython 3.11 to 3.13.)
    """

    def __init__(self, block: Block, frame: FrameType, wait: Callable[[Callable[[], bool], str], None], label: str) -> None:
        """Take what the body may look up from the frame as it is now; `wait` pauses the body until something holds."""
        super().__init__(vars(builtins))
        local, module = frame.f_locals, frame.f_globals
        self._block, self._wait = block, wait
        self._frame: FrameType | None = frame
        self._module = module
        self._local = local_names(frame.f_code)
        self._place = id(module if local is module else frame)
        needed = (*block.loads, *block.code.co_varnames[: block.code.co_argcount], *block.code.co_freevars)
        self._around = {name: local[name] for name in needed if name in local}
        self.bound: dict[str, Any] = {name: module[name] for name in OF_THE_MODULE if name in module}
        self.bound["__builtins__"] = self
        self.earlier: Binders = {}
        self.number = 0
        self.ended = False
        self._label = label
        gone = block.deletes.intersection(local) if self._local is not None and not CAN_DELETE else ()
        if gone:
            raise refused(f"it deletes `{min(gone)}`, and from 3.12 on Python cannot delete a function's variable from outside")

    @property
    def stores(self) -> frozenset[str]:
        """What the body may bind or delete."""
        return self._block.stores

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
        for body in reversed(self.earlier.get(name, ())):
            same = body.number < self.number and body._place_of(name) == self._place_of(name)
            if same and body._binds(name, self._wait):
                return body.bound[name]
        if name in self._around:
            return self._around[name]
        if self._local is not None and self._place_of(name) == self._place:
            raise KeyError(name)  # a variable of the function that has no value yet
        return self._module[name] if name in self._module else super().__getitem__(name)

    def export(self) -> None:
        """Bind in the frame what the body has bound, and delete what it has deleted."""
        frame, stores = self._frame, self._block.stores
        assert frame is not None
        local = frame.f_locals
        for name in stores:
            target: Any = self._module if self._place_of(name) == id(self._module) else local
            if name in self.bound:
                target[name] = self.bound[name]
            elif name + DELETED in self.bound and name in target:
                del target[name]
        if self._local is not None:  # 3.13 writes through, and this does nothing
            ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(CAN_DELETE))

    def release(self) -> None:
        """Refer to the frame and to other bodies no longer; functions that the body made look names up where they belong."""
        self._frame, self.earlier = None, {}
        if self._place == id(self._module):
            self._around = {}
            for name in self._block.stores:
                self.bound.pop(name, None)

    def _binds(self, name: str, wait: Callable[[Callable[[], bool], str], None]) -> bool:
        """Wait until this body has bound the name, or has ended; whether it has."""
        if not (self.ended or name in self.bound):
            wait(lambda: self.ended or name in self.bound, f"`{name}`, which {self._label} binds")
        if name not in self.bound and name + DELETED in self.bound:
            raise KeyError(name)
        return name in self.bound

    def _place_of(self, name: str) -> int:
        """Where the variable of this name lives: two bodies mean the same one when it lives in the same place."""
        if name in self._block.globals or (self._local is not None and name not in self._local):
            return id(self._module)
        return self._place


Binders = dict[str, list[Names]]
"""By name, the bodies whose code binds it, in the order written."""


def in_order(written: Sequence[Names]) -> None:
    """Let each of these bodies, given in the order written, find its names in the earlier ones."""
    binders: Binders = {}
    for number, names in enumerate(written):
        names.number, names.earlier = number, binders
        for name in names.stores:
            binders.setdefault(name, []).append(names)
