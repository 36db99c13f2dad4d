"""A value as it is now, to be built again later: its tensors are kept and not copied, its objects are written down.

kept = frozen(layer_output)      # `None` where it cannot be built again
kept.intact()                    # no tensor in it has been changed since
kept.thawed()                    # the same value anew: tensors cloned, objects made again
"""

import io
import pickle
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final, NamedTuple

import torch

from ..snapshots import snapshot

BY_REFERENCE: Final = (
    torch.nn.Module,
    torch.dtype,
    torch.device,
    type,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    ModuleType,
)
"""What is the same thing wherever it is referred to."""


class Frozen(NamedTuple):
    """A value written down, with the tensors it had and how often each had been changed in place."""

    form: bytes | None  # `None` where the value is the one tensor
    tensors: list[torch.Tensor]
    versions: list[int]
    others: list[Any]

    def intact(self) -> bool:
        """Whether no tensor has been changed in place since."""
        return self.versions == [each._version for each in self.tensors]

    def thawed(self) -> Any:
        """The value, built anew."""
        if self.form is None:
            return _cloned(self.tensors[0])
        with torch.inference_mode(False):
            return _Thawing(self).load()


def frozen(value: Any) -> Frozen | None:
    """The value to be built again later.

    `None` where that would not be the same: its tensors share memory with each other, are a module's own, or were made under
    inference mode, where torch keeps no record of changes; or it has an object that cannot be written down.
    """
    if isinstance(value, torch.Tensor):  # what most modules give need not be written down
        alone = not value.is_inference() and not (value.requires_grad and value.is_leaf)
        return Frozen(None, [value], [value._version], []) if alone else None
    freezing = _Freezing()
    try:
        freezing.dump(value)
        versions = [each._version for each in freezing.tensors]
    except Exception:  # whatever an object's own `__reduce__` raises
        return None
    storages = {each.untyped_storage()._cdata for each in freezing.tensors}
    if len(storages) < len(freezing.tensors) or any(each.is_leaf and each.requires_grad for each in freezing.tensors):
        return None
    return Frozen(freezing.written.getvalue(), freezing.tensors, versions, freezing.others)


def _cloned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the gradient of what it is copied from, whatever mode is on where it is made."""
    with torch.inference_mode(False), torch.set_grad_enabled(tensor.requires_grad):
        return snapshot(tensor)


def put_into(target: Any, source: Any) -> None:
    """Have `target`, a list, a dict or an object, hold what `source` does."""
    if isinstance(target, list):
        target[:] = source
    elif isinstance(target, dict):
        target.clear()
        target.update(source)
    if hasattr(target, "__dict__"):
        vars(target).clear()
        vars(target).update(vars(source))


class _Freezing(pickle.Pickler):
    """Writes a value down; in memory, and read by nobody else."""

    def __init__(self) -> None:
        self.written = io.BytesIO()
        super().__init__(self.written, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self.others: list[Any] = []
        self._numbers: dict[int, tuple[bool, int]] = {}

    def persistent_id(self, value: Any) -> tuple[bool, int] | None:
        """What stands for a tensor, or for what is referred to."""
        is_tensor = isinstance(value, torch.Tensor)
        if not is_tensor and not isinstance(value, BY_REFERENCE):
            return None
        found = self._numbers.get(id(value))
        if found is None:
            there: list[Any] = self.tensors if is_tensor else self.others
            there.append(value)
            found = self._numbers[id(value)] = is_tensor, len(there) - 1
        return found


class _Thawing(pickle.Unpickler):
    """Reads what `_Freezing` has written."""

    def __init__(self, kept: Frozen) -> None:
        super().__init__(io.BytesIO(kept.form or b""))
        self._kept = kept
        self._cloned: dict[int, torch.Tensor] = {}

    def persistent_load(self, name: Any) -> Any:
        """The tensor, cloned, or what was referred to."""
        is_tensor, number = name
        if not is_tensor:
            return self._kept.others[number]
        if number not in self._cloned:
            self._cloned[number] = _cloned(self._kept.tensors[number])
        return self._cloned[number]
