"""A value on its way between two processes: its tensors as plain memory, and what the other side has already by number.

    sent = packed(layer_output, keep=server.number_of)      # on one side
    value = unpacked(sent, tensor=client.known, ...)        # on the other: real tensors, which may be changed in place

torch pickles a tensor through a file in memory; as an array beside the pickle it is copied once, by Ray. What is left where it
is travels as a `Left`: its number, shape and dtype.
"""

import io
import pickle
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

from ..nested import described


class Form(NamedTuple):
    """What a tensor's memory means."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Left:
    """A tensor that was left where it is: among the values of a paused run, by its number there."""

    __slots__ = ("dtype", "number", "shape")

    def __init__(self, number: int, form: Form) -> None:
        self.number = number
        self.shape = torch.Size(form.shape)
        self.dtype = form.dtype

    def __repr__(self) -> str:
        return f"<left on the server: {list(self.shape)} {str(self.dtype).removeprefix('torch.')}>"


class Packed(NamedTuple):
    """A value as a pickle in which tensors are numbers, and their memory beside it; without a pickle it is one tensor."""

    body: bytes | None
    memory: list[Any]
    forms: list[Form]
    marks: list[Hashable]
    """What each tensor is called on the side that has packed it; `None` where it has no name there."""

    @property
    def nbytes(self) -> int:
        """How large the tensors are."""
        return sum(int(each.nbytes) for each in self.memory)


Marks = Callable[[torch.Tensor], tuple[Hashable, bool]]
"""Gives what a tensor is called here, and whether its memory is to be sent."""


def packed(value: Any, marks: Marks | None = None, places: Callable[[Any], Hashable] | None = None) -> Packed:
    """Pack a value; `places` gives the name under which the other side has an object already, if it does."""
    if type(value) is torch.Tensor and value.layout is torch.strided:
        mark, whole = (None, True) if marks is None else marks(value)
        if whole:
            return Packed(None, [memory_of(value)], [form_of(value)], [mark])
    memory: list[Any] = []
    forms: list[Form] = []
    names: list[Hashable] = []
    sent: dict[int, tuple[int, torch.Tensor]] = {}  # the tensor is held, else another could get its identity

    def persistent(each: Any) -> Any:
        if places is not None and (name := places(each)) is not None:
            return "there", name
        # Where tensors have names a parameter is one of them; else it stays a parameter, of a plain tensor.
        kind = torch.Tensor if type(each) is torch.Tensor or marks is not None else ()
        if not isinstance(each, kind) or each.layout is not torch.strided or each.device.type == "meta":
            return None
        mark, whole = (None, True) if marks is None else marks(each)
        if not whole:
            return "left", (mark, form_of(each))
        if id(each) not in sent:
            sent[id(each)] = len(memory), each
            memory.append(memory_of(each))
            forms.append(form_of(each))
            names.append(mark)
        return "sent", sent[id(each)][0]

    return Packed(_pickled(value, persistent), memory, forms, names)


def unpacked(
    sent: Packed,
    *,
    known: Callable[[Hashable, torch.Tensor], None] | None = None,
    there: Callable[[Any], Any] | None = None,
    device: torch.device | None = None,
) -> Any:
    """The value that was packed, with tensors of its own; `known` is told what each is called on the other side.

    `there` gives what this side has under a name.
    """
    values = [tensor_of(memory, form) for memory, form in zip(sent.memory, sent.forms, strict=True)]
    if device is not None and device.type not in ("cpu", "meta"):
        values = [each.to(device) for each in values]
    if known is not None:
        for mark, value in zip(sent.marks, values, strict=True):
            if mark is not None:
                known(mark, value)
    if sent.body is None:
        return values[0]

    def loaded(kind_and_name: Any) -> Any:
        kind, name = kind_and_name
        if kind == "sent":
            return values[name]
        if kind == "left":
            return Left(*name)
        assert there is not None
        return there(name)

    return _unpickled(sent.body, loaded)


def form_of(tensor: torch.Tensor) -> Form:
    """The form of a tensor."""
    return Form(tuple(tensor.shape), tensor.dtype)


def memory_of(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor as an array; on the processor it is not copied where it lies in one piece."""
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy()


def tensor_of(memory: Any, form: Form) -> torch.Tensor:
    """A tensor with a copy of these bytes: what Ray hands over can only be read."""
    import numpy

    with torch.inference_mode(False):  # else it has no version, and nobody sees that it was changed in place
        tensor = torch.empty(form.shape, dtype=form.dtype, device="cpu")
    numpy.copyto(tensor.reshape(-1).view(torch.uint8).numpy(), memory)
    return tensor


def _pickled(value: Any, persistent: Callable[[Any], Any]) -> bytes:
    """Pickle by value what the other side cannot import, such as what a notebook defines."""
    from ray import cloudpickle

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def persistent_id(self, each: Any) -> Any:
            return persistent(each)

    with io.BytesIO() as file:
        try:
            Pickler(file, protocol=5).dump(value)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise unsendable(value, error) from None
        return file.getvalue()


def _unpickled(body: bytes, loaded: Callable[[Any], Any]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return loaded(pid)

    return Unpickler(io.BytesIO(body)).load()


def unsendable(value: Any, error: Exception) -> Exception:
    """What a value that cannot travel is refused with."""
    from ..errors import RemoteError

    return RemoteError(
        f"A value cannot be sent, {described(value)}: {error}",
        "Send tensors, numbers, text and containers of them; what stays next to the model goes into `model.submit(function)`.",
    )
