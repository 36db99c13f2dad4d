"""Which step a read belongs to, and the loop over steps.

with model.generate("The Eiffel Tower", max_new_tokens=10) as tracer:
    for step in tracer.iter[2:8:2]:
        print(step, model.lm_head.output[0, -1].argmax())
    print("this runs, however many tokens there were")
"""

import itertools
import operator
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from .changes import user_frame
from .errors import StepError
from .run import Run


class Steps:
    """`tracer.iter`: choose steps with an index, a slice or a list, and loop over them."""

    __slots__ = ("_run",)

    def __init__(self, run: Run) -> None:
        self._run = run

    def __getitem__(self, selection: Any) -> Iterator[int]:
        """An iterator that runs the model to the start of each chosen step and gives its number, until generation ends.

        Warns where it ends before the first of them.
        """
        return self._loop(chosen(selection))

    def __iter__(self) -> Iterator[int]:
        return self[:]

    def _loop(self, steps: Iterable[int]) -> Iterator[int]:
        run, came = self._run, False
        for step in steps:
            if step < run.step:
                raise StepError(
                    f"Step {step} has already ended: the run is in step {run.step}.",
                    f"Write `tracer.iter[{run.step}:]` to go on from here.",
                )
            if not run.to_step(step):
                if not came:
                    _warn_of_none(step, max(run.step, 1))  # a run that never calls its root is one step
                return
            came = True
            yield step

    def __repr__(self) -> str:
        return "tracer.iter: choose steps as in tracer.iter[:], tracer.iter[2:8:2], tracer.iter[[0, 3]]"


def _warn_of_none(step: int, made: int) -> None:
    """Say at the line of a loop that its body has not run, since the model has made no step that it asks for."""
    frame = user_frame()
    warnings.warn_explicit(
        f"Step {step} never came, so this loop did nothing: the run made {made} step{'s' * (made != 1)}, counted from 0.",
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
    )


def chosen(selection: Any) -> Iterable[int]:
    """The steps an index, a slice or a list selects, in order."""
    if isinstance(selection, slice):
        start, stop, stride = (
            None if part is None else whole(part) for part in (selection.start, selection.stop, selection.step)
        )
        if stride == 0:
            raise StepError(
                "`tracer.iter[...]` cannot go on by 0 steps.", "Write a stride of 1 or more, as in `tracer.iter[0:10:2]`."
            )
        return itertools.count(start or 0, stride or 1) if stop is None else range(start or 0, stop, stride or 1)
    if isinstance(selection, (list, tuple, range)):
        steps = [whole(step) for step in selection]
        if steps != sorted(set(steps)):
            raise StepError(
                f"`tracer.iter[{list(steps)}]` does not name its steps in order, and a model runs them in order, once each.",
                f"Write `tracer.iter[{sorted(set(steps))}]`.",
            )
        return steps
    return [whole(selection)]


def whole(step: Any) -> int:
    """A step number; a sentence where it is none."""
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if isinstance(step, bool) or (not isinstance(step, int) and number < 0):
        raise StepError(
            f"`tracer.iter[...]` takes whole numbers, slices and lists of them, not `{step!r}`.",
            "Write `tracer.iter[3]`, `tracer.iter[2:8:2]` or `tracer.iter[[0, 3]]`.",
        )
    if number < 0:
        raise StepError(
            f"`tracer.iter[...]` was given {number}; how many steps there will be is not known, so none counts from the end.",
            "Count from the start: `tracer.iter[0]`, `tracer.iter[2:]`.",
        )
    return number
