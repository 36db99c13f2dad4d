"""What has happened in a run that is held by hand: where it has come by, what was changed there, what its modules gave.

    journal = Journal(keep=True)
    run.watch(module, journal.watch)             # of every module
    HeldForward(journal, model, x)               # notes what is changed while it is paused

Another forward pass is led to the same place by it: see `recording`.
"""

import weakref
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch

from ..inside import Part
from ..nested import described, first_tensor, mapped, small_tensors, tensors
from ..snapshots import snapshot
from ..visits import INPUT, OUTPUT, Forward, Kind, Place, Visit
from .frozen import BY_REFERENCE, Frozen, frozen
from .random_numbers import Random

Key = tuple[int, Kind, int, int]
"""Tells a place: the identity of its module, before or behind its forward, the step and the visit in it."""


class Kept(NamedTuple):
    """What a module has made in one call, so that the call need not be made again."""

    entered: Place
    inside: dict[int, Place]  # the last visit of each module in it, itself included
    value: Frozen
    objects: Frozen | None  # what it was given to write into, as it left it
    random: Random

    @property
    def left(self) -> Key:
        """The place where the call has ended."""
        return self.inside[id(self.entered.module)].key

    def has(self, key: Key) -> bool:
        """Whether the call has come by a place; of one that it did not, also where that was before."""
        module, _, step, times = key
        last = self.inside.get(module)
        return last is not None and last.step == step and last.times >= times


class Changed(NamedTuple):
    """What was changed at a place, by assignment or in place; tensors by their number in the value that is there."""

    place: Place
    value: Any  # what the model has gone on with, its tensors copied
    replaced: frozenset[int]
    in_place: frozenset[int]
    rebuilt: bool  # it is of another form than what was there
    skipped: bool
    before: str
    after: str
    size: float  # the norm of the change relative to that of the value; infinite where there is nothing to compare
    node: Any  # of the gradient's graph: where the change is in it

    @property
    def nothing(self) -> bool:
        """Whether every value is what it was."""
        return not self.skipped and not self.rebuilt and self.size == 0


class Going:
    """A module's call in progress, and what it has come by so far."""

    def __init__(self, visit: Visit, entered: Place) -> None:
        self.visit = visit
        self.entered = entered
        self.kept: list[Kept] = []
        self.inside: dict[int, Place] = {}


class Stale(NamedTuple):
    """A tensor that was changed in place after the model had gone on from it."""

    place: Place
    value: str


class Handed(NamedTuple):
    """A tensor that could be read at a place the model has gone on from."""

    place: Place
    tensor: weakref.ref[torch.Tensor]


class Paused:
    """A visit as it was when the run was paused at it."""

    def __init__(self, visit: Visit) -> None:
        self.visit = visit
        self.place = visit.place
        self._value = value_at(visit)
        self._tensors = [*tensors(self._value)]
        self._versions = _versions(self._tensors)
        self._copies = [snapshot(each.detach()) for each in small_tensors(self._value)]

    def handed(self) -> dict[int, Handed]:
        """The tensors that are read here, by identity."""
        return {id(each): Handed(self.place, weakref.ref(each)) for each in small_tensors(value_at(self.visit))}

    def shares_memory_with(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is the same memory as one that is read here."""
        storage = tensor.untyped_storage()._cdata
        return any(each.untyped_storage()._cdata == storage for each in self._tensors)

    def changes(self) -> list[Changed]:
        """What has been changed since: the value that is there; before a module that was left out also what stands for it."""
        visit = self.visit
        changed = [self._changed(visit.value if visit.kind is OUTPUT else (visit.args, visit.kwargs))]
        if visit.skipped and visit.kind is INPUT:  # at its output, it has been
            changed.append(self._as(visit.value, rebuilt=True, skipped=True))
        return [each for each in changed if each is not None]

    def _changed(self, value: Any) -> Changed | None:
        """What is another in `value` than it was."""
        now = [*tensors(value)]
        rebuilt = len(now) != len(self._tensors)
        versions = _versions(now)
        both = range(0 if rebuilt else len(now))
        replaced = frozenset(n for n in both if now[n] is not self._tensors[n])
        copies = zip(small_tensors(value), self._copies, strict=False)
        written = {id(each) for each, copy in copies if _is_rewritten(each, copy)}
        in_place = frozenset(
            n for n in both if n not in replaced and (versions[n] != self._versions[n] or id(now[n]) in written)
        )
        return self._as(value, replaced, in_place, rebuilt) if rebuilt or replaced or in_place else None

    def _as(
        self,
        value: Any,
        replaced: frozenset[int] = frozenset(),
        in_place: frozenset[int] = frozenset(),
        rebuilt: bool = False,
        skipped: bool = False,
    ) -> Changed:
        """A change to `value`, of which these tensors were replaced and these changed in place."""
        size = float("inf") if rebuilt else _size(self._copies, [*small_tensors(value)])
        node = next((each.grad_fn for n, each in enumerate(tensors(value)) if n in replaced | in_place or rebuilt), None)
        value = mapped(value, snapshot)
        return Changed(
            self.place, value, replaced, in_place, rebuilt, skipped, described(self._value), described(value), size, node
        )


class Journal:
    """What has happened in one forward pass."""

    def __init__(self, keep: bool) -> None:
        """Nothing has. With `keep` what modules give is kept."""
        self.keep = keep
        self.going: list[Going] = []
        self.kept: dict[Key, Kept] = {}
        self.last: dict[tuple[int, Kind], Place] = {}
        self.changes: dict[Key, list[Changed]] = {}  # of each place, in the order in which they are made again
        self.drawn: dict[Key, Random] = {}  # random numbers that were drawn or seeded from outside, by place
        self.begun_with: Random | None = None
        self.random: Random | None = None  # where the random numbers were at the last pause
        self.first: Place | None = None
        self.paused: Paused | None = None
        self.led = False  # on the way to a place, where nobody looks meanwhile
        self.forms: dict[int, tuple[torch.Size, torch.dtype]] = {}  # of what each module has given
        self.stale: dict[Key, Stale] = {}
        self._handed: dict[int, Handed] = {}
        self._out: list[tuple[Handed, torch.Tensor, int]] = []

    def come_next(self) -> Random:
        """The random numbers to go on with: those it was paused with, whatever other held runs have drawn meanwhile.

        Where the user has drawn or seeded, what that has left; it belongs to this run from now on.
        """
        now = Random.now()
        come_next = self.random if self.random is not None and now.same(Random.left) else now
        self.go_on_with(come_next)
        return come_next

    def go_on_with(self, random: Random) -> None:
        """Have these random numbers come next."""
        if self.random is None:
            self.begun_with = random
        elif self.paused is not None and not random.same(self.random):
            self.drawn[self.paused.place.key] = random
        self.random = random

    def changes_in(self, kept: Kept) -> dict[Key, list[Changed]]:
        """What was changed in a call, its arguments and its value included."""
        return {key: each for key, each in self.changes.items() if kept.has(key)}

    def last_at(self, module: torch.nn.Module, kind: Kind) -> Place | None:
        """The last time the model has come by the module, or is there now; by a part that nobody heard, with its owner."""
        here = None if self.paused is None else self.paused.place
        last = here if here is not None and here.module is module and here.kind is kind else self.last.get((id(module), kind))
        if last is None and isinstance(module, Part) and (around := self.last_at(module.owner, INPUT)) is not None:
            return Place(module, kind, around.step, around.times)
        return last

    def seen(self, at: Visit | None) -> tuple[dict[int, str], dict[int, str]]:
        """What has run in this step, what is running and where it is paused, and the last shape of each module, by identity."""
        step = at.step if at is not None else max((place.step for place in self.last.values()), default=0)
        states = {key: "ran" for (key, kind), place in self.last.items() if kind is OUTPUT and place.step == step}
        states |= {id(going.visit.module): "running" for going in self.going}
        shapes = {key: form_of(*form) for key, form in self.forms.items()}
        if at is None:
            return states, shapes
        now = first_tensor(at.value) if at.kind is OUTPUT else None
        shape = {} if now is None else {id(at.module): described(now)}
        return states | {id(at.module): "paused"}, shapes | shape

    def settle(self) -> None:
        """Note what has been changed where the run is paused."""
        if self.paused is None:
            return
        changes = self.paused.changes()
        if changes:
            self.changes[self.paused.place.key] = changes
        for (place, _), tensor, version in self._out:
            if _version(tensor) != version and not self.paused.shares_memory_with(tensor):
                self.stale[place.key] = Stale(place, described(tensor))

    def lead(self, begun_with: Random) -> None:
        """The run is led to a place from here on: what it stops at on the way is not what the user sees."""
        self.led, self.begun_with = True, begun_with

    def arrive(self, visit: Visit) -> None:
        """The run has been led to where the user is."""
        self.led = False
        self.random = Random.left = Random.now()
        self.pause_at(visit)

    def pause_at(self, visit: Visit) -> None:
        """The run is paused here; the model has gone on from what was read before."""
        self.paused = Paused(visit)
        alive = [(each, each.tensor()) for each in self._handed.values()]
        self._out = [(each, tensor, _version(tensor)) for each, tensor in alive if tensor is not None]
        self._handed = {id(tensor): each for each, tensor, _ in self._out}

    def go_on(self) -> None:
        """The run goes on from where it is paused."""
        self._out = []
        if self.paused is not None:
            self._handed |= self.paused.handed()

    def watch(self, visit: Visit) -> None:
        """The watcher of every module, on the model's stack: the model has come by."""
        place = visit.place
        if self.first is None:
            self.first = place
        self.last[id(visit.module), visit.kind] = place
        while self.going and not self.going[-1].visit.going_on:
            self.going.pop()  # it raised, and the model went on
        if visit.kind is INPUT:
            self.going.append(Going(visit, place))
            return
        value = visit.value
        tensor = value if isinstance(value, torch.Tensor) else first_tensor(value)
        if tensor is not None:
            self.forms[id(visit.module)] = tensor.shape, tensor.dtype
        # Of a part whose output alone was asked for nobody has heard that it began.
        heard = bool(self.going) and self.going[-1].visit is visit
        going = self.going.pop() if heard else Going(visit, place)
        if not self.keep:
            return
        going.inside[id(visit.module)] = place
        if self.going:
            self.going[-1].inside.update(going.inside)
        if heard:
            self._keep(visit, going)

    def _keep(self, visit: Visit, going: Going) -> None:
        """The module has made its value; what its children gave is not needed any more."""
        value, objects = frozen(visit.value), objects_of(visit)
        written = frozen(objects) if objects else None
        if value is not None and (written is not None or not objects) and not _aliased(value, visit):
            kept = [Kept(going.entered, going.inside, value, written, Random.now())]
        else:
            kept = going.kept
        if self.going:
            self.going[-1].kept += kept
        else:
            self.kept = {each.entered.key: each for each in kept}

    def all_kept(self) -> dict[Key, Kept]:
        """What is kept, by the place where the call began."""
        return self.kept | {each.entered.key: each for going in self.going for each in going.kept}


class HeldForward(Forward):
    """A model call that has its journal written."""

    __slots__ = ("journal", "left")

    by_hand = True
    again = "`run.restart()` begins it again, `run.back_to(...)` goes back to a point."

    def __init__(self, journal: Journal, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(function, *args, **kwargs)
        self.journal = journal
        self.left: Place | None = None

    def resume(self) -> Any:
        """Go on until the next pause; before, note what was changed during this one."""
        journal = self.journal
        if self._closing:
            return super().resume()
        journal.settle()
        if journal.led:
            self.left = journal.paused = None
            return super().resume()
        journal.come_next().put()
        journal.go_on()
        paused, journal.paused = journal.paused, None
        self.left = None if paused is None else paused.place
        try:
            visit = super().resume()
        except BaseException:
            journal.paused = None if self.finished else paused  # a refusal: it is where it was
            raise
        finally:
            journal.random = Random.left = Random.now()
        if visit is not None:
            journal.pause_at(visit)
            if journal.watch not in visit.watchers:  # a part of a module, asked for meanwhile
                visit.watchers = (*visit.watchers, journal.watch)
        return visit


def form_of(shape: torch.Size, dtype: torch.dtype) -> str:
    """A shape and a type as `described` writes them of a tensor."""
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def value_at(visit: Visit) -> Any:
    """What is read and replaced at a visit."""
    return visit.value if visit.kind is OUTPUT or visit.skipped else (visit.args, visit.kwargs)


def _version(tensor: torch.Tensor) -> int:
    """How often it has been changed in place; without a record, as under inference mode, always the same."""
    return 0 if tensor.is_inference() else tensor._version


def _versions(values: list[torch.Tensor]) -> list[int]:
    return [*map(_version, values)]


def _size(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """How large a change is, relative to what was changed."""
    pairs = [(one, other) for one, other in zip(before, after, strict=False) if not _equal(one, other)]
    if len(before) != len(after) or any(one.shape != other.shape or one.is_complex() for one, other in pairs):
        return float("inf")
    difference = sum(float((other.detach().double() - one.double()).square().sum()) for one, other in pairs) ** 0.5
    whole = sum(float(one.double().square().sum()) for one, _ in pairs) ** 0.5
    return difference / whole if whole else (float("inf") if pairs else 0.0)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same values; a NaN is what another is."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


def _is_rewritten(tensor: torch.Tensor, copy: torch.Tensor) -> bool:
    """Whether a tensor was changed in place, where torch keeps no record of that."""
    return tensor.is_inference() and not _equal(tensor, copy)


def objects_of(visit: Visit) -> list[Any]:
    """What a module is given that it can write into, and others can see: a key/value cache, a list."""
    found, todo = [], [*visit.args, *visit.kwargs.values()]
    for value in todo:
        if isinstance(value, tuple):
            todo.extend(value)
        elif value is not None and not isinstance(value, WRITTEN_BY_NOBODY):
            found.append(value)
    return found


WRITTEN_BY_NOBODY: Final = (torch.Tensor, bool, int, float, complex, str, bytes, *BY_REFERENCE)
"""What no module can write into, or what is noticed otherwise."""


def _aliased(value: Frozen, visit: Visit) -> bool:
    """Whether the output shares memory with an argument: what is done to one is done to the other."""
    made = {each.untyped_storage()._cdata for each in value.tensors}
    # Arguments that are tensors themselves, which is most of them, need not be looked for.
    return any(
        each.untyped_storage()._cdata in made
        for argument in (*visit.args, *visit.kwargs.values())
        for each in ((argument,) if isinstance(argument, torch.Tensor) else tensors(argument))
    )
