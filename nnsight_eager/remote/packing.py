"""A value on its way between two processes: its tensors as plain memory, and what the other side has already by number.

    sent = packed(layer_output, keep=server.number_of)      # on one side
    value = unpacked(sent, tensor=client.known, ...)        # on the other: real tensors, which may be changed in place

torch pickles a tensor through a file in memory; as a buffer beside the pickle it is copied once, by Ray. What is left where it
is travels as a `Left`: its number, shape and dtype. All of it is made of what is pickled fastest, since a read waits for it.
"""

import functools
import io
import pickle
from collections.abc import Callable, Hashable
from typing import Any, Final, NamedTuple

import torch

from ..nested import described
from .room import copy_of

Form = tuple[tuple[int, ...], str]
"""What a tensor's memory means: its shape, and the name of its dtype as torch spells it."""


OF_NUMPY: Final = frozenset(
    (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
)


NAMELESS: Final = frozenset((str, int, float, bool, bytes, type(None), tuple, list, dict, type, torch.dtype, torch.device))
"""What has no name on the other side and is no tensor; most of what is pickled is, and a read waits for each look."""


class Left:
    """A value that was left where it is: among those of a paused run, by its number there."""

    __slots__ = ("number", "what")

    def __init__(self, number: int, what: Form | str) -> None:
        self.number = number
        self.what = what
        """The form of a tensor, else the name of a type."""

    def __repr__(self) -> str:
        what = self.what if isinstance(self.what, str) else f"{list(self.what[0])} {self.what[1]}"
        return f"<left on the server: {what}>"


class Packed(NamedTuple):
    """A value as a pickle in which tensors are numbers, and their memory beside it; without a pickle it is one tensor."""

    body: bytes | None
    memory: list[Any]
    forms: list[Form]
    marks: list[Hashable]
    """What each tensor is called on the side that has packed it; `None` where it has no name there."""

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors."""
        return sum(memoryview(each).nbytes for each in self.memory)


Marks = Callable[[torch.Tensor], tuple[Hashable, bool]]
"""Gives what a tensor is called here, and whether its memory is to be sent."""


def packed(
    value: Any, marks: Marks | None = None, places: Callable[[Any], Hashable] | None = None, by_value: bool = True
) -> Packed:
    """Pack a value; `places` gives the name under which the other side has an object already, if it does.

    What a script or a notebook defines is sent `by_value`; without it, which is faster, only what cannot be found by its name.
    """
    if type(value) is torch.Tensor and value.layout is torch.strided:
        mark, whole = (None, True) if marks is None else marks(value)
        if whole:
            return Packed(None, [memory_of(value)], [form_of(value)], [mark])
    memory: list[Any] = []
    forms: list[Form] = []
    names: list[Hashable] = []
    sent: dict[int, tuple[int, torch.Tensor]] = {}  # the tensor is held, else another could get its identity

    def persistent(each: Any) -> Any:
        if type(each) in NAMELESS:
            return None
        if places is not None and (name := places(each)) is not None:
            return "there", name
        if type(each) is Left:
            return "left", (each.number, each.what)
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

    return Packed(_pickled(value, persistent, by_value), memory, forms, names)


def unpacked(
    sent: Packed,
    *,
    known: Callable[[Hashable, torch.Tensor], None] | None = None,
    there: Callable[[Any], Any] | None = None,
    left: Callable[[Left], Any] | None = None,
    device: torch.device | None = None,
) -> Any:
    """The value that was packed, with tensors of its own; `known` is told what each is called on the other side.

    `there` gives what this side has under a name, `left` what it has, if it does, of what was left on the other.
    """
    values = [tensor_of(memory, form) for memory, form in zip(sent.memory, sent.forms, strict=True)]
    if device is not None and device.type not in ("cpu", "meta"):  # pragma: no cover: needs CUDA
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
            return Left(*name) if left is None else left(Left(*name))
        assert there is not None
        return there(name)

    return _Unpickler(sent.body, loaded).load()


def form_of(tensor: torch.Tensor) -> Form:
    """The form of a tensor."""
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def meant(form: Form) -> tuple[torch.Size, torch.dtype]:
    """The shape and the dtype that a form tells."""
    shape, dtype = form
    return torch.Size(shape), getattr(torch, dtype)


def memory_of(tensor: torch.Tensor) -> pickle.PickleBuffer:
    """The bytes of a tensor; on the processor they are not copied where they lie in one piece."""
    plain = tensor.detach()
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    plain = plain.to("cpu").contiguous()
    if plain.dtype not in OF_NUMPY:
        plain = plain.reshape(-1).view(torch.uint8)
    memory: Any = plain.numpy()
    return pickle.PickleBuffer(memory)


def tensor_of(memory: Any, form: Form) -> torch.Tensor:
    """A tensor with a copy of these bytes: what Ray hands over can only be read."""
    if torch.is_inference_mode_enabled():  # there it would have no version, and nobody would see that it is changed in place
        with torch.inference_mode(False):
            return tensor_of(memory, form)
    shape, dtype = meant(form)
    if not shape.numel():
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(copy_of(memory), dtype=dtype).reshape(shape)


def _pickled(value: Any, persistent: Callable[[Any], Any], by_value: bool) -> bytes:
    with io.BytesIO() as file:
        try:
            _pickler(by_value)(file, persistent).dump(value)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            if not by_value:
                return _pickled(value, persistent, by_value=True)
            raise unsendable(value, error) from None
        return file.getvalue()


@functools.cache
def _pickler(by_value: bool) -> Any:
    """A pickler that calls things by their names; `by_value` it takes along what the other side cannot import."""
    if by_value:
        from ray import cloudpickle

        pickler = cloudpickle.CloudPickler
    else:
        pickler = pickle.Pickler

    class Named(pickler):  # type: ignore[misc, valid-type]
        def __init__(self, file: Any, persistent: Callable[[Any], Any]) -> None:
            super().__init__(file, protocol=5)
            self._persistent = persistent

        def persistent_id(self, each: Any) -> Any:
            return self._persistent(each)

    return Named


class _Unpickler(pickle.Unpickler):
    def __init__(self, body: bytes, loaded: Callable[[Any], Any]) -> None:
        super().__init__(io.BytesIO(body))
        self._loaded = loaded

    def persistent_load(self, name: Any) -> Any:
        return self._loaded(name)


def unsendable(value: Any, error: Exception) -> Exception:
    """What a value that cannot travel is refused with."""
    from ..errors import RemoteError

    return RemoteError(
        f"A value cannot be sent, {described(value)}: {error}",
        "Send tensors, numbers, text and containers of them; what stays next to the model goes into `model.submit(function)`.",
    )
