"""One time a remote run is paused at a point, as this side knows it: what was brought of it, and what has been changed here.

    visit.value                  # brought when it is read: the first tensor at once, others where they are wanted
    visit.writes()               # what has been changed since: assigned, or in place

A tensor that was brought is a copy. Its version counter tells whether it was changed, and then it is sent back before the run
goes on. What was left on the server stands in containers as `Left`, and is what it was where such a container is assigned.
"""

from collections.abc import Callable, Hashable
from typing import Any, Final

import torch

from ..nested import items, with_items
from ..visits import INPUT, OUTPUT, Kind
from .addresses import same
from .packing import Left, Packed, packed, unpacked
from .wire import Arguments, At, Writes

Send = Callable[..., Any]
"""Sends a verb and its arguments, and gives what was asked for."""

_NOT_HERE: Final = object()


class RemoteVisit:
    """A visit on the server."""

    def __init__(
        self, module: torch.nn.Module, at: At, send: Send, name_of: Callable[[Any], Hashable], here: Callable[[Any], Any]
    ) -> None:
        """`send` asks the server, `name_of` gives the name of what is there already, `here` what is here under a name."""
        self.module = module
        self.kind: Kind = same(at.kind)
        self.step = at.step
        self.times = at.times
        self.skipped = at.skipped
        self.over = False
        self._send = send
        self._name_of = name_of
        self._here = here
        self._value: Any = _NOT_HERE
        self._inputs: Any = _NOT_HERE
        self._unchanged = True
        self._replaced: str | None = None
        self._known: dict[int, tuple[int, torch.Tensor, int]] = {}  # by identity: number on the server, tensor, version

    # What is here

    def has_brought(self, sent: Any) -> None:
        """What the visit's answer has brought along."""
        if isinstance(sent, Arguments):
            self._take_inputs(sent)
        else:
            self._value = self._unpacked(sent)

    @property
    def value(self) -> Any:
        """What the module returns; brought when it is first read."""
        if self._value is _NOT_HERE:
            self._value = self._unpacked(self._send("bring", OUTPUT))
        return self._value

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments, of which the first is brought."""
        return self._arguments()[0]  # type: ignore[no-any-return]

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments."""
        return self._arguments()[1]  # type: ignore[no-any-return]

    def _arguments(self) -> Any:
        if self._inputs is _NOT_HERE:
            self._take_inputs(self._send("bring", INPUT))
        return self._inputs

    def _take_inputs(self, sent: Arguments) -> None:
        told = (Left(*each) if type(each) is tuple else each for each in sent.others)
        first, *others = self._unpacked(sent.first), *told
        every = [first, *others][: sent.positional + len(sent.names)]
        named = dict(zip(sent.names, every[sent.positional :], strict=True))
        self._inputs, self._unchanged = (tuple(every[: sent.positional]), named), sent.unchanged

    def inputs_unchanged(self) -> bool:
        """Whether the inputs still hold what the module received."""
        if self.kind is OUTPUT:
            self._arguments()
        return self._unchanged

    def part(self, whole: Any, kind: str) -> Any:
        """What is seen of a value: where all of it is asked for, also what was left on the server."""
        if isinstance(whole, torch.Tensor) or kind not in (OUTPUT, INPUT, "inputs") or not (left := [*_left(whole)]):
            return whole
        brought = self._unpacked(self._send("rest", [each.number for each in left]))
        values = dict(zip((each.number for each in left), brought, strict=True))
        filled = _filled(whole, values)
        if kind == OUTPUT:
            self._value = filled
        else:
            self._inputs = filled if kind == "inputs" else _filled(self._inputs, values)
        return filled

    def begin_change(self) -> None:
        """A new value is about to be built of the one that is here."""

    @property
    def going_on(self) -> bool:
        """Whether the call is in progress; asked where the run is paused elsewhere."""
        return not self.over or bool(self._send("going_on", self.module))

    # What is changed

    def replace(self, value: Any) -> Any:
        """Go on with `value`, an output or a pair of arguments; what was there."""
        if self.kind is OUTPUT:
            before, self._value, self._replaced = self._value, value, OUTPUT
        else:
            before, self._inputs, self._replaced = self._inputs, value, "inputs"
        return None if before is _NOT_HERE else before

    def skip(self, value: Any) -> None:
        """Leave the module out and go on with `value`."""
        self.skipped, self._value, self._replaced = True, value, "skip"

    def writes(self) -> Writes | None:
        """What has been changed here and the server does not know yet."""
        changed = []
        for key, (number, tensor, version) in self._known.items():
            if tensor._version != version:
                changed.append((number, packed(tensor)))
                self._known[key] = number, tensor, tensor._version
        replaced, self._replaced = self._replaced, None
        if replaced is None:
            return Writes(changed, None) if changed else None
        value = self._inputs if replaced == "inputs" else self._value
        return Writes(changed, (replaced, packed(value, places=self._place)))

    def _place(self, each: Any) -> Hashable:
        """The name under which the server has this already."""
        if isinstance(each, Left):
            return each.number
        known = self._known.get(id(each)) if isinstance(each, torch.Tensor) else None
        return known[0] if known is not None else self._name_of(each)

    def _unpacked(self, sent: Packed) -> Any:
        return unpacked(sent, known=self._learn, there=self._here, left=self._known_or_left)

    def _known_or_left(self, left: Left) -> Any:
        """A tensor that was brought at this visit before, else what tells that it was not."""
        return next((tensor for number, tensor, _ in self._known.values() if number == left.number), left)

    def _learn(self, number: Hashable, tensor: torch.Tensor) -> None:
        self._known[id(tensor)] = number, tensor, tensor._version  # type: ignore[assignment]


def _left(value: Any) -> list[Left]:
    """What was left on the server, in a value."""
    if isinstance(value, Left):
        return [value]
    return [left for _, each in items(value) for left in _left(each)]


def _filled(value: Any, brought: dict[int, Any]) -> Any:
    """A value with what was brought in the place of what was left."""
    if isinstance(value, Left):
        return brought[value.number]
    done = {key: (each, _filled(each, brought)) for key, each in items(value)}
    return with_items(value, {key: new for key, (old, new) in done.items() if new is not old})
