"""A handle of a value on a server: it is looked at, sliced and reduced there, and moves when it is wanted.

ref = model.model.layers[40].output_ref
ref.shape, ref.dtype, ref.norm()
last = ref[:, -1].get()                          # only the last position moves
other.model.layers[40].output = ref              # patched there: nothing moves
"""

from collections.abc import Callable
from typing import Any

import torch

from .line import Line
from .packing import Form, Packed, meant, packed, unpacked


class Ref:
    """A handle of a tensor, which is kept on the server as long as the handle."""

    __slots__ = ("__weakref__", "_line", "_number", "dtype", "shape")

    def __init__(self, line: Line, number: int, form: Form) -> None:
        self._line = line
        self._number = number
        self.shape, self.dtype = meant(form)

    @property
    def name(self) -> tuple[str, int]:
        """Under this name the server has it."""
        return "ref", self._number

    def get(self) -> torch.Tensor:
        """The value, here."""
        return unpacked(self._line.call("handled", self._number, "get", None))  # type: ignore[no-any-return]

    def norm(self, *args: Any, **kwargs: Any) -> Any:
        """`torch.Tensor.norm`, computed there: one number, as a tensor; with a dimension, a handle."""
        return self._do("norm", *args, **kwargs)

    def apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `function(tensor, *args)` gives there: a handle where it is a tensor of one dimension or more, else the value.

        ref.apply(torch.mean, dim=1)
        """
        return self._do("apply", function, *args, **kwargs)

    def __getitem__(self, key: Any) -> "Ref":
        return self._do("__getitem__", key)  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return self.shape[0]

    def _do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        done = self._line.call("handled", self._number, operation, packed((args, kwargs), places=name_of_ref))
        return unpacked(done) if isinstance(done, Packed) else Ref(self._line, *done)

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            self._line.forget("ref", self._number)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<on {self._line.name}: {list(self.shape)} {dtype}; `.get()` brings it>"


def name_of_ref(each: Any) -> tuple[str, int] | None:
    """The name under which the server has what this is a handle of."""
    return each.name if isinstance(each, Ref) else None
