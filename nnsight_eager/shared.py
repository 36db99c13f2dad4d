"""A run that several bodies ask of: one forward pass, and each body goes on when the model has come to where it waits.

    run = SharedRun(root, call, Memory(), bodies)
    run.finish()          # the bodies and the forward run to their ends

Bodies and model are resumed from the stack that opened the trace, one at a time. Before the model goes on, every body that can
go on has: at one visit the bodies run in the order written, again and again until nobody waits there.
"""

from typing import Any, NoReturn

import torch

from .batching import Factors, factors_in, is_routed
from .bodies import Awaited, Body
from .coroutine import inside_forward
from .errors import DeadlockError
from .nested import tensors
from .paths import spelled
from .run import Call, Memory, Run, Stop
from .visits import INPUT, OUTPUT, Kind, Place, Visit


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
        point = spelled(self._path, kind)
        seen = rows.seen(whole, self._factors(rows.total), point)
        self._body.lend(shared_tensors(seen, whole), point)
        return seen

    def with_part(self, whole: Any, part: Any, kind: str) -> Any:
        """`whole` with the body's rows of it replaced."""
        rows = self._body.rows
        if rows is None:
            return part
        return rows.written(whole, part, self._factors(rows.total), spelled(self._path, kind))

    def _factors(self, total: int) -> Factors:
        return None if is_routed(self._path) else self._run.factors(total)

    @property
    def has_all_rows(self) -> bool:
        """Whether the body sees the whole batch."""
        rows = self._body.rows
        return rows is None or rows.stop - rows.start == rows.total


class SharedRun(Run):
    """One model call in progress, and the bodies that read and edit it."""

    __slots__ = ("_arguments", "_pauses", "_stopped_early", "bodies")

    def __init__(self, root: torch.nn.Module, call: Call, memory: Memory, bodies: list[Body]) -> None:
        """Nothing runs yet, neither the model nor a body."""
        super().__init__(root, call, memory)
        self.bodies = bodies
        self._arguments = (call.args, call.kwargs)
        self._pauses = 0
        self._stopped_early = False

    # Asking, on a body's stack

    def ask(self, module: torch.nn.Module, kind: Kind, path: str, further: bool = False) -> Any:
        """Pause the body until the model is at the visit; its share of the visit."""
        body = self._asking()
        body.check_lent()
        at = self.at
        if at is None or at.module is not module or further or not (at.kind is kind or kind is INPUT):
            visit = self._expected(module, kind, path, further)
            before = None if at is None else Place(at.module, at.kind)
            self._await(body, Awaited(visit, kind, further, since=self._pauses), f"`{spelled(path, kind)}`")
            if self.at is not visit:
                visit.stop_after = visit.stop_before = False
                self._missed(visit, kind, path, before, further)
            at = visit
        return Share(at, body, self, path)

    def to_step(self, step: int) -> bool:
        """Pause the body until `step` begins; `False` where the model ends before."""
        body = self._asking()
        if self._forward.step < step:
            self._await(body, Awaited(step=step), f"step {step}")
            body.beyond = self._forward.finished
        return not self._forward.finished

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

    def running(self) -> Body | None:
        """The body that calls this, if one does."""
        return next((body for body in self.bodies if body.running), None)

    def _asking(self) -> Body:
        body = self.running()
        if body is None:
            raise inside_forward()
        return body

    def _missed(self, visit: Visit, kind: Kind, path: str, before: Visit | Place | None, further: bool = False) -> NoReturn:
        self._beyond = self._asking().beyond  # what this body has gone on to, whatever the others have
        super()._missed(visit, kind, path, before, further)

    def _await(self, body: Body, awaited: Awaited, words: str) -> None:
        body.wait(lambda: self._has_come(awaited), words, awaited)

    def _has_come(self, awaited: Awaited) -> bool:
        """Whether the model has come to what a body waits for, or will not come to it any more."""
        if self.finished:
            return True
        if awaited.visit is not None:
            here = self.at is awaited.visit and self.at.kind is awaited.kind
            return self._pauses > awaited.since and (here or (self._step_over and not awaited.further))
        return awaited.step is not None and self._forward.step >= awaited.step

    def factors(self, total: int) -> set[int]:
        """By what the rows may be multiplied in this step: told by the arguments of the root's call."""
        visit = self._visits.get(id(self.root))
        going_on = visit is not None and visit.forward is self._forward and visit.going_on
        return factors_in((visit.args, visit.kwargs) if going_on and visit is not None else self._arguments, total)

    # Going on, on the stack that opened the trace

    def finish(self) -> None:
        """Let every body and the model run to the end; in a body, wait for the model's."""
        body = self.running()
        if body is not None:
            self._refuse_ended()
            self._await(body, Awaited(), "the end of the model")
            self._refuse_ended()
            return
        self._serve()
        while not self.finished:
            waiting = [body for body in self.bodies if not body.finished]
            wanted = any(body.awaited is not None for body in waiting)
            if waiting and not wanted:
                self._give_up(waiting)
            elif self._stopped_early and not wanted:
                return
            else:
                self._advance()
            self._serve()
        while waiting := [body for body in self.bodies if not body.finished]:
            self._give_up(waiting)
            self._serve()
        super().finish()

    def _serve(self) -> None:
        """Let bodies go on, in the order written, until none can."""
        went_on = True
        while went_on:
            went_on = False
            for body in self.bodies:
                while not body.finished and body.ready():
                    self._let_go_on(body)
                    went_on = True

    def _let_go_on(self, body: Body) -> None:
        try:
            body.resume()
            if body.finished:
                body.check_lent()
        except Stop as stop:
            if stop.run is not self:
                raise
            self._stopped_early = True

    def _advance(self) -> None:
        """Let the model go on until it comes to what some body waits for; an error is raised at that body's line."""
        self._arm()
        at, self.at = self.at, None
        try:
            self.at = reached = self._forward.resume()
        except BaseException as error:
            self._stopped(error, at)
            body = next((body for body in self.bodies if body.awaited is not None), None)
            if body is None:
                raise
            body.refuse(error)
            return
        finally:
            self._pauses += 1
        self._step_over = reached is None

    def _arm(self) -> None:
        """Have the model pause where bodies wait."""
        waiting = [body.awaited for body in self.bodies if body.awaited is not None]
        for awaited in waiting:
            if awaited.visit is not None and awaited.kind is OUTPUT:
                awaited.visit.stop_after = True
            elif awaited.visit is not None:
                awaited.visit.stop_before = True
        self._forward.awaited = any(each.visit is not None and not each.further for each in waiting)
        self._forward.stop_before(min((each.step for each in waiting if each.step is not None), default=None))

    def _give_up(self, waiting: list[Body]) -> None:
        """No body can go on and none waits for the model: have the first of them raise what tells so."""
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


def shared_tensors(seen: Any, whole: Any) -> Any:
    """The tensors of the whole batch's value that a body sees as they are, or whose rows are one row in memory (`expand`)."""
    as_they_are = {id(each) for each in tensors(seen)}
    return [each for each in tensors(whole) if id(each) in as_they_are or (each.dim() and not each.stride(0))]
