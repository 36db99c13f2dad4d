"""The bodies that wait for the model, by what they wait for.

waiting.add(body, Awaited(visit, "output", "transformer.h.5"))
waiting.at(visit, step=0)       # the model is paused at the visit: the bodies that waited for this
"""

from collections.abc import Callable
from typing import Final

from .bodies import Asker, Awaited
from .visits import Visit

Entry = tuple[Asker, Awaited]
LATER: Final = None
"""In the place of a visit: a step, or the end."""


class Waiting:
    """Who waits for which visit, step or end."""

    __slots__ = ("_entries", "in_step")

    def __init__(self) -> None:
        self._entries: dict[Visit | None, list[Entry]] = {}
        self.in_step = 0
        """How many wait for a point of the current step, so that its end has to be told."""

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __contains__(self, visit: Visit) -> bool:
        return visit in self._entries

    def add(self, body: Asker, awaited: Awaited) -> None:
        """Note that `body` waits for this."""
        for visit in awaited.visits:
            self._entries.setdefault(visit, []).append((body, awaited))
        self.in_step += awaited.in_step

    @property
    def next_step(self) -> int | None:
        """The first step that somebody waits for."""
        steps = (awaited.step for _, awaited in self._entries.get(LATER, ()))
        return min((step for step in steps if step is not None), default=None)

    def at(self, visit: Visit, step: int) -> list[Asker]:
        """The model is paused at `visit` in `step`: who waited for that waits no longer."""
        here = self._take(visit, lambda awaited: awaited.comes_at(visit)) if visit in self._entries else []
        return here + self._take(LATER, lambda awaited: awaited.applied.done if awaited.applied else awaited.comes_in(step))

    def step_over(self) -> list[Asker]:
        """The step has ended: who waited for a point in it waits no longer."""
        return [body for visit in [*self._entries] for body in self._take(visit, lambda awaited: awaited.in_step)]

    def all(self) -> list[Asker]:
        """The model has ended: nobody waits any longer."""
        return [body for visit in [*self._entries] for body in self._take(visit, lambda _: True)]

    def _take(self, visit: Visit | None, wanted: Callable[[Awaited], bool]) -> list[Asker]:
        """Remove those entries at one place that are `wanted`; their bodies."""
        gone = [entry for entry in self._entries.get(visit, ()) if wanted(entry[1])]
        for entry in gone:
            for place in entry[1].visits:
                entries = self._entries[place]
                entries.remove(entry)
                if not entries:
                    del self._entries[place]
        self.in_step -= sum(awaited.in_step for _, awaited in gone)
        return [body for body, _ in gone]
