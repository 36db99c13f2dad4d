"""What scripts written for nnsight expect and eager code does not need.

    hidden = model.transformer.h[-1].output.save()      # `.save()` gives the value itself
    hidden.value                                        # and so does `.value`

Nothing has to be saved: a value read in a trace is an ordinary variable. This is the one module that changes types which are
not its own: `torch.Tensor` gets `save` and `value` when the package is imported, and on the first trace the builtin
containers and numbers get `save`. `NNSIGHT_EAGER_SAVE=0` in the environment turns both off. And for as long as a trace or a
block needs it, `TensorPatch` gives `torch.Tensor` another `backward` or `grad`.
"""

import ctypes
import gc
import os
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch

T = TypeVar("T")

# Not `str`: IPython's completer looks up each of its attributes on `UserString` as well.
BUILTINS: Final = (tuple, list, dict, set, int, float, complex)
ENABLED: Final = os.environ.get("NNSIGHT_EAGER_SAVE") != "0"


def save(value: T) -> T:
    """Give `value` back: `hidden = save(model.transformer.h[-1].output)`."""
    return value


def add_save_to_tensors() -> None:
    """Let `tensor.save()` and `tensor.value` give the tensor."""
    if ENABLED and not hasattr(torch.Tensor, "save"):
        torch.Tensor.save = save  # type: ignore[attr-defined]
        torch.Tensor.value = property(save)  # type: ignore[attr-defined]


def add_save_to_builtins() -> None:
    """Let `.save()` of a tuple, list, dict or number give the value."""
    if ENABLED and not hasattr(tuple, "save"):
        for builtin in BUILTINS:
            _dict_of(builtin)["save"] = save
            ctypes.pythonapi.PyType_Modified(ctypes.py_object(builtin))


def _dict_of(builtin: type) -> dict[str, Any]:
    """The dictionary behind the read-only view that a builtin type shows of it."""
    return gc.get_referents(builtin.__dict__)[0]  # type: ignore[no-any-return]


class TensorPatch:
    """One attribute of `torch.Tensor` that means something else while anybody needs it: `begin()`, then `end()`."""

    def __init__(self, name: str, make: Callable[[Any], Any]) -> None:
        """`make` is given what torch has there, and gives what stands in its place."""
        self._name = name
        self._make = make
        self._users = 0
        self._lock = threading.Lock()
        self._own: Any = None

    def begin(self) -> None:
        """Put it in place, if it is not there."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._own = vars(torch.Tensor).get(self._name)  # `None` where the attribute is inherited
                setattr(torch.Tensor, self._name, self._make(getattr(torch.Tensor, self._name)))

    def end(self) -> None:
        """Put back what was there, if nobody needs it any more."""
        with self._lock:
            self._users -= 1
            if not self._users and self._own is None:
                delattr(torch.Tensor, self._name)
            elif not self._users:
                setattr(torch.Tensor, self._name, self._own)
