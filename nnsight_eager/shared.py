"""A run that several bodies ask of: one forward pass, and each body goes on when the model has come to where it waits.

    run = SharedRun(root, call, memory, bodies)
    run.finish()          # the bodies and the forward run to their ends

Bodies and model are resumed from the stack that opened the trace, one at a time. Before the model goes on, every body that can
go on has: at one visit the bodies run in the order written, again and again until nobody waits there.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, Protocol

import torch

from .batching import Factors, factors_in, is_routed
from .bodies import Asker, Awaited, Body, Caller, say_one_graph
from .coroutine import current_stack, inside_forward
from .current import enter_bodies
from .ears import Memory
from .errors import DeadlockError, RunEndedError
from .lending import Lending, held
from .paths import spelled
from .run import Call, Run, Stop
from .share import Share
from .tuples import explain
from .visits import FIRST, INPUT, NEXT_IN_STEP, OUTPUT, Forward, Kind, Place, Visit, Which
from .waiting import Waiting


class Stored(Protocol):
    """A stored edit."""

    def body(self, run: "SharedRun") -> Body:
        """The edit as a body of one run."""


class SharedRun(Run):
    """One model call in progress, and the bodies that read and edit it."""

    __slots__ = ("_arguments", "_arrived", "_caller", "_closing", "_left_early", "_lending", "_paused", "_running",
        "_stoppable", "_waiting", "bodies")  # fmt: skip

    def __init__(
        self,
        root: torch.nn.Module,
        call: Call,
        memory: Memory,
        bodies: Sequence[Body],
        edits: Sequence[Stored] = (),
        make: Callable[..., Forward] = Forward,
    ) -> None:
        """Nothing runs yet, neither the model nor a body; `edits` go before the bodies."""
        self.bodies = [*(edit.body(self) for edit in edits), *bodies]
        for number, body in enumerate(self.bodies):
            body.number = number
        self._arguments = (call.args, call.kwargs)
        self._caller = Caller(self)
        self._running: Body | None = None
        self._lending = Lending()
        self._waiting = Waiting()  # for the model
        self._arrived: list[Body] = []  # the model has come to what they waited for
        self._paused = [*self.bodies]  # for another body, or at their start
        self._stoppable, self._left_early = len(bodies), 0
        self._closing = False
        super().__init__(root, call, memory, make)  # last: from here on there is something to be closed

    # Asking, on a body's stack

    def ask(self, module: torch.nn.Module, kind: Kind, path: str, which: Which = FIRST) -> Any:
        """Pause the body until the model is at the visit; its share of the visit."""
        body = self._asking()
        if self._closing:
            raise RunEndedError("This run is being closed.", "Read points before the block is left.")
        at = self.at
        if at is None or at.module is not module or which or not (at.kind is kind or kind is INPUT):
            if body.asked is not None:
                body.asked.append(module)
            visit = self._expected(module, kind, path, which)
            before = None if at is None else at.place
            if kind is OUTPUT:
                visit.stop_after = True
            else:
                visit.stop_before = True
            until = self._until(visit) if which is NEXT_IN_STEP else None
            self._wait(body, Awaited(visit, kind, path, which, until=until))
            if self.at is not visit:
                if visit not in self._waiting:
                    visit.stop_after = visit.stop_before = False
                self._missed(visit, kind, path, before, which)
            at = visit
            body.reached += 1
        return Share(at, body, self, path)

    def apply(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> Any:
        """Pause the body until the model's forward pass has called the module; what it returns."""
        applied = self._applied(module, args, kwargs, path)
        self._wait(self._asking(), Awaited(path=path, applied=applied))
        return applied.result()

    def ran(self, modules: Iterable[torch.nn.Module], step: int) -> list[str]:
        """The paths of those modules that run in `step`, as far as is known."""
        return [self.path_of(each) for each in modules if self._ears.order.runs(each, step)]

    def to_step(self, step: int) -> bool:
        """Pause the body until `step` begins; `False` where the model ends before."""
        body = self._asking()
        if self._forward.step < step:
            if not self.finished:
                self._wait(body, Awaited(step=step))
            body.beyond = self.finished
        return not self.finished

    def _wait(self, body: Asker, awaited: Awaited) -> None:
        """Pause the body until the model has come to this, or will not come to it any more."""
        self._waiting.add(body, awaited)
        body.wait(awaited)

    def replace(self, visit: Any, value: Any, path: str) -> None:
        """Have the model go on with the body's rows replaced by `value`."""
        at, body = visit.visit, self._asking()
        if not visit.has_all_rows:
            self.settle(body)
            self.put_together(at)
            value = self._written(body, held(at), self._lending.replaces(body, value), path)
        super().replace(at, value, path)

    def lend(self, visit: Visit, body: Asker, whole: Any, path: str, kind: str) -> Any:
        """The body's rows of a value of the visit."""
        rows = body.rows
        if rows is None or rows.all:
            return whole
        return self._lending.lend(visit, body, rows, whole, self._factors_at(path), lambda: spelled(path, kind))

    def _missed(self, visit: Visit, kind: Kind, path: str, before: Visit | Place | None, which: Which = FIRST) -> NoReturn:
        self._beyond = self._asking().beyond  # what this body has gone on to, whatever the others have
        super()._missed(visit, kind, path, before, which)

    def put_together(self, visit: Visit) -> None:
        """Have the visit hold what the bodies hold of it."""
        self._lending.put_together(visit)

    def settle(self, body: Asker) -> None:
        """Make the model's what the body has exchanged in the containers it was given."""
        at = self.at
        if at is not None:
            self._lending.settle(body, at, lambda whole, part: self._written(body, whole, part, self.path_of(at.module)))

    def _written(self, body: Asker, whole: Any, part: Any, path: str) -> Any:
        """`whole` with the body's rows replaced by `part`."""
        rows, at = body.rows, self.at
        assert at is not None
        return part if rows is None else rows.written(whole, part, self._factors_at(path), lambda: spelled(path, at.kind))

    def skip(self, visit: Any, value: Any, path: str) -> None:
        """Go on with `value` as the module's output; the module still runs where it has other bodies' rows to compute."""
        if visit.has_all_rows:
            super().skip(visit.visit, value, path)
        else:
            self.replace(self.ask(visit.visit.module, OUTPUT, path), value, path)

    def view(self, path: str) -> Callable[[Any, str], Any]:
        """What the body that asks sees of a value of the module at `path`: its rows; outside every body, all of it."""
        body = self.running()
        rows = body.rows if body is not None else None
        if rows is None:
            return super().view(path)
        factors = self._factors_at(path)
        return lambda whole, kind: rows.seen(whole, factors, lambda: spelled(path, kind))

    def whole(self, whole: Any, part: Any, path: str, kind: str) -> Any:
        """`whole` with `part` in the place of what the body that asks sees of it."""
        body = self.running()
        rows = body.rows if body is not None else None
        return part if rows is None else rows.written(whole, part, self._factors_at(path), lambda: spelled(path, kind))

    def runs_on(self, stack: Any) -> bool:
        """Whether `stack` is that of the body which is running."""
        return self._running is not None and self._running.stack is stack

    def running(self) -> Body | None:
        """The body that calls this, if one does."""
        body = self._running
        return body if body is not None and current_stack() is body.stack else None

    def _asking(self) -> Asker:
        """Whoever this is called by: a body, or the code of the trace."""
        body = self.running()
        if body is not None:
            return body
        if self._running is not None or current_stack() is self._stack:
            raise inside_forward()
        return self._caller

    def go_on(self) -> None:
        """Let the model come to the next point that somebody waits for, and the bodies that wait there go on."""
        self._serve()
        self._advance()
        self._serve()

    def _factors_at(self, path: str) -> Factors:
        """By what the rows may be multiplied at `path` in this step: told by the arguments of the root's call."""
        routed = is_routed(self._ears.memory.aliases.own(path))
        return None if routed else lambda total: factors_in(self.arguments, total)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the root is called with in this step; before its call, what the run was."""
        visit = self._ears.visits.get(id(self.root))
        if visit is not None and visit.forward is self._forward and visit.going_on:
            return visit.args, visit.kwargs
        return self._arguments

    # Going on, on the stack that opened the trace

    def finish(self) -> None:
        """Let every body and the model run to the end; in a body, wait for the model's."""
        body = self.running()
        if body is not None:
            self._refuse_ended()
            if not self.finished:
                self._wait(body, Awaited())
            self._refuse_ended()
            return
        try:
            self._finish()
        except BaseException as error:
            for label, closing in self._close_bodies():
                error.add_note(f"While {label} was closed it raised {type(closing).__name__}: {closing}")
            raise

    def close(self) -> None:
        """End the bodies and the run wherever they are."""
        raised = self._close_bodies() if self.open else []
        super().close()
        for _, error in raised:
            raise error

    def _finish(self) -> None:
        self._serve()
        while self._paused or not self.finished:
            if self._paused and (self.finished or not self._waiting):
                self._give_up()
            elif self._left_early and self._left_early == self._stoppable:
                return
            else:
                self._advance()
            self._serve()
        super().finish()

    def _close_bodies(self) -> list[tuple[str, Exception]]:
        """Run the `finally` blocks of every body; what they have raised."""
        self._closing = True
        raised = []
        for body in self.bodies:
            self._running = body
            try:
                body.close()
            except Exception as error:
                raised.append((body.label, error))
        self._running = None
        return raised

    def _serve(self) -> None:
        """Let bodies go on, in the order written, until none can."""
        leave = enter_bodies(self)
        try:
            went_on = True
            while went_on:
                went_on = False
                arrived, self._arrived = self._arrived, []
                for body in sorted((*arrived, *self._paused), key=_number):
                    if body.ready is None or body.ready():
                        went_on = True
                        self._let_go_on(body)
        finally:
            leave()

    def _let_go_on(self, body: Body) -> None:
        """Resume a body until it waits again, or ends."""
        if body in self._paused:
            self._paused.remove(body)
        before, self._running = self._running, body
        try:
            body.resume()
            if not (body.finished or body.wants_model):
                self._paused.append(body)
            self.settle(body)
        except Stop as stop:
            if stop.run is not self:
                raise
            self._left_early += 1
        except Exception as error:
            explain(error, self)
            if len(self.bodies) > 1:
                say_one_graph(error)
            raise
        finally:
            self._running = before

    def _advance(self) -> None:
        """Let the model go on until it comes to what some body waits for; an error is raised at that body's line."""
        forward = self._forward
        forward.awaited = self._waiting.in_step > 0
        forward.stop_before(self._waiting.next_step)
        self._lending.give_back(self.at)
        at, self.at = self.at, None
        try:
            self.at = reached = forward.resume()
        except BaseException as error:
            self._stopped(error, at)
            waiting = sorted(self._waiting.all(), key=_number)
            if any(isinstance(each, Caller) for each in waiting):
                raise
            self._arrive(waiting)
            if not self._arrived:
                raise
            self._arrived[0].refuse(error)
            return
        self._step_over = reached is None
        if self.finished:
            self._arrive(self._waiting.all())
        elif reached is None:
            self._arrive(self._waiting.step_over())
        else:
            self._arrive(self._waiting.at(reached, forward.step))

    def _arrive(self, askers: list[Asker]) -> None:
        """These have what they waited for: bodies go on when it is their turn, the caller after them."""
        self._arrived = [each for each in askers if isinstance(each, Body)]
        for each in askers:
            if isinstance(each, Caller):
                each.arrived = True

    def _give_up(self) -> None:
        """No body can go on and none waits for the model: have the first of them raise what tells so."""
        waiting = sorted(self._paused, key=_number)
        who = "; ".join(f"{body.label} waits for {body.waits_for}" for body in waiting)
        ended = [body.label for body in self.bodies if body.finished]
        gone = f" {' and '.join(ended)} {'has' if len(ended) == 1 else 'have'} ended without it." if ended else ""
        waiting[0].refuse(
            DeadlockError(
                f"No invoke can go on: {who}.{gone}",
                "Have every party of a barrier come to it, and bind a name in an earlier invoke above what waits for it.",
                waiting=[body.label for body in waiting],
            )
        )


def _number(body: Asker) -> int:
    return body.number
