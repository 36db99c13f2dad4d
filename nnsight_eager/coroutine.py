"""A function that can be paused from anywhere inside it.

    def forward():
        coroutine.pause("half way")
        return "done"

    coroutine = Coroutine(forward)
    coroutine.resume()    # "half way"
    coroutine.resume()    # None: the function has ended
    coroutine.result      # "done"

It runs on a stack of its own, a greenlet. Any number of Python and C frames may lie between its first line and the pause.
`resume` may be called from any stack of the thread that started it; `pause` switches back to that stack and to no other.
Each side keeps its own torch settings; both share their context variables.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from sys import gettrace
from threading import get_ident
from types import FrameType, TracebackType
from typing import Any, Final

from greenlet import getcurrent, greenlet

from .errors import InsideForwardError, InternalError, WrongThreadError
from .fence import fenced
from .torch_state import Plain, Settings, exchange, grad_enabled, reset, set_grad_enabled

OUR_FOLDER: Final = str(Path(__file__).parent)

current_stack = getcurrent
"""The stack this code runs on: two calls give the same object exactly where they run on the same stack."""

_NO_CONTEXT: Final = object()
_makes_a_context: ContextVar[None] = ContextVar("_makes_a_context")


class Closed(BaseException):
    """Raised where a coroutine is paused when nobody will resume it, so that its `finally` blocks run."""


class Coroutine:
    """A call that runs on its own stack until it pauses, and goes on when it is resumed."""

    __slots__ = (
        "__weakref__", "_base", "_call", "_closing", "_context", "_error", "_grad", "_opener", "_resumer", "_side", "_stack",
        "_switch", "_traced", "finished", "result",
    )  # fmt: skip

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Nothing runs before the first `resume`; the function begins with the torch settings in force here."""
        self._call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None = (function, args, kwargs)
        self._stack: Stack | None = None
        self._base = self._side = _thread.state.settings()
        self._grad: bool | None = None  # the grad mode in force at the last switch, where it is known
        self._context: Any = _NO_CONTEXT
        self._resumer: Any = None
        self._switch: Any = None
        self._traced = False
        self._error: BaseException | None = None
        self._closing = False
        self.finished = False
        self.result: Any = None

    @property
    def stack(self) -> greenlet:
        """The stack it runs on, an idle one or a new one from the first time this is asked."""
        if self._stack is None:
            self._start()
        assert self._stack is not None
        return self._stack.greenlet

    @property
    def begun(self) -> bool:
        """Whether the function has been called."""
        return self._call is None

    @property
    def frame(self) -> FrameType | None:
        """The innermost Python frame it is paused at; `None` where it is not paused."""
        return None if self._stack is None else self._stack.greenlet.gr_frame

    def resume(self) -> Any:
        """Go on until the next pause and return what it was paused with; `None`, with `finished` set, at the end.

        What the function raises is raised here.
        """
        if gettrace() is not None and not self._traced:
            return self._resume_traced()
        here = getcurrent()
        if here is not self._resumer:
            self._hang_below(here)
        if here.gr_context is not self._context:
            self._share_context(here)
        side = self._side
        grad = grad_enabled()
        try:
            if side.in_force() and side.inference is self._base.inference:
                self._opener = side
                self._grad = grad
                paused_with = self._switch()
                if not self.finished:
                    if self._grad is not grad:
                        set_grad_enabled(grad)
                    return paused_with
                if not side.in_force():
                    reset(side)
            else:
                # Also where the function may leave an inference mode it entered: only a guard of ours brings that back.
                self._opener = opener = Settings.take()
                self._grad = None
                paused_with = exchange(opener, side, self._switch, guard=True)
            set_grad_enabled(grad)
        except BaseException:  # Ctrl-C, pressed while the function ran, is raised behind the switch
            set_grad_enabled(grad)
            raise
        if self._error is not None:
            self._raise()
        return paused_with

    def pause(self, value: Any) -> None:
        """Switch back to whoever resumed this coroutine; returns when it is resumed."""
        opener = self._opener
        grad = grad_enabled()
        if opener.in_force():
            self._side = opener
            self._grad = grad
            self._resumer.switch(value)
        else:
            self._side = side = Settings.take()
            self._grad = None
            exchange(side, opener, partial(self._resumer.switch, value), guard=False)
        if self._grad is not grad:
            set_grad_enabled(grad)
        if self._closing:
            raise Closed

    def _resume_traced(self) -> Any:
        """Go on under a trace function; coverage's keeps one stack of frames a thread, which a switch would unbalance."""
        tracer = gettrace()
        its_own = getattr(tracer, "concur_id_func", tracer) is None
        self._traced = True
        if its_own:
            tracer.concur_id_func = getcurrent  # type: ignore[union-attr]  # from here on each stack has its own
        try:
            return Coroutine.resume(self)  # what else a kind of coroutine does before it goes on it has done
        finally:
            self._traced = False
            if its_own:
                tracer.concur_id_func = None  # type: ignore[union-attr]

    def close(self) -> None:
        """Raise `Closed` where it is paused, so that its `finally` blocks run.

        One thread cannot switch to another's stack: closed elsewhere, it unwinds when its own thread next starts a
        coroutine, or ends.
        """
        if self.finished or self._closing:
            return
        try:
            self._closing = True
            if self._stack is None:
                self._call, self.finished = None, True
            elif self._stack.thread.ident != get_ident():
                self._stack.thread.orphans.append(self)
            else:
                self.unwind()
        except BaseException:
            self._closing = self.finished  # interrupted on the way: it can be closed once more
            raise

    def unwind(self) -> None:
        """Let a closing coroutine run to its end; a `pause` on the way raises `Closed` again."""
        stack = self._stack
        assert stack is not None
        try:
            # Ctrl-C in a line of ours may have ended the stack with the function: then nothing is left to unwind.
            while not (self.finished or stack.greenlet.dead):
                self.resume()
        except Closed:
            pass
        if stack.greenlet.dead:
            self.finished, self._stack = True, None
            stack.thread.busy.discard(stack)

    def _start(self) -> "Stack":
        """Take an idle stack of this thread, or a new one."""
        if self.finished:
            raise InternalError("A coroutine that has ended was resumed.")
        thread = _thread.state
        if thread.orphans:
            thread.close_orphans()
        self._stack = stack = thread.stack()
        stack.coroutine = self
        return stack

    def _hang_below(self, here: greenlet) -> None:
        """Make `here` the stack that a pause switches back to."""
        if self._stack is None:
            self._start()
        assert self._stack is not None
        self._switch = self._stack.greenlet.switch
        if self._stack.thread.ident != get_ident():
            raise WrongThreadError(
                "This run is paused on another thread, and a paused forward pass can only go on on its own thread.",
                "Read it on the thread that opened the trace, or open a trace of its own on this one.",
            )
        try:
            self._stack.greenlet.parent = here
            self._resumer = here
        except ValueError:  # greenlet refuses a cycle of parents
            raise inside_forward() from None

    def _share_context(self, here: greenlet) -> None:
        """Run in the resumer's context variables, unless the function has entered a context of its own."""
        assert self._stack is not None
        if here.gr_context is None:
            _makes_a_context.set(None)
        stack = self._stack.greenlet
        if self._context is _NO_CONTEXT or stack.gr_context is self._context:
            stack.gr_context = self._context = here.gr_context

    def _raise(self) -> None:
        """Raise what the function raised, without our frames and without leaving a cycle behind."""
        error, self._error = self._error, None
        assert error is not None
        try:
            raise error.with_traceback(without_our_frames(error.__traceback__))
        finally:
            del error

    def run(self) -> None:
        """On the stack: call the function and keep what came of it."""
        assert self._call is not None
        (function, args, kwargs), self._call = self._call, None
        set_grad_enabled(self._base.grad)
        try:
            if self._closing:
                raise Closed
            self.result = function(*args, **kwargs)
        except BaseException as error:
            self._error = error
        finally:
            self.finished = True
            self._stack = self._context = self._grad = self._switch = self._resumer = None


class Stack:
    """A greenlet that runs one coroutine after another, so that a run need not make its own."""

    __slots__ = ("coroutine", "greenlet", "thread")

    def __init__(self, thread: "ThreadState") -> None:
        """Make the stack; its first frame is the fence."""
        self.thread = thread
        self.coroutine: Coroutine | None = None
        self.greenlet = greenlet(lambda: fenced(self._work))

    def _work(self) -> None:
        """Run the coroutine at hand, be idle, run the next; an idle stack refers to no call and no answer."""
        while True:
            assert self.coroutine is not None
            self.coroutine.run()
            self.coroutine = None
            self.thread.busy.discard(self)
            self.thread.idle.append(self)
            getcurrent().parent.switch(None)  # type: ignore[union-attr]  # only the main stack has no parent


class ThreadState:
    """One thread's stacks, and what another thread left here to be closed."""

    def __init__(self) -> None:
        """A thread begins with no stack."""
        self.ident = get_ident()
        self.idle: list[Stack] = []
        self.busy: set[Stack] = set()
        self.orphans: deque[Coroutine] = deque()
        self._settings: Plain | None = None

    def settings(self) -> Settings:
        """What torch has set on this thread now: the same object again where nothing has changed, since taking it is slow."""
        settings = self._settings
        if settings is None or not settings.unchanged():
            taken = Settings.take()
            self._settings = taken if isinstance(taken, Plain) else None
            return taken
        return settings

    def stack(self) -> Stack:
        """A stack with nothing on it, from now on busy."""
        stack = self.idle.pop() if self.idle else Stack(self)
        if stack.greenlet.dead:  # an interrupt between two instructions of ours has ended it
            stack = Stack(self)
        self.busy.add(stack)
        return stack

    def close_orphans(self) -> None:
        """Close what was closed or collected on another thread, which cannot switch to a stack of this one."""
        while self.orphans:
            self.orphans.popleft().unwind()

    def end(self) -> None:
        """Close every coroutine and end every stack: the thread ends, and nobody could resume them later."""
        self.close_orphans()
        for stack in [*self.busy]:
            if stack.coroutine is not None:
                stack.coroutine.close()
        for stack in self.idle:
            # A stack that ends goes on with its parent, which may be another idle one: that of who has resumed it last.
            stack.greenlet.parent = getcurrent()
            stack.greenlet.throw()


class _ThreadEnd:
    """Lives as long as its thread does."""

    def __init__(self, state: ThreadState) -> None:
        self._state = state

    def __del__(self) -> None:
        # At interpreter exit a switch is no longer safe: a forward paused then does not run its `finally` blocks.
        if not sys.is_finalizing():
            self._state.end()


class _Thread(threading.local):
    """This thread's state."""

    def __init__(self) -> None:
        self.state = ThreadState()
        self.end = _ThreadEnd(self.state)


_thread = _Thread()


def frames() -> Iterator[FrameType | greenlet]:
    """The frames on this stack from the caller's on, then the stack itself; then the same of what resumed it, and so on."""
    frame: FrameType | None = sys._getframe(1)
    stack: greenlet | None = getcurrent()
    while stack is not None:
        while frame is not None:
            yield frame
            frame = frame.f_back
        yield stack
        stack = stack.parent
        frame = None if stack is None else stack.gr_frame


def inside_forward() -> InsideForwardError:
    """What a coroutine that is to resume itself is answered with."""
    return InsideForwardError(
        "A point was asked for by code that the model's own forward pass called (a hook or a callback).",
        "Open a trace of its own there: it runs a forward pass of its own and may be nested.",
    )


def without_our_frames(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback less the frames of this package, which would stand between the reader and the model."""
    if traceback is None:
        return None
    rest = without_our_frames(traceback.tb_next)
    if traceback.tb_frame.f_code.co_filename.startswith(OUR_FOLDER):
        return rest
    traceback.tb_next = rest
    return traceback
