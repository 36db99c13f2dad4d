"""A run that several bodies ask of: one forward pass, and each body goes on when the model has come to where it waits.

    run = SharedRun(root, call, Memory(), bodies)
    run.finish()          # the bodies and the forward run to their ends

Bodies and model are resumed from the stack that opened the trace, one at a time. Before the model goes on, every body that can
go on has: at one visit the bodies run in the order written, again and again until nobody waits there.
"""

from collections.abc import Callable
from typing import Any

import torch

from .batching import factors_in
from .bodies import Awaited, Body
from .coroutine import current_stack, inside_forward
from .ears import Memory
from .errors import DeadlockError
from .nested import tensors
from .paths import spelled
from .run import Call, Run, Stop
from .visits import INPUT, OUTPUT, Kind, Visit
from .waiting import Waiting


class Share:
    """What one body sees of a visit: its own rows."""

    __slots__ = ("_body", "_path", "_run", "visit")

    def __init__(self, visit: Visit, body: Body, run: "SharedRun", path: str) -> None:
        self.visit = visit
        self._body = body
        self._run = run
        self._path = path

    @property
    def kind(self) -> Kind:
        """Where in the module's call the model is paused."""
        return self.visit.kind

    @property
    def args(self) -> tuple[Any, ...]:
        """The whole batch's positional arguments."""
        return self.visit.args

    @property
    def kwargs(self) -> dict[str, Any]:
        """The whole batch's keyword arguments."""
        return self.visit.kwargs

    @property
    def value(self) -> Any:
        """What the module returns for the whole batch."""
        return self.visit.value

    def inputs_unchanged(self) -> bool:
        """Whether the inputs still hold what the module received."""
        return self.visit.inputs_unchanged()

    def part(self, whole: Any, kind: str) -> Any:
        """The body's rows of `whole`, a value of this visit; what it shares with other bodies it must not change in place."""
        rows = self._body.rows
        if rows is None or self.has_all_rows:
            return whole
        seen = rows.seen(whole, self._run.factors, lambda: spelled(self._path, kind))
        if seen is whole or not isinstance(seen, torch.Tensor):
            self._body.lend(shared_tensors(seen, whole), spelled(self._path, kind))
        return seen

    def with_part(self, whole: Any, part: Any, kind: str) -> Any:
        """`whole` with the body's rows of it replaced."""
        rows = self._body.rows
        if rows is None:
            return part
        return rows.written(whole, part, self._run.factors, lambda: spelled(self._path, kind))

    @property
    def has_all_rows(self) -> bool:
        """Whether the body sees the whole batch."""
        rows = self._body.rows
        return rows is None or rows.stop - rows.start == rows.total


class SharedRun(Run):
    """One model call in progress, and the bodies that read and edit it."""

    __slots__ = ("_arguments", "_arrived", "_paused", "_running", "_stopped_early", "_waiting", "bodies")

    def __init__(self, root: torch.nn.Module, call: Call, memory: Memory, bodies: list[Body]) -> None:
        """Nothing runs yet, neither the model nor a body."""
        super().__init__(root, call, memory)
        self.bodies = bodies
        for number, body in enumerate(bodies):
            body.number = number
        self._arguments = (call.args, call.kwargs)
        self._running: Body | None = None
        self._waiting = Waiting()  # for the model
        self._arrived: list[Body] = []  # the model has come to what they waited for
        self._paused = [*bodies]  # for another body, or at their start
        self._stopped_early = False

    # Asking, on a body's stack

    def ask(self, module: torch.nn.Module, kind: Kind, path: str, further: bool = False) -> Any:
        """Pause the body until the model is at the visit; its share of the visit."""
        body = self._asking()
        body.check_lent()
        at = self.at
        if at is None or at.module is not module or further or not (at.kind is kind or kind is INPUT):
            visit = self._expected(module, kind, path, further)
            if kind is OUTPUT:
                visit.stop_after = True
            else:
                visit.stop_before = True
            self._wait(body, Awaited(visit, kind, path, further))
            if self.at is not visit:
                if visit not in self._waiting:
                    visit.stop_after = visit.stop_before = False
                self._missed(visit, kind, path, at, further)
            at = visit
        return Share(at, body, self, path)

    def to_step(self, step: int) -> bool:
        """Pause the body until `step` begins; `False` where the model ends before."""
        if self._forward.step < step and not self.finished:
            self._wait(self._asking(), Awaited(step=step))
        self._beyond = self.finished
        return not self.finished

    def _wait(self, body: Body, awaited: Awaited) -> None:
        """Pause the body until the model has come to this, or will not come to it any more."""
        self._waiting.add(body, awaited)
        body.wait(awaited)

    def replace(self, visit: Any, value: Any, path: str) -> None:
        """Have the model go on with the body's rows replaced by `value`."""
        whole = visit.visit
        before = whole.value if whole.kind is OUTPUT else (whole.args, whole.kwargs)
        super().replace(whole, visit.with_part(before, value, whole.kind), path)

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
        return lambda whole, kind: rows.seen(whole, self.factors, lambda: spelled(path, kind))

    def running(self) -> Body | None:
        """The body that calls this, if one does."""
        body = self._running
        return body if body is not None and current_stack() is body.stack else None

    def _asking(self) -> Body:
        body = self._running
        if body is None or current_stack() is not body.stack:
            raise inside_forward()
        return body

    def factors(self, total: int) -> set[int]:
        """By what the rows may be multiplied in this step: told by the arguments of the root's call."""
        visit = self._ears.visits.get(id(self.root))
        going_on = visit is not None and visit.forward is self._forward and visit.going_on
        return factors_in((visit.args, visit.kwargs) if going_on and visit is not None else self._arguments, total)

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
        self._serve()
        while not self.finished:
            if self._paused and not self._waiting:
                self._give_up()
            elif self._stopped_early and not self._waiting:
                return
            else:
                self._advance()
            self._serve()
        while self._paused:
            self._give_up()
            self._serve()
        super().finish()

    def _serve(self) -> None:
        """Let bodies go on, in the order written, until none can."""
        went_on = True
        while went_on:
            went_on = False
            arrived, self._arrived = self._arrived, []
            for body in sorted((*arrived, *self._paused), key=_number):
                if body.ready is None or body.ready():
                    went_on = True
                    self._let_go_on(body)

    def _let_go_on(self, body: Body) -> None:
        """Resume a body until it waits again, or ends."""
        if body in self._paused:
            self._paused.remove(body)
        before, self._running = self._running, body
        try:
            body.resume()
            if body.finished:
                body.check_lent()
            elif not body.wants_model:
                self._paused.append(body)
        except Stop as stop:
            if stop.run is not self:
                raise
            self._stopped_early = True
        finally:
            self._running = before

    def _advance(self) -> None:
        """Let the model go on until it comes to what some body waits for; an error is raised at that body's line."""
        forward = self._forward
        forward.awaited = self._waiting.in_step > 0
        forward.stop_before(self._waiting.next_step)
        at, self.at = self.at, None
        try:
            self.at = reached = forward.resume()
        except BaseException as error:
            self._stopped(error, at)
            self._arrived = sorted(self._waiting.all(), key=_number)
            if not self._arrived:
                raise
            self._arrived[0].refuse(error)
            return
        self._step_over = reached is None
        if self.finished:
            self._arrived = self._waiting.all()
        elif reached is None:
            self._arrived = self._waiting.step_over()
        else:
            self._arrived = self._waiting.at(reached, forward.step)

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

    def close(self) -> None:
        """End the bodies and the run wherever they are."""
        try:
            for body in self.bodies:
                body.close()
        finally:
            super().close()


def _number(body: Body) -> int:
    return body.number


def shared_tensors(seen: Any, whole: Any) -> Any:
    """What a body sees as it is in the whole batch's value, and rows that are one row in memory (`expand`)."""
    own = {id(each) for each in tensors(whole)}
    return [each for each in tensors(seen) if id(each) in own or (each.dim() and not each.stride(0))]
