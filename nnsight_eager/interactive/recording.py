"""A model call that can be made again, up to any place it has been at.

    recording = Recording(model, call, keep=True)
    run = recording.run(start)                   # begins it; `recording.journal` is written
    again = recording.again()
    run = again.follow(recording, start, place)  # another forward pass, paused at the same place

A coroutine cannot be copied, so this is a new forward pass with the same input, the same changes and the same random numbers.
What had been completed is passed over with what it gave, where that cannot be seen: see `Recording._passed_over`.
"""

import operator
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch

from ..changes import Change
from ..errors import NotReachedError, RunError
from ..inside import Part
from ..nested import mapped, tensors
from ..paths import spelled
from ..run import Call, Run
from ..snapshots import snapshot
from ..visits import INPUT, OUTPUT, Forward, Place, Visit
from .frozen import put_into
from .journal import Changed, HeldForward, Journal, Kept, Key, objects_of, value_at
from .random_numbers import Random

Start = Callable[[Call, Callable[..., Forward]], Run]
"""Makes a run of a call, whose coroutine is made by the second argument."""


class Weights:
    """The state of every module as it was at the start: what a module's call depends on beside its arguments."""

    def __init__(self, root: torch.nn.Module) -> None:
        self._at_start = [State.of(module) for module in root.modules()]
        # Copies, since some of torch's own functions change a buffer and do not count it as changed.
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in root.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def changed(self) -> set[int]:
        """The modules, by identity, whose own state is not what it was, or that have hooks, which call other code."""
        changed = {id(module) for module, name, buffer, copy in self._buffers if not _holds(module, name, buffer, copy)}
        changed.update(id(state.module) for state in self._at_start if state.changed())
        return changed

    def restore_buffers(self) -> None:
        """Put buffers that the model updates, such as the means of a batch norm in training, back to what they were."""
        for module, name, buffer, copy in self._buffers:
            if not _holds(module, name, buffer, copy):
                module._buffers[name] = buffer
                with torch.no_grad():
                    buffer.copy_(copy)


class Recording:
    """One model call: what it was given, how the model was, and the journal of what has happened."""

    def __init__(self, root: torch.nn.Module, call: Call, keep: bool) -> None:
        """With `keep` the outputs of completed modules are kept; a generation keeps none."""
        self._root = root
        self._call = call
        self._given = mapped((call.args, call.kwargs), torch.clone)
        self._weights = Weights(root)
        self._modules = [*root.modules()]
        self._keep = keep
        self.journal = Journal(keep and call.function is root)
        self.written: list[Change] = []  # by assignment: where the user has written it

    def again(self, keep: bool = True) -> "Recording":
        """The same call, of which nothing has happened yet; it keeps what this one does, or nothing."""
        again = object.__new__(Recording)
        again.__dict__.update(vars(self), journal=Journal(keep and self.journal.keep), written=[])
        args, kwargs = mapped(self._given, torch.clone)
        again._call = self._call._replace(args=args, kwargs=kwargs)
        return again

    def run(self, start: Start) -> Run:
        """Begin the call; every module is listened to."""
        run = start(self._call, partial(HeldForward, self.journal))
        self.written = run.changes
        run.watch_all(self._modules, self.journal.watch)
        return run

    def follow(self, earlier: "Recording", start: Start, place: Place) -> Run:
        """Begin the call and lead it to `place`, where `earlier` has been; what was changed there is not changed yet."""
        changed = self._weights.changed()
        if changed:
            self._modules = [*self._root.modules()]
        self._weights.restore_buffers()
        run = self.run(start)
        try:
            then = earlier.journal
            begun_with = then.begun_with or Random.now()
            begun_with.put()
            self.journal.lead(begun_with)
            places = (place, *(each.place for each in chain.from_iterable(then.changes.values())))
            for part in {each.module for each in places if isinstance(each.module, Part)}:
                run.watch(part, self.journal.watch)
            kept = {key: each for key, each in then.all_kept().items() if _can_be_passed_over(each, place, changed, then)}
            while (visit := run.walk()) is not None:
                if visit.place.key == place.key:
                    self.journal.arrive(visit)
                    return run
                self._pass(run, visit, earlier, kept)
        except BaseException:
            run.close()
            raise
        run.close()
        point = spelled(run.path_of(place.module), place.kind)
        if (id(place.module), place.kind) not in then.last:
            raise NotReachedError(
                f"The run has not come by `{point}`: the forward that it is in went another way.",
                "Name an operation that this call runs.",
                asked=point,
            )
        raise RunError(
            f"The forward pass did not come by `{point}` when it was run again.",
            "It does not run as before: something it depends on, beside its input and torch's random numbers, has changed.",
        )

    def _pass(self, run: Run, visit: Visit, earlier: "Recording", kept: dict[Key, Kept]) -> None:
        """Do at a place what was done there."""
        key, then = visit.place.key, earlier.journal
        if key in kept and visit.kind is INPUT and self._passed_over(run, visit, kept[key], earlier):
            return
        if key in then.changes:
            self.journal.pause_at(visit)
            for changed in then.changes[key]:
                self.change(run, visit, changed, earlier)
        if key in then.drawn:
            self.journal.drawn[key] = then.drawn[key]
            then.drawn[key].put()

    def _passed_over(self, run: Run, visit: Visit, kept: Kept, earlier: "Recording") -> bool:
        """Leave out the module's call and go on with a copy of what it gave; not where somebody waits for a point in it."""
        if not run.pass_over(visit, kept.value.thawed(), kept.inside.values()):
            return False
        journal, objects = self.journal, objects_of(visit)
        at = run.walk()
        assert at is visit
        journal.going[-1].inside.update(kept.inside)
        for number, there in kept.inside.items():
            if number in earlier.journal.forms:
                journal.forms[number] = earlier.journal.forms[number]
            journal.last |= {(number, INPUT): there._replace(kind=INPUT), (number, OUTPUT): there}
        for target, source in zip(objects, kept.objects.thawed() if kept.objects is not None else (), strict=True):
            put_into(target, source)
        for key, changes in earlier.journal.changes_in(kept).items():
            journal.changes[key] = changes  # in what the module gave; made again should it be called once more
            self._written_before(run, changes[0].place, earlier)
        journal.drawn |= {key: each for key, each in earlier.journal.drawn.items() if kept.has(key)}
        kept.random.put()
        return True

    def change(self, run: Run, visit: Visit, changed: Changed, earlier: "Recording") -> None:
        """Change a value as it was changed before, by the line that has done it."""
        value = mapped(changed.value, snapshot)
        if changed.skipped:
            run.leave_out(visit, value)
        elif changed.rebuilt:
            self._put(visit, value)
        else:
            new = [*tensors(value)]
            now = [*tensors(value_at(visit))]
            for number in changed.in_place:
                now[number].copy_(new[number])
            numbers = iter(range(len(now)))
            self._put(visit, mapped(value_at(visit), lambda each: new[n] if (n := next(numbers)) in changed.replaced else each))
        self._written_before(run, visit.place, earlier)

    @staticmethod
    def _written_before(run: Run, place: Place, earlier: "Recording") -> None:
        """Note which lines have changed the value at a place, as `earlier` has noted it."""
        points = [spelled(run.path_of(place.module), kind) for kind in (place.kind, "skip")]
        of_place = (each for each in earlier.written if each.point in points and each.step == place.step)
        run.changes += [each for each in of_place if each not in run.changes]

    @staticmethod
    def _put(visit: Visit, value: Any) -> None:
        """Have the model go on with an output, or with a pair of arguments."""
        if visit.kind is INPUT:
            visit.args, visit.kwargs = value
        else:
            visit.value = value


def _can_be_passed_over(kept: Kept, place: Place, changed: set[int], then: Journal) -> bool:
    """Whether nobody can tell that a module is not called again on the way to `place`.

    Its value was not changed in place afterwards, neither it nor what is in it has changed, and nothing was changed in place
    in it, which may have been changed outside of it too.
    """
    intact = kept.value.intact() and (kept.objects is None or kept.objects.intact())
    changes = then.changes_in(kept).items()
    outwards = any(each.in_place and key != kept.left for key, of_place in changes for each in of_place)
    same = not changed or changed.isdisjoint(map(id, kept.entered.module.modules()))
    owner = place.module.owner if isinstance(place.module, Part) else place.module  # of a part it may not have been heard
    return (
        intact
        and same
        and not outwards
        and not kept.has(place.key)
        and not kept.has((id(owner), OUTPUT, place.step, place.times))
    )


class State(NamedTuple):
    """What a module's call depends on beside its arguments: its attributes, as references, and how often each was changed."""

    module: torch.nn.Module
    attributes: list[Any]
    versions: list[int]

    @classmethod
    def of(cls, module: torch.nn.Module) -> "State":
        """What it is now."""
        own = vars(module)
        parameters = own["_parameters"].values()
        attributes = [*own.values(), *parameters, *own["_buffers"].values(), *own["_modules"].values()]
        if "forward" in own:  # a tap's
            del attributes[[*own].index("forward")]
        versions = [0 if each is None or each.is_inference() else each._version for each in parameters]
        return cls(module, attributes, versions)

    def changed(self) -> bool:
        """Whether it is another by now, or the module has hooks, which call other code."""
        if self.module._forward_hooks or self.module._forward_pre_hooks:
            return True
        _, attributes, versions = State.of(self.module)
        return (
            versions != self.versions
            or len(attributes) != len(self.attributes)
            or not all(map(operator.is_, attributes, self.attributes))
        )


def _holds(module: torch.nn.Module, name: str, buffer: torch.Tensor, copy: torch.Tensor) -> bool:
    """Whether a module has the buffer it had, with the values it had."""
    return module._buffers.get(name) is buffer and torch.equal(buffer, copy)
