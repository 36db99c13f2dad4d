"""One input's block within a trace, written as a `with` block or as a function.

    with tracer.invoke("The Eiffel Tower is in"):          # runs when the trace ends, with the others
        hidden = model.transformer.h[5].hidden

    @tracer.invoke("The Colosseum is in")
    def patched():
        return model.lm_head.output

A block that shares a forward pass with others cannot run in place: it is found in the source, left out where it stands, and run
as a body of its own. A function needs no source.
"""

from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple, NoReturn, Protocol

import torch

from .batching import Given
from .blocks import Block
from .bodies import Body, check_plain
from .captured import Captured
from .errors import InvokeError, OutsideTraceError
from .names import Names, begin, end
from .paths import spelled
from .run import Call
from .tracebacks import for_the_reader
from .visits import FIRST, Which


class Division(NamedTuple):
    """How a trace without input of its own is divided into invokes."""

    batch: Callable[[Sequence[Given]], tuple[Call, list[int]]]
    """Makes one call of the inputs of all invokes, and tells how many rows each has."""
    batched: bool
    """Whether the invokes share one forward pass; otherwise each has its own and runs in place."""


class OneByOne(Protocol):
    """A trace that gives each invoke a forward pass of its own."""

    def begin_alone(self, given: Given | None) -> Any:
        """Begin one invoke's forward pass."""

    def end_alone(self, error: BaseException | None) -> bool:
        """End it; whether `error` has thereby done what it was raised for."""


class Invokes:
    """The invokes of a trace that has no input of its own, in the order written, until they run together."""

    def __init__(self, root: torch.nn.Module) -> None:
        self.root = root
        self.open = True
        self.made: list[Invoke] = []
        self.written: list[Invoke] = []
        self.at_begin: list[Callable[[Any], None]] = []  # what is to be done with the run, outside every invoke

    def __getattr__(self, name: str) -> Any:
        # It stands where the run will be: whatever a point asks of it, there is no run yet.
        if name.startswith("_"):
            raise AttributeError(name)
        raise outside_invokes()

    def ask(self, module: torch.nn.Module, kind: str, path: str, which: Which = FIRST) -> NoReturn:
        """Raise: there is nothing yet that a point could be read from."""
        raise outside_invokes(f"`{spelled(path, kind)}`")

    def runs_on(self, stack: Any) -> bool:
        """Nothing runs yet."""
        return False

    def bodies(self) -> list[Body]:
        """The programs, in the order written; a name is looked up in the earlier ones of those that have names."""
        for invoke in self.made:
            if invoke.body is None:
                raise InvokeError(
                    f"{invoke.label[0].upper()}{invoke.label[1:]} has no block.",
                    "Write `with tracer.invoke(...):`, or pass a function: `tracer.invoke(prompt, function)`.",
                )
        begin(self._named())
        return [invoke.body for invoke in self.written if invoke.body is not None]

    def export(self) -> None:
        """Bind in the frames around what the blocks have bound, in the order written."""
        self.open = False
        end(self._named())
        for invoke in self.made:
            invoke.names = None
        self.made, self.written = [], []  # nothing refers to itself any more, so that tensors are freed at once

    def _named(self) -> list[Names]:
        return [invoke.names for invoke in self.written if invoke.names is not None]


class Invoke(Captured):
    """One input's block: `with` it, or call it with a function, whose answer is then `result`."""

    def __init__(self, invokes: Invokes, given: Given | None, all_rows: bool) -> None:
        """`given` is the input, `None` for an invoke that only sees the others' rows."""
        self.given = given
        self.all_rows = all_rows or given is None
        self.body: Body | None = None
        self.names: Names | None = None
        self._invokes = invokes
        invokes.made.append(self)
        self.label = f"invoke {len(invokes.made)}" + (f" ({given})" if given is not None else "")

    def _refused(self) -> None:
        self._invokes.made.remove(self)  # its input may be given to another form

    def _take(  # pragma: no cover: called where nothing is traced until the user's frame goes on
        self, block: Block, frame: FrameType
    ) -> None:
        self.body = body = Body(self._run_block, self.label)
        self.names = names = Names(block, frame, body.wait_until, self.label)
        names.frame = lambda: body.frame
        self._invokes.written.append(self)

    def __call__(self, function: Callable[[], Any]) -> "Invoke":
        """Have `function`, called without arguments, be the block."""
        self._check()
        check_plain(function, "tracer.invoke(...)")
        self.body = Body(function, self.label)
        self._invokes.written.append(self)
        return self

    @property
    def result(self) -> Any:
        """What the function has returned."""
        if self.body is None or not self.body.finished:
            raise InvokeError(
                f"The function of {self.label} has not run to its end.", "Read `.result` when the trace has ended."
            )
        return self.body.result

    def _run_block(self) -> None:
        assert self.names is not None
        self.names.run()

    def _check(self) -> None:
        if not self._invokes.open:
            raise InvokeError(
                "An invoke was opened inside another, or behind the end of its trace.",
                "Write each invoke directly in its trace's block.",
            )
        if self.body is not None or self._entering is not None:
            raise InvokeError(
                f"{self.label[0].upper()}{self.label[1:]} has a block already.", "Call `tracer.invoke(...)` for each."
            )

    def __repr__(self) -> str:
        state = "no block yet" if self.body is None else "has run" if self.body.finished else "runs when the trace ends"
        return f"<{self.label}: {state}>"


class InvokeInPlace:
    """One input's block with a forward pass of its own: it runs where it stands, as a trace's does."""

    def __init__(self, trace: OneByOne, given: Given | None) -> None:
        self._trace = trace
        self._given = given
        self.result: Any = None

    def __enter__(self) -> "InvokeInPlace":
        self._trace.begin_alone(self._given)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        try:
            return self._trace.end_alone(error)
        except BaseException as raised:
            raised.__traceback__ = for_the_reader(raised.__traceback__)
            raise

    def __call__(self, function: Callable[[], Any]) -> "InvokeInPlace":
        """Run `function` now."""
        check_plain(function, "tracer.invoke(...)")
        with self:
            self.result = function()
        return self


def outside_invokes(what: str = "This") -> OutsideTraceError:
    """The error for what is read outside every invoke in a trace without input."""
    return OutsideTraceError(
        f"{what} was read outside every invoke, and its trace has no input of its own.",
        'Read it inside `with tracer.invoke("…"):`, or give the trace an input: `with model.trace("…"):`.',
    )
