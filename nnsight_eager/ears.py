"""One run's ears at the modules of its model: put up where somebody asks, taken down when the run ends.

    ears = Ears(root, "forward", forward, memory)
    ears.at(layer).stop_after = True      # the forward pauses when the layer has its output
    ears.take_down()

A listening module costs a little, so a run listens only where it is asked to, at what encloses that, and at what is known to be
visited several times; the first run of a kind of call listens everywhere and learns what that is.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch

from .aliases import Aliases
from .compiled import CALL, ORIGINAL, Eagerly, keep_the_compiler_out, tell
from .distributed.first import is_distributed
from .errors import RunEndedError
from .fast_paths import FAST, Unfused
from .inside import Apart, Part
from .order import Order
from .paths import modules_above, path_in, spelled
from .taps import ABSENT, put_innermost, put_up, take_down, tap_at
from .visits import Between, Forward, RootVisit, Visit

P = TypeVar("P", bound=Part)


class Memory:
    """What the runs of one model leave for the next: the order learned for each kind of call, ears and parts to use again."""

    __slots__ = ("aliases", "alone", "between", "orders", "parts", "told", "visits")

    def __init__(self, aliases: Aliases) -> None:
        """Nothing has run yet. `aliases` are the model's other names, which messages use."""
        self.aliases = aliases
        self.orders: dict[str, Order] = {}
        self.visits: dict[int, Visit] = {}
        self.parts: dict[Hashable, Part] = {}
        self.told = False  # whether the user knows
        self.alone = False  # nothing is to stand between
        self.between: Between | None = None  # looked for before the first run of each kind of call

    def look_between(self, root: torch.nn.Module, name: str) -> Between | None:
        """What stands between the model and whoever asks, where several processes run it together."""
        if self.between is None and not self.alone and name not in self.orders and is_distributed():
            from .distributed.spread import spread_over

            self.between = spread_over(root)
        return self.between

    def forward(self, root: torch.nn.Module, name: str, make: Callable[..., Forward]) -> Callable[..., Forward]:
        """What makes the forwards of this kind of call, where `make` would."""
        between = self.look_between(root, name)
        return make if between is None else between.forward(make)

    def part(self, key: Hashable, make: Callable[[], P]) -> P:
        """The part of this key: one for all runs of the model."""
        if key not in self.parts:
            self.parts[key] = make()
        return self.parts[key]  # type: ignore[return-value]


class Ears:
    """The ears of one run, by the identity of their module."""

    __slots__ = ("_around", "_eagerly", "_forward", "_name", "_put_up", "_root", "_stack", "_unfused", "apart", "memory",
        "open", "order", "visits")  # fmt: skip

    def __init__(self, root: torch.nn.Module, name: str, forward: Forward, memory: Memory) -> None:
        """No module listens yet. `name` is the kind of call, `memory` what earlier runs of this model have left."""
        self._root = root
        self._name = name
        self._forward = forward
        self._stack = forward.stack
        self.memory = memory
        # Taken, so that a second run at the same time has ears of its own.
        self.visits, memory.visits = memory.visits, {}
        self.open = True
        self._put_up: list[Visit] = []
        self._unfused: list[Unfused] = []
        self.apart: dict[Hashable, Apart] = {}
        self._eagerly = Eagerly()
        self._around: frozenset[int] | None = None
        self.order = memory.orders.get(name) or Order()

    def begin(self, several_steps: bool) -> None:
        """Listen where a run always does; `several_steps` says that the call may run the root several times, or not at all."""
        keep_the_compiler_out()
        if self._name not in self.memory.orders:
            self._forward.learn(self.order)
            self._listen_at(self._root.modules())
        elif self.order.repeats:
            self._listen_at(self.order.repeated)
        if several_steps:
            self._listen_at((self._root,))

    def at(self, module: torch.nn.Module) -> Visit:
        """The ear at `module`, put up where there is none yet."""
        visit = self.visits.get(id(module))
        return visit if visit is not None and visit.forward is self._forward else self._listen(module, visit)

    def path_of(self, module: torch.nn.Module) -> str:
        """Where a module or a part stands, in the names the user has given."""
        return self.memory.aliases.shown(path_in(self._root, module))

    @property
    def learning(self) -> bool:
        """Whether this run is the first of its kind of call."""
        return self._forward.order is not None

    @property
    def step(self) -> int:
        """The step the model is in."""
        return self._forward.step

    def of_part(self, part: Part) -> Apart:
        """How the owner of `part` is made to call it in this run; from here on it is."""
        apart = self.apart.get(part.key)
        if apart is None:
            self.at(part.owner)
            apart = self.apart[part.key] = part.apart(self._stack)  # kept before it begins: Ctrl-C may come in between
            apart.begin()
        return apart

    def learned(self) -> None:
        """The run has come to its end: what it has learned holds for later ones."""
        if self._forward.order is not None:
            self.memory.orders[self._name] = self.order

    def take_down(self) -> None:
        """Take every ear out of its module, and let owners call no part apart."""
        take_down(self._put_up)
        take_down(self._unfused)
        self._eagerly.end()
        while self.apart:
            key = next(reversed(self.apart))
            self.apart[key].end()
            del self.apart[key]

    def put_away(self, cut_short: bool) -> None:
        """Leave the ears to later runs; done once the forward has ended, whose frames use them."""
        for visit in self._put_up:
            if cut_short or visit.going_on or visit.stop_after or visit.stop_before:  # the last where the forward has failed
                visit.rest()
            visit.forward, visit.gave, visit.watchers = None, None, ()
            if visit.spent:
                self.visits.pop(id(visit.module), None)
        self.memory.visits = self.visits

    def forget(self) -> None:
        """Refer to no ear any more, and put up none."""
        self.open = False
        self._put_up, self.visits = [], {}

    def _listen(self, module: torch.nn.Module, visit: Visit | None) -> Visit:
        """Put up an ear at `module`, and at those around it, since their ends can be asked for from inside."""
        if visit is None or visit.module is not module:
            visit = self._new_ear(module)
        visit.forward = self._forward
        visit.step = -1
        self._put_up.append(visit)
        put_up(visit, self._stack)
        if isinstance(module, Part):
            self.of_part(module).hear(module, visit)
        elif CALL in visit.own or visit._original is not ABSENT or hasattr(visit.__wrapped__, ORIGINAL):
            self._run_eagerly(visit)
        if isinstance(module, FAST):
            self._unfused.append(Unfused.of(module, self.visits))  # kept before it is put up, as above
            put_innermost(self._unfused[-1], self._stack)
        if self.learning:
            return visit  # every module listens
        around = self.order.around.get(id(module))
        if around is None:
            self._listen_at(modules_above(self._root, module))
        elif around is not self._around:
            self._around = around
            self._listen_at(self.order.living(around))
        return visit

    def _run_eagerly(self, visit: Visit) -> None:
        """Have a compiled module run as it is written, and say so the first time."""
        if self._eagerly.call(visit) and not self.memory.told:
            self.memory.told = True
            tell(spelled(self.path_of(visit.module)))

    def _listen_at(self, modules: Iterable[torch.nn.Module]) -> None:
        """Put up an ear at each of these modules that has none."""
        for module in modules:
            self.at(module)

    def _new_ear(self, module: torch.nn.Module) -> Visit:
        """An ear for `module`, which later runs use again."""
        if not self.open:
            in_a_block = "Read points inside the `with` block, or open a new trace."
            raise RunEndedError("This run has ended.", self._forward.again if self._forward.by_hand else in_a_block)
        kind: Any = RootVisit if module is self._root else Visit
        if self.memory.between is not None:
            kind = self.memory.between.ear(kind)
        visit: Visit = tap_at(kind(), module)
        visit.rest()
        self.visits[id(module)] = visit  # whole before it is kept: Ctrl-C may come between any two lines
        return visit
