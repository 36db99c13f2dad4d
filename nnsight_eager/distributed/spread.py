"""What stands between the model and whoever asks, where several ranks run the model together.

    between = spread_over(root)           # `None` where it is one process's, or each rank has inputs of its own (FSDP)
    between.ear(Visit)                    # an ear whose values are whole while the model is paused there
    between.forward(Forward)              # a forward that goes on when all ranks want it to, to the same point

The core knows of it by this alone: the classes that ears and forwards are made of are exchanged for these. Everything above,
invokes, caches and edits, sees whole values; the model goes on with this rank's part.
"""

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from ..nested import described
from ..paths import path_in, spelled
from ..visits import INPUT, OUTPUT, Forward, Kind, Visit, refuse_in_checkpoint
from .layouts import Called, Layouts, Place, how_at, told
from .ranks import Ranks
from .shown import Shown, parts_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

VALUE, ARGS, KWARGS = (Visit.__dict__[name] for name in ("value", "args", "kwargs"))
BEFORE, AFTER = (Visit.__dict__[name] for name in ("stop_before", "stop_after"))


class Spread:
    """One model that several ranks run together."""

    def __init__(self, root: torch.nn.Module, mesh: "DeviceMesh") -> None:
        """Every rank makes one at the same time."""
        self.root = root
        self.ranks = Ranks(mesh.get_group())
        self.layouts = Layouts(root, mesh, self.ranks)
        self._paths = {id(module): path for path, module in root.named_modules()}

    def path_of(self, module: torch.nn.Module) -> str:
        """Where a module or a part stands."""
        return self._paths.get(id(module)) or path_in(self.root, module)

    def ear(self, kind: type[Visit]) -> type[Visit]:
        """An ear of this kind whose values are whole while the model is paused there."""
        return _spread_ear(kind)  # type: ignore[arg-type]

    def forward(self, make: Callable[..., Forward]) -> Callable[..., Forward]:
        """What makes a forward that goes on when all ranks want it to."""
        if isinstance(make, partial):
            return partial(self.forward(make.func), *make.args, **make.keywords)
        assert isinstance(make, type)
        return partial(_together, _together_forward(make), self)

    @property
    def broken(self) -> bool:
        """Whether the ranks cannot go on together."""
        return self.ranks.broken

    def write(self, extraction: Any, folder: Any) -> None:
        """Make what is missing of an extraction in a folder, which rank 0 writes."""
        from .writing import write_together

        write_together(extraction, folder, self.ranks)


def spread_over(root: torch.nn.Module) -> Spread | None:
    """What is between, for a model whose weights are divided among ranks that compute on the same input."""
    mesh = _mesh_of(root)
    return Spread(root, mesh) if mesh is not None and mesh.size() > 1 else None


def _mesh_of(root: torch.nn.Module) -> "DeviceMesh | None":
    """The ranks that share an input: of a mesh that FSDP divides too, those along its last dimension."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    manager = getattr(root, "_mesh_manager", None)  # transformers' own
    if manager is not None:
        return manager.get_mesh("tp") if getattr(root, "_tp_size", 1) > 1 else None
    meshes = [each.device_mesh for each in root.parameters() if isinstance(each, DTensor)]
    if not meshes:
        return None
    alone = any(isinstance(module, FSDPModule) for module in root.modules())
    within = next((mesh for mesh in meshes if mesh.ndim > 1), None)
    if within is not None:
        return within[within.mesh_dim_names[-1]] if within.mesh_dim_names else None
    return None if alone else meshes[0]


# The forward


class Going:
    """What a forward and its ears share."""

    __slots__ = ("at", "called", "spread", "stops", "told")

    def __init__(self, spread: Spread) -> None:
        self.spread = spread
        self.stops: dict[tuple[int, Kind], Visit] = {}  # where somebody waits
        self.at: SpreadEar | None = None  # where the model is paused
        self.called: Called | None = None  # what the root was called with in this step
        self.told = False  # whether the others know what this forward runs


def _together(kind: type[Forward], spread: Spread, *given: Any, **kwargs: Any) -> Forward:
    forward: Any = kind(*given, **kwargs)
    forward.together = Going(spread)
    return forward  # type: ignore[no-any-return]


class Together(Forward):
    """A forward that goes on when all ranks want it to, to the same point."""

    __slots__ = ()

    together: Going

    def resume(self) -> Any:
        """Go on until the next pause, as all ranks do."""
        if not self._closing:
            at = self.together.at
            self.together.spread.ranks.agree(self._asked(), values=0.0 if at is None else at.told_of_edits())
        return super().resume()

    def _asked(self) -> str:
        """What is waited for, in words that are the same on every rank."""
        going = self.together
        words = [f"`{spelled(going.spread.path_of(ear.module), kind)}`" for (_, kind), ear in going.stops.items()]
        if self.walking:
            words.append("the next point")
        if self.stop_at is not None:
            words.append(f"step {self.stop_at}")
        asked = f"{' and '.join(words) or 'the end of the forward pass'} in step {self.step}"
        if not going.told and self._call is not None:
            going.told = True
            _, args, kwargs = self._call
            asked += f", of a call with {described((*args, *kwargs.values()))}"
        return asked


# The ears


class SpreadEar(Visit):
    """An ear whose values are whole while the model is paused there, and this rank's while it runs."""

    __slots__ = ("as_held", "shown", "whole")

    forward: Any
    shown: dict[str, Shown] | None  # while the model is paused or watched; `None` while it runs
    as_held: bool  # what is asked for is this rank's
    whole: Any  # what the model has gone on with a part of

    def rest(self) -> None:
        """Refer to no run and to no call."""
        self.shown, self.as_held, self.whole = None, False, None
        super().rest()

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """One call of the module."""
        forward = self.forward
        if forward is not None and self.module is forward.together.spread.root:
            forward.together.called = Called(args, kwargs, torch.is_grad_enabled())
        return super().__call__(*args, **kwargs)

    @property
    def going(self) -> Going:
        """What is shared with the forward."""
        return self.forward.together  # type: ignore[no-any-return]

    def _pause(self, forward: Forward, held: Any) -> None:
        with self._whole_values():
            self.going.at = self
            try:
                super()._pause(forward, held)
            finally:
                self.going.at = None
            self._go_on_with_parts()
            if self.skipped and self.kind is INPUT and "value" not in (self.shown or {}):
                VALUE.__set__(self, self._parts(VALUE.__get__(self)))

    def tell_watchers(self) -> None:
        """Have the watchers see the call, and whole values."""
        with self._whole_values():
            super().tell_watchers()

    def _leave(self, value: Any) -> Any:
        self.whole = None
        value = super()._leave(value)
        if self.gave is not None and self.whole is not None:
            self.gave = self.whole  # its gradient is the whole one
        self.whole = None
        return value

    def told_of_edits(self) -> float:
        """A number that tells what the values were changed to at this pause from what others may have changed them to."""
        edited = [each for shown in (self.shown or {}).values() for each in shown.edited()]
        return sum(sum(told(each)) for each in edited)

    def inputs_unchanged(self) -> bool:
        """Whether the inputs still hold what the module received."""
        with self.local():
            return super().inputs_unchanged()

    @contextlib.contextmanager
    def local(self) -> Iterator[None]:
        """Have values be what this rank holds."""
        before, self.as_held = self.as_held, True
        try:
            yield
        finally:
            self.as_held = before

    @contextlib.contextmanager
    def _whole_values(self) -> Iterator[None]:
        """Have values be whole."""
        self.shown = {}
        try:
            yield
        finally:
            self.shown = None

    def _go_on_with_parts(self) -> None:
        """Have the model go on with this rank's part of what the values are now."""
        assert self.shown is not None
        for name, slot in SLOTS.items():
            shown = self.shown.get(name)
            if shown is None:
                continue
            held = slot.__get__(self)
            new = shown.back()
            if name == "value" and self.kind is OUTPUT:
                self.whole = shown.now
            if new is not held:
                refuse_in_checkpoint(sys._getframe(), lambda: spelled(self.going.spread.path_of(self.module), self.kind))
                slot.__set__(self, new)

    def _read(self, name: str) -> Any:
        held = SLOTS[name].__get__(self)
        if self.shown is None or self.as_held or (name == "value" and self.kind is INPUT):
            return held
        shown = self.shown.get(name)
        if shown is None or shown.is_stale:
            kind: Kind = OUTPUT if name == "value" else INPUT
            shown = self.shown[name] = Shown(held, partial(self._how, kind, name), self.going.spread.ranks, self._point(kind))
        return shown.now

    def _write(self, name: str, value: Any) -> None:
        if self.shown is None or self.as_held or (name == "value" and self.kind is INPUT):
            SLOTS[name].__set__(self, value)
            if self.shown is not None:
                self.shown.pop(name, None)
                if self.as_held and name == "value" and self.kind is INPUT:
                    self.shown[name] = Shown(value, _as_it_is, self.going.spread.ranks, "")
            return
        self._read(name)
        self.shown[name].replace(value)

    def _parts(self, whole: Any) -> Any:
        ranks = self.going.spread.ranks
        return parts_of(whole, partial(self._how, OUTPUT, "value"), ranks, self._point(OUTPUT))

    def _how(self, kind: Kind, name: str, place: Place) -> Any:
        """How the tensor at a place in the outputs, or in the arguments, is divided."""
        spread = self.going.spread
        called = self.going.called or Called((), {}, torch.is_grad_enabled())
        layout = spread.layouts.at(self.module, spread.path_of(self.module), kind, called)
        return how_at(spread.layouts, layout, place if name == "value" else ((0 if name == "args" else 1), *place))

    def _point(self, kind: Kind) -> str:
        return f"`{spelled(self.going.spread.path_of(self.module), kind)}`"


def _as_it_is(place: Place) -> None:
    """Of a value that is this rank's already, nothing is divided."""


SLOTS = {"value": VALUE, "args": ARGS, "kwargs": KWARGS}


def _value(name: str) -> property:
    return property(lambda ear: ear._read(name), lambda ear, value: ear._write(name, value))


def _stop(slot: Any, kind: Kind) -> property:
    def write(ear: Any, value: bool) -> None:
        slot.__set__(ear, value)
        if ear.forward is not None:
            if value:
                ear.going.stops[id(ear), kind] = ear
            else:
                ear.going.stops.pop((id(ear), kind), None)

    return property(lambda ear: slot.__get__(ear), write)


@cache
def _spread_ear(kind: type[Visit]) -> type[Visit]:
    own = {name: _value(name) for name in SLOTS}
    own |= {"stop_before": _stop(BEFORE, INPUT), "stop_after": _stop(AFTER, OUTPUT)}
    own["__slots__"] = ()  # type: ignore[assignment]
    return types.new_class("Spread", (SpreadEar, kind), exec_body=lambda names: names.update(own))


@cache
def _together_forward(kind: type[Forward]) -> type[Forward]:
    return types.new_class("TogetherForward", (Together, kind), exec_body=lambda own: own.update(__slots__=("together",)))
