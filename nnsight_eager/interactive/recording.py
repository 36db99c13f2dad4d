"""A model call that can be made again, up to any place it has been at.

    recording = Recording(model, call, keep=True)
    run = recording.run(start)                   # begins it; `recording.journal` is written
    again = recording.again()
    run = again.follow(recording, start, place)  # another forward pass, paused at the same place

A coroutine cannot be copied, so this is a new forward pass with the same input, the same changes and the same random numbers.
What had been completed is passed over with what it gave, where that cannot be seen: see `Recording._passed_over`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..changes import change
from ..errors import RunError
from ..inside import Part
from ..nested import mapped, tensors
from ..paths import spelled
from ..run import Call, Run
from ..visits import INPUT, OUTPUT, Forward, Place, Visit
from .frozen import put_into
from .journal import Changed, HeldForward, Journal, Kept, Key, objects_of, value_at

Start = Callable[[Call, Callable[..., Forward]], Run]
"""Makes a run of a call, whose coroutine is made by the second argument."""


class Weights:
    """The state of every module as it was at the start: what a module's call depends on beside its arguments."""

    def __init__(self, root: torch.nn.Module) -> None:
        self._at_start = {id(module): _state(module) for module in root.modules()}
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
        for number, (module, state) in self._at_start.items():
            if module._forward_hooks or module._forward_pre_hooks or not _same(_state(module)[1], state):
                changed.add(number)
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
        self._keep = keep
        self.journal = Journal(keep and call.function is root)

    def again(self) -> "Recording":
        """The same call, of which nothing has happened yet."""
        again = object.__new__(Recording)
        again.__dict__.update(vars(self), journal=Journal(self.journal.keep))
        args, kwargs = mapped(self._given, torch.clone)
        again._call = self._call._replace(args=args, kwargs=kwargs)
        return again

    def run(self, start: Start) -> Run:
        """Begin the call; every module is listened to."""
        run = start(self._call, partial(HeldForward, self.journal))
        for module in self._root.modules():
            run.watch(module, self.journal.watch)
        return run

    def follow(self, earlier: "Recording", start: Start, place: Place) -> Run:
        """Begin the call and lead it to `place`, where `earlier` has been; what was changed there is not changed yet."""
        changed = self._weights.changed()
        self._weights.restore_buffers()
        run = self.run(start)
        try:
            then = earlier.journal
            if then.begun_with is not None:
                then.begun_with.put()
            places = (place, *(each.place for each in then.changes.values()))
            for part in {each.module for each in places if isinstance(each.module, Part)}:
                run.watch(part, self.journal.watch)
            kept = {key: each for key, each in then.all_kept().items() if _can_be_passed_over(each, place, changed, then)}
            while (visit := run.walk()) is not None:
                if visit.place.key == place.key:
                    return run
                self._pass(run, visit, then, kept)
        except BaseException:
            run.close()
            raise
        run.close()
        raise RunError(
            f"The forward pass did not come by `{spelled(run.path_of(place.module), place.kind)}` when it was run again.",
            "It does not run as before: something it depends on, beside its input and torch's random numbers, has changed.",
        )

    def _pass(self, run: Run, visit: Visit, then: Journal, kept: dict[Key, Kept]) -> None:
        """Do at a place what was done there."""
        key = visit.place.key
        if key in kept and visit.kind is INPUT and self._passed_over(run, visit, kept[key], then):
            return
        if key in then.changes:
            self.change(run, visit, then.changes[key])
        if key in then.drawn:
            then.drawn[key].put()

    def _passed_over(self, run: Run, visit: Visit, kept: Kept, earlier: Journal) -> bool:
        """Leave out the module's call and go on with a copy of what it gave; not where somebody waits for a point in it."""
        if not run.pass_over(visit, kept.value.thawed(), kept.inside.values()):
            return False
        journal, objects = self.journal, objects_of(visit)
        journal.paused = None  # not a change of the user's
        at = run.walk()
        assert at is visit
        journal.going[-1].inside.update(kept.inside)
        journal.changes |= earlier.changes_in(kept)
        journal.drawn |= {key: each for key, each in earlier.drawn.items() if kept.has(key)}
        for number, there in kept.inside.items():
            if number in earlier.shapes:
                journal.shapes[number] = earlier.shapes[number]
            journal.last |= {(number, INPUT): there._replace(kind=INPUT), (number, OUTPUT): there}
        for target, source in zip(objects, kept.objects.thawed() if kept.objects is not None else (), strict=True):
            put_into(target, source)
        kept.random.put()
        return True

    def change(self, run: Run, visit: Visit, changed: Changed) -> None:
        """Change a value as it was changed before."""
        value = mapped(changed.value, torch.clone)
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
        run.changes.append(change(spelled(run.path_of(visit.module), visit.kind), visit.step, changed.before, changed.after))

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
    outwards = any(each.in_place and key != kept.left for key, each in then.changes_in(kept).items())
    return intact and not outwards and not kept.has(place.key) and changed.isdisjoint(map(id, kept.entered.module.modules()))


def _state(module: torch.nn.Module) -> tuple[torch.nn.Module, list[Any]]:
    """A module, and what its call depends on, as references; how often a parameter of its own was changed."""
    own = vars(module)
    state = [value for name, value in own.items() if name not in ("forward", "_parameters", "_buffers", "_modules")]
    for value in own["_parameters"].values():
        state += (value, None if value is None or value.is_inference() else value._version)
    return module, [*state, *own["_buffers"].values(), *own["_modules"].values()]


def _same(state: list[Any], before: list[Any]) -> bool:
    if len(state) != len(before):
        return False
    return all(one is other or (type(one) is int and one == other) for one, other in zip(state, before, strict=True))


def _holds(module: torch.nn.Module, name: str, buffer: torch.Tensor, copy: torch.Tensor) -> bool:
    """Whether a module has the buffer it had, with the values it had."""
    return module._buffers.get(name) is buffer and torch.equal(buffer, copy)
