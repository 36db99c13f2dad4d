"""Why a point was not reached, in the user's words.

`model.transformer.h[2].output` has already run in this step (step 0); the model was paused at `model.transformer.h[5].output`.
Read `model.transformer.h[2].output` above the line that reads `model.transformer.h[5].output`; …
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from .ears import Ears
from .errors import NotReachedError, OutOfOrderError, PointError
from .inside import Part, lies_in
from .paths import spelled
from .visits import Visit, Which


class Miss(NamedTuple):
    """An ask that was not answered: for what, from where, and how far the model had got."""

    path: str
    kind: str
    paused_at: str
    step: int
    finished: bool
    by_hand: bool

    @property
    def asked(self) -> str:
        """The point as the user writes it."""
        return spelled(self.path, self.kind)

    @property
    def asked_further(self) -> str:
        """The same point at its next visit."""
        return spelled(self.path, self.kind, further=True)

    @property
    def ended(self) -> str:
        """What has ended."""
        return "the model has finished" if self.finished else f"step {self.step} has ended"

    @property
    def earlier(self) -> str:
        """How to come by it."""
        if self.by_hand:
            return f"Go back to it: `{_going_back(self.asked)}`"
        return f"Read `{self.asked}` " + (
            f"above the line that reads `{self.paused_at}`" if self.paused_at else "earlier in the block"
        )

    def passed(self) -> PointError:
        """The point has run before it was asked for."""
        where = f"; the model was paused at `{self.paused_at}`" if self.paused_at else ""
        return self._error(
            OutOfOrderError,
            f"`{self.asked}` has already run in this step (step {self.step}){where}.",
            f"{self.earlier}; for a later visit of it write `{self.asked_further}`.",
        )

    def too_late(self, owner: str) -> PointError:
        """The forward it is in had begun, or had come past it, before anyone asked for it."""
        before = "" if self.by_hand else f"; where it comes behind that, write `{owner}.source` above that line"
        return self._error(
            OutOfOrderError,
            f"`{self.asked}` is not reached any more: "
            f"it was asked for when the forward of `{owner}` had begun, or had come past it.",
            f"{self.earlier}{before}.",
        )

    def skipped(self, inside: str) -> PointError:
        """The point lies in a module whose forward was left out."""
        return self._error(
            NotReachedError,
            f"`{self.asked}` does not run in this step: it is inside `{spelled(inside)}`, which was skipped.",
            "Read it in a trace that does not skip that module.",
        )

    def no_further(self) -> PointError:
        """There is no next visit."""
        return self._error(
            NotReachedError,
            f"`{self.asked_further}` does not come: {self.ended} without a further visit.",
            "Ask for as many visits as there are; `tracer.iter[:]` loops until the model ends.",
        )

    def no_longer(self, steps: int | None) -> PointError:
        """The module runs in other steps than this; `steps` is how many there were, where the model has finished."""
        happened = (
            f"the model has finished after {steps} steps" if steps is not None else f"it does not run in step {self.step}"
        )
        return self._error(
            NotReachedError,
            f"`{self.asked}` does not come any more: {happened}.",
            "Read it in a step it runs in: inside the loop over the steps, or before it for what runs in the first step only.",
        )

    def never(self) -> PointError:
        """The module does not run."""
        return self._error(
            NotReachedError,
            f"`{self.asked}` did not run: {self.ended} without coming by `{spelled(self.path)}`.",
            f"Read a module that this call runs; {self._back or '`print(model)` shows what there is'}.",
        )

    def not_taken(self, owner: str) -> PointError:
        """The forward it is in did not come by it."""
        return self._error(
            NotReachedError,
            f"`{self.asked}` did not run: the forward of `{owner}` went another way.",
            f"Read an operation that this call runs; `print({owner}.source)` shows where they stand"
            + (f", and {self._back}." if self._back else "."),
        )

    @property
    def _back(self) -> str:
        """How to come back from where a run that is held by hand has looked for the point in vain."""
        return f"`{_going_back(self.paused_at)}` goes back to where the run was" if self.by_hand and self.paused_at else ""

    def _error(self, kind: type[PointError], happened: str, instead: str) -> PointError:
        return kind(happened, instead, asked=self.asked, paused_at=self.paused_at, step=self.step)


def _going_back(point: str) -> str:
    """The call that goes back to a point: `run.back_to(model.h[2], "input")`."""
    module, _, kind = point.rpartition(".")
    return f"run.back_to({module})" if kind == "output" else f'run.back_to({module}, "{kind}")'


def why(miss: Miss, visit: Visit, which: Which, skipped: Iterable[torch.nn.Module], ears: Ears, beyond: bool) -> PointError:
    """What tells why the model has not come to `visit`, with what was `skipped` and, if so, `beyond` the last step."""
    module, step, order = visit.module, miss.step, ears.order
    if which:
        return miss.no_further()
    if visit.times and visit.step == step:
        return miss.passed()
    for each in skipped:
        if module is not each and lies_in(module, each):
            return miss.skipped(ears.path_of(each))
    if isinstance(module, Part):
        came_by = ears.of_part(module).came_by(module)
        module = module.owner
        if ears.at(module).step == step:
            return miss.passed() if came_by else miss.not_taken(spelled(ears.path_of(module)))
    if order.runs(module) and (beyond or not order.runs(module, step)):
        return miss.no_longer(ears.step if beyond else None)
    if not ears.learning and order.runs(module, step):
        return miss.passed()
    return miss.never()
