"""The points of one further visit: what `next()` gives, of a module or of an operation.

for _ in range(2):
    model.block.next().output              # the next visit after now, in whatever step
visit = model.block.next()
visit.output = visit.output * 0            # kept in a variable it stays with the visit that was met
"""

from .errors import NotReachedError, OutOfOrderError
from .paths import PATTERN, spelled
from .points import Points
from .run import Run
from .visits import FIRST, INPUT, NEXT, NEXT_IN_STEP, OUTPUT, Kind, Visit, Which


class AtNextVisit(Points):
    """Points at the next visit after now, and, once that is met, at the same one: what `next()` gives."""

    _met: tuple[Visit, int, int] | None = None

    def _visit(self, kind: Kind) -> Visit:
        """The next visit the first time, and the same one from then on."""
        run, met = self._run(), self._met
        if met is None:
            return self._go_on(run, kind)
        visit = met[0]
        if self._goes_on():
            if visit is run.at and (visit.kind is kind or kind is INPUT):
                return run.ask(self._module, kind, self._path)
            if kind is OUTPUT:
                return self._go_on(run, kind)
        raise self._over(kind)

    def _at_pattern(self, which: Which = FIRST) -> tuple[Visit, str]:
        """The pattern that the call which this stands for computes."""
        if self._met is None:
            self._visit(INPUT)
        if not self._goes_on():
            raise self._over(PATTERN)
        return super()._at_pattern(NEXT if self._is_entered() else which)

    def _goes_on(self) -> bool:
        """Whether the visit that was met is still the module's."""
        met = self._met
        return met is not None and met[0].going_on and (met[0], met[0].step, met[0].times) == met

    def _is_entered(self) -> bool:
        """Whether the run is paused at the input of the visit that was met."""
        at = self._run().at
        return self._met is not None and at is self._met[0] and at.kind is INPUT

    def _over(self, kind: str) -> OutOfOrderError:
        """The error for an ask when the visit that was met has ended."""
        run, asked = self._run(), spelled(self._path, kind, further=True)
        return OutOfOrderError(
            f"The visit that this `{asked}` met is over; the run has moved on.",
            f"Write `{asked}` once more for the visit after this, or keep the value in a variable.",
            asked=asked,
            paused_at=spelled(run.path_of(run.at.module), run.at.kind) if run.at else "",
            step=run.step,
        )

    def _meets_in_step(self) -> bool:
        """Run on to the next visit, if there is one in this step."""
        try:
            self._go_on(self._run(), INPUT, NEXT_IN_STEP)
        except NotReachedError:
            return False
        return True

    def _go_on(self, run: Run, kind: Kind, which: Which = NEXT) -> Visit:
        """On to the next visit, which this then stands for."""
        seen = run.ask(self._module, kind, self._path, which)
        visit = run.at
        assert visit is not None
        self._met = visit, visit.step, visit.times
        return seen
