"""`output`, `input`, `inputs`, `hidden`, `pattern`, `skip` as properties.

    model.transformer.h[5].output                    # the forward goes on to here; the real tensor
    model.transformer.h[5].output = zeros            # the model computes on with this
    model.transformer.h[5].skip(model.transformer.h[5].input)

Each property is annotated exactly `-> torch.Tensor`: with any other annotation, or none, IPython's completer evaluates it to
see what it has, and so runs the model (IPython 9.18).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.autograd.graph import GradientEdge

from .attention import pattern_of
from .backward import edge_of, here
from .coroutine import without_our_frames
from .errors import ChangedInPlaceError, EditError, NotReachedError, OutOfOrderError
from .nested import described, first_tensor, with_first_tensor
from .paths import PATTERN, spelled
from .run import Run
from .tracebacks import at_the_users_line
from .tuples import refuse_tensor_for
from .visits import FIRST, INPUT, OUTPUT, Kind, Visit, Which

S = TypeVar("S", bound="Points")


def _read(getter: Callable[[S], torch.Tensor]) -> Callable[[S], torch.Tensor]:
    """The getter of a point, whose errors begin at the user's line and are told to `_failed`."""

    @wraps(getter)
    def read(points: S) -> torch.Tensor:
        try:
            return getter(points)
        except BaseException as error:
            points._failed(error)
            raise

    return read


class Points:
    """Where the values of one module can be read and replaced."""

    _module: torch.nn.Module
    _path: str

    def _run(self) -> Run:
        """The run these points belong to."""
        raise NotImplementedError

    def _visit(self, kind: Kind) -> Visit:
        """The visit asked for: the run is paused at it when this returns."""
        return self._run().ask(self._module, kind, self._path)

    def _failed(self, error: BaseException) -> None:
        """A point could not be read: what every error goes through on its way to the user's line."""
        error.__traceback__ = without_our_frames(error.__traceback__)

    @property
    def output(self) -> torch.Tensor:
        """What the module returns: `hidden = layer.output`, `layer.output = hidden * 0`.

        It is what the calling module receives, after forward hooks, in the type the module returned: a tensor, a tuple, a
        model output. Raises `OutOfOrderError`, `NotReachedError` or `OutsideTraceError` at the line that asked.
        """
        try:  # as `_read` does, without the cost of another call: these are the hot paths
            visit = self._visit(OUTPUT)
            return visit.part(visit.value, OUTPUT)  # type: ignore[no-any-return]
        except BaseException as error:
            self._failed(error)
            raise

    @output.setter
    @at_the_users_line
    def output(self, value: Any) -> None:
        visit = self._visit(OUTPUT)
        refuse_tensor_for(visit.value, value, self._path)
        self._run().replace(visit, value, self._path)

    @property
    def input(self) -> torch.Tensor:
        """The module's first positional argument, else its first keyword argument: `layer.input`, `layer.input = x`.

        At the module's output it can still be read, not replaced; `ChangedInPlaceError` where it no longer holds what the
        module received.
        """
        try:
            visit = self._received()
            first = visit.args[0] if visit.args else next(iter(self._first(visit.kwargs).values()))
            return visit.part(first, INPUT)  # type: ignore[no-any-return]
        except BaseException as error:
            self._failed(error)
            raise

    @input.setter
    @at_the_users_line
    def input(self, value: Any) -> None:
        visit = self._entering("input")
        visit.begin_change()
        args, kwargs = visit.args, visit.kwargs
        new = ((value, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(self._first(kwargs))): value})
        self._run().replace(visit, new, self._path)

    @property
    @_read
    def inputs(self) -> torch.Tensor:
        """All the module's arguments, `(args, kwargs)`: `(hidden, *rest), keywords = layer.inputs`."""
        visit = self._received()
        return visit.part((visit.args, visit.kwargs), "inputs")  # type: ignore[no-any-return]

    @inputs.setter
    @at_the_users_line
    def inputs(self, value: Any) -> None:
        if not (isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[1], dict)):
            raise EditError(
                f"`{spelled(self._path, 'inputs')}` was given {described(value)}; it takes a pair `(args, kwargs)`.",
                "Write `layer.inputs = ((hidden,), {})`, or `layer.input = hidden` for the first argument alone.",
            )
        self._run().replace(self._entering("inputs"), (tuple(value[0]), value[1]), self._path)

    @property
    def hidden(self) -> torch.Tensor:
        """The first tensor of the output, whatever it is wrapped in: `[batch, seq, hidden]` for a transformer block.

        layer.hidden = layer.hidden * 0        # a block may return a tensor (transformers 5) or a tuple (4.57)
        """
        try:
            visit = self._visit(OUTPUT)
            found = first_tensor(visit.value)
            if found is None:
                raise self._no_tensor()
            return visit.part(found, "hidden")  # type: ignore[no-any-return]
        except BaseException as error:
            self._failed(error)
            raise

    @hidden.setter
    @at_the_users_line
    def hidden(self, value: Any) -> None:
        visit = self._visit(OUTPUT)
        visit.begin_change()
        if first_tensor(visit.value) is None:
            raise self._no_tensor()
        self._run().replace(visit, with_first_tensor(visit.value, value), self._path)

    @property
    @_read
    def pattern(self) -> torch.Tensor:
        """The attention probabilities `[batch, head, query, key]` of an attention module, whatever the model computes it with.

        pattern = model.transformer.h[5].attn.pattern
        model.transformer.h[5].attn.pattern = pattern * keep        # the model goes on with these
        """
        visit, _ = self._at_pattern()
        return visit.part(visit.value, "pattern")  # type: ignore[no-any-return]

    @pattern.setter
    @at_the_users_line
    def pattern(self, value: Any) -> None:
        visit, path = self._at_pattern()
        self._run().replace(visit, value, path)

    def _at_pattern(self, which: Which = FIRST) -> tuple[Visit, str]:
        """The visit to the part that computes the pattern, and its path."""
        run = self._run()
        pattern, path = self._pattern(run)
        return run.ask(pattern, OUTPUT, path, which), path

    def _pattern(self, run: Run) -> tuple[torch.nn.Module, str]:
        """The part that computes the pattern, and its path."""
        pattern = run.part((id(self._module), PATTERN), lambda: pattern_of(self._module, self._path))
        return pattern, f"{self._path}.{PATTERN}"

    @property
    @_read
    def output_grad(self) -> torch.Tensor:
        """The gradient of what the module gave (the first tensor of its output), in the block of a backward pass.

        with tracer.backward(loss):
            model.transformer.h[5].output_grad                   # goes on to here; `[batch, seq, hidden]`
            model.transformer.h[5].output_grad = gradient * 0

        The output has to have been read in the trace before. Gradients come in the reverse order of the forward pass.
        """
        edge, asked = self._edge()
        whole = here(asked).gradient(edge, asked)
        return self._run().view(self._path)(whole, "output_grad")  # type: ignore[no-any-return]

    @output_grad.setter
    @at_the_users_line
    def output_grad(self, value: Any) -> None:
        edge, asked = self._edge()
        running = here(asked)
        whole = self._run().whole(running.gradient(edge, asked), value, self._path, "output_grad")
        running.replace(edge, whole, asked)

    def _edge(self) -> tuple[GradientEdge, str]:
        """The place in the graph of what the module gave, and how its gradient is written."""
        asked = f"`{spelled(self._path, 'output_grad')}`"
        given = first_tensor(self._run().given(self._module))
        if given is None:
            output = spelled(self._path, OUTPUT)
            raise NotReachedError(
                f"{asked} is not known: the trace has not read `{output}`.",
                f"Read `{output}` in the trace, above the backward pass; nothing is kept of what is not asked for.",
                asked=asked,
            )
        return edge_of(given, asked), asked

    @property
    def local(self) -> "LocalPoints":
        """The same points with what this rank holds of their values, where several ranks run one model.

        model.layers[0].mlp.up_proj.local.output        # [batch, seq, features / ranks]; `.output` is all of it
        """
        return LocalPoints(self)

    @at_the_users_line
    def skip(self, value: Any) -> None:
        """Leave out the module's forward and go on with `value` as its output: `layer.skip(layer.input)`."""
        self._run().skip(self._entering("skip"), value, self._path)

    def next(self) -> Any:
        """The same points at the next visit after now, in whatever step."""
        raise NotImplementedError

    def visits(self) -> Iterator[Any]:
        """Each visit that is still to come in this step, for what a step visits several times.

            for visit in model.block.source.expert_0.visits():        # an operation in a loop
                visit.output *= 0

        That there is none is known when the step has ended: leave the loop with `break` to read what comes behind it.
        """
        while (visit := self.next())._meets_in_step():
            yield visit

    def _received(self) -> Visit:
        """The visit with its arguments, at the module's input or, unless changed meanwhile, at its output."""
        visit = self._visit(INPUT)
        if not visit.inputs_unchanged():
            raise ChangedInPlaceError(
                f"`{spelled(self._path, 'input')}` no longer holds what the module received: it was changed in place, or made "
                "under inference mode, where torch keeps no record of that.",
                f"Read `{spelled(self._path, 'input')}` above the line that reads its output.",
                asked=spelled(self._path, "input"),
            )
        return visit

    def _entering(self, kind: str) -> Visit:
        """The visit at the module's input, where arguments can be replaced and the forward left out."""
        visit = self._visit(INPUT)
        if visit.kind is OUTPUT:
            asked, paused_at = spelled(self._path, kind), spelled(self._path, OUTPUT)
            raise OutOfOrderError(
                f"`{asked}` cannot be set any more: the model is paused at `{paused_at}`.",
                f"Set `{asked}` above the line that reads `{paused_at}`.",
                asked=asked,
                paused_at=paused_at,
                step=self._run().step,
            )
        return visit

    def _first(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments, of which there is at least one."""
        if not kwargs:
            raise NotReachedError(
                f"`{spelled(self._path, 'input')}` does not exist: the module was called without arguments.",
                f"`{spelled(self._path, 'inputs')}` gives `((), {{}})` there.",
                asked=spelled(self._path, "input"),
            )
        return kwargs

    def _no_tensor(self) -> NotReachedError:
        return NotReachedError(
            f"`{spelled(self._path, 'hidden')}` does not exist: the module returned no tensor.",
            f"`{spelled(self._path, 'output')}` gives what it returned.",
            asked=spelled(self._path, "hidden"),
        )


class LocalPoints:
    """The points of one module, with this rank's part of their values: what `local` gives.

    Read, they are what the model computes with on this rank, and what is put in their place is not divided. In one process
    they are the points themselves.
    """

    def __init__(self, points: Points) -> None:
        self._points = points

    @property
    @at_the_users_line
    def output(self) -> torch.Tensor:
        """This rank's part of what the module returns."""
        with self._at(OUTPUT):
            return self._points.output

    @output.setter
    @at_the_users_line
    def output(self, value: Any) -> None:
        with self._at(OUTPUT):
            self._points.output = value

    @property
    @at_the_users_line
    def input(self) -> torch.Tensor:
        """This rank's part of the first argument."""
        with self._at(INPUT):
            return self._points.input

    @input.setter
    @at_the_users_line
    def input(self, value: Any) -> None:
        with self._at(INPUT):
            self._points.input = value

    @property
    @at_the_users_line
    def inputs(self) -> torch.Tensor:
        """This rank's part of all arguments, `(args, kwargs)`."""
        with self._at(INPUT):
            return self._points.inputs

    @inputs.setter
    @at_the_users_line
    def inputs(self, value: Any) -> None:
        with self._at(INPUT):
            self._points.inputs = value

    @property
    @at_the_users_line
    def hidden(self) -> torch.Tensor:
        """This rank's part of the first tensor of the output."""
        with self._at(OUTPUT):
            return self._points.hidden

    @hidden.setter
    @at_the_users_line
    def hidden(self, value: Any) -> None:
        with self._at(OUTPUT):
            self._points.hidden = value

    @property
    @at_the_users_line
    def pattern(self) -> torch.Tensor:
        """The pattern of this rank's heads."""
        with self._points._at_pattern()[0].local():
            return self._points.pattern

    @pattern.setter
    @at_the_users_line
    def pattern(self, value: Any) -> None:
        with self._points._at_pattern()[0].local():
            self._points.pattern = value

    @at_the_users_line
    def skip(self, value: Any) -> None:
        """Leave out the module's forward and go on with `value` as this rank's part of its output."""
        with self._at(INPUT):
            self._points.skip(value)

    def _at(self, kind: Kind) -> AbstractContextManager[None]:
        """The visit, whose values are what this rank holds while it is asked here."""
        return self._points._visit(kind).local()
