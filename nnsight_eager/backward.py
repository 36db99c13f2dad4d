"""A backward pass that waits where its gradients are read: it is a coroutine too, and the block's code runs in place.

    with model.trace("The Eiffel Tower is in") as tracer:
        early, late = model.transformer.h[1].hidden, model.transformer.h[5].hidden
        loss = model.output.logits.logsumexp(-1).mean()
        with loss.backward():                      # or `with tracer.backward(loss):`, which works in any function
            late.grad                              # the backward pass goes on to here; the real tensor
            early.grad = early.grad * 2            # it computes on with this

Autograd works through the graph in the reverse order of the forward pass, so gradients are asked for in that order. It is kept
on the calling thread. While a block is open on a stack, `grad` of a tensor means this there; everywhere else it is torch's.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from types import CodeType, FrameType, TracebackType
from typing import Any, Final

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from .compat import TensorPatch
from .coroutine import Coroutine, current_stack
from .entering import enters_call_of, is_entered
from .errors import EditError, NotReachedError, OutOfOrderError, OutsideTraceError, RunEndedError, RunError
from .nested import as_where_made, described
from .snapshots import snapshot
from .tracebacks import for_the_reader

_open: Final[ContextVar[tuple["Backward", ...]]] = ContextVar("nnsight_eager_backward_passes", default=())
"""The blocks that are open in this context, on whatever stack: tasks share a stack, and bodies of a trace a context."""


class Arrival:
    """Where a backward pass is paused: at a node of the graph, with the gradients of what that node has made."""

    __slots__ = ("_own", "gradients", "node")

    def __init__(self, node: Node, gradients: tuple[torch.Tensor | None, ...]) -> None:
        self.node = node
        self.gradients = [*gradients]
        self._own: set[int] = set()

    def read(self, number: int) -> torch.Tensor | None:
        """One gradient, as a copy: autograd gives one tensor to both sides of a sum, and a change in place is of this side."""
        there = self.gradients[number]
        if there is not None and number not in self._own:
            with as_where_made(there):
                self.write(number, snapshot(there))
        return self.gradients[number]

    def write(self, number: int, value: torch.Tensor | None) -> None:
        """Have the backward pass go on with `value`."""
        self._own.add(number)
        self.gradients[number] = value


class Backward:
    """One backward pass, begun by `with` and ended when the block is left."""

    def __init__(self, loss: torch.Tensor, run: Callable[[], None]) -> None:
        """`run` is the whole backward pass of `loss`; nothing runs before a gradient is asked for."""
        self._loss = loss
        self._pass = Coroutine(_on_this_thread, run)
        self._stack: Any = None
        self._at: Arrival | None = None
        self._hooks: dict[Node, Any] = {}
        self._over = False

    def __enter__(self) -> "Backward":
        if self._pass.begun or self._stack is not None:
            raise RunError(
                "This backward pass has run already.",
                "Write the call in the `with` statement itself: `with tracer.backward(loss):`; each call is one pass.",
            )
        edge_of(self._loss, "the loss")  # refused here, where it has none
        self._stack = current_stack()
        _open.set((*(each for each in _open.get() if each._stack is not None), self))
        gradients_here.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for_the_reader(traceback)
        try:
            while error is None and not self._pass.finished:
                self._go_on()
        finally:
            self._stack = None
            _open.set(tuple(each for each in _open.get() if each is not self))
            gradients_here.end()
            self._end()

    def run(self) -> None:
        """Run all of it at once, without a block."""
        with self:
            pass

    @property
    def waits_here(self) -> bool:
        """Whether this is the stack that the block was opened on."""
        return self._stack is current_stack()

    def gradient(self, edge: GradientEdge, asked: str) -> torch.Tensor | None:
        """The gradient of a place in the graph: the backward pass goes on until it has it."""
        return self._reached(edge, asked).read(edge.output_nr)

    def replace(self, edge: GradientEdge, value: Any, asked: str) -> None:
        """Have the backward pass go on with `value` as the gradient of a place in the graph."""
        at = self._reached(edge, asked)
        if value is not None:
            _require_fit(value, at.gradients[edge.output_nr], asked)
        at.write(edge.output_nr, value)

    def _reached(self, edge: GradientEdge, asked: str) -> Arrival:
        """Go on to a node of the graph."""
        at, node = self._at, edge.node
        if at is not None and at.node is node:
            return at
        if self._pass.finished:
            raise RunEndedError("This backward pass has ended.", "Read gradients inside its block.")
        # Autograd runs nodes by falling sequence number, but for those that add to a leaf's gradient.
        if at is not None and not _is_leaf(node) and node._sequence_nr() > at.node._sequence_nr():
            raise self._missed(node, asked)
        if node not in self._hooks:
            self._hooks[node] = node.register_prehook(partial(_arrive, self._pass, node))
        self._go_on()
        if self._at is None or self._at.node is not node:
            raise self._missed(node, asked)
        return self._at

    def _go_on(self) -> None:
        self._at = None
        passes = _begun.passes = [each for each in _begun.passes if not each._pass.finished]
        if not self._pass.begun:
            passes.append(self)
        elif passes[-1] is not self:
            raise RunError(
                "Another backward pass has begun on this thread and is in the middle: autograd would run both together.",
                "Read all gradients of a block without an `await` or a `yield` between them, or use threads.",
            )
        self._at = self._pass.resume()

    def _missed(self, node: Node, asked: str) -> OutOfOrderError | NotReachedError:
        """Why a gradient is not reached: it has passed, or the loss does not depend on it."""
        if any(each is node for each in _nodes(get_gradient_edge(self._loss).node)):
            return OutOfOrderError(
                f"{asked} has already been computed: gradients come in the reverse order of the forward pass.",
                "Read it above the gradients of what comes before it in the model.",
                asked=asked,
            )
        return NotReachedError(
            f"{asked} does not come: the loss does not depend on it.",
            "Read the gradient of a tensor that the loss is computed from.",
        )

    def _end(self) -> None:
        """Close what is left of the pass, and take the hooks out of the graph.

        Autograd keeps one stack of passes a thread: one that another has begun inside of is closed when that other has ended.
        """
        self._at = None
        self._over = True
        try:
            if self in _begun.passes:
                _begun.close()
            else:
                self._pass.close()
        finally:
            for hook in self._hooks.values():
                hook.remove()
            self._hooks = {}


class _Begun(threading.local):
    """The backward passes in the middle of which this thread's autograd is, outermost first."""

    def __init__(self) -> None:
        self.passes: list[Backward] = []

    def close(self) -> None:
        """Close those whose blocks have been left, as far as none that goes on is inside them."""
        while self.passes and self.passes[-1]._over:
            self.passes.pop()._pass.close()


_begun: Final = _Begun()


def _require_fit(value: Any, there: torch.Tensor | None, asked: str) -> None:
    if there is None:
        raise EditError(
            f"{asked} cannot be set: the loss does not depend on it, so this pass computes none there.",
            "Set the gradient of a tensor that the loss is computed from.",
        )
    if not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (there.shape, there.dtype):
        raise EditError(f"{asked} is {described(there)}, and was given {described(value)}.", "Give one of its shape and type.")


def _on_this_thread(run: Callable[[], None]) -> None:
    """On the pass's stack: a hook on another thread could not switch back to the block."""
    with torch.autograd.set_multithreading_enabled(False):
        run()


def _arrive(running: Coroutine, node: Node, gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    """The hook on a node: pause there, and go on with what its gradients are then."""
    if current_stack() is not running.stack:
        raise RunError(
            "Another backward pass was run in the block of one, and autograd runs what is left of both together.",
            "Leave the block first, or compute the other gradients before it.",
        )
    arrival = Arrival(node, gradients)
    running.pause(arrival)
    return tuple(arrival.gradients)


def edge_of(tensor: torch.Tensor, what: str) -> GradientEdge:
    """The place of a tensor in the graph; a sentence where it has none."""
    if not tensor.requires_grad:
        raise NotReachedError(
            f"There is no gradient of {what}: it was computed without a graph ({described(tensor)} does not require one).",
            "Transformers' `generate` runs under `torch.no_grad()`: use `model.trace`; inputs and frozen weights need "
            "`requires_grad_()` before they are used.",
        )
    return get_gradient_edge(tensor)


def here(what: str) -> Backward:
    """The backward pass whose block is open on this stack."""
    running = _open_here()
    if running is None:
        raise OutsideTraceError(
            f"{what} was read where no backward pass is open.", "Read it inside `with tracer.backward(loss):`."
        )
    return running


def _open_here() -> Backward | None:
    for each in reversed(_open.get()):
        if each.waits_here:
            return each
    return None


def _meant_by(frame: FrameType) -> Backward | None:
    """The backward pass that `tensor.grad` in `frame` is of: none where torch itself asks (`deepcopy`, an optimizer)."""
    if frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
        return None
    return _open_here()


def _is_leaf(node: Node) -> bool:
    return node.name().endswith("AccumulateGrad")


def _nodes(first: Node) -> Iterator[Node]:
    """All nodes that a backward pass from `first` comes by."""
    known, waiting = {first}, [first]
    while waiting:
        node = waiting.pop()
        yield node
        further = {each for each, _ in node.next_functions if each is not None} - known
        known |= further
        waiting.extend(further)


# What `Tensor.grad` and `Tensor.backward` mean while a block that needs it is open


def _grad(torchs: Any) -> property:
    """`Tensor.grad` on the stack of an open block; elsewhere torch's own."""

    def read(tensor: torch.Tensor) -> Any:
        running = _meant_by(sys._getframe(1))
        if running is None:
            return torchs.__get__(tensor)
        return running.gradient(edge_of(tensor, "the tensor"), _spelled(tensor))

    def write(tensor: torch.Tensor, value: Any) -> None:
        running = _meant_by(sys._getframe(1))
        if running is None:
            torchs.__set__(tensor, value)
        else:
            running.replace(edge_of(tensor, "the tensor"), value, _spelled(tensor))

    return property(read, write, torchs.__delete__)


def _backward(torchs: Any) -> Any:
    """`Tensor.backward`, which waits for the block where it is what a `with` statement enters."""

    def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        run = partial(torchs, self, *args, **kwargs)
        return Backward(self, run) if is_entered(sys._getframe(1)) else run()

    return backward


gradients_here: Final = TensorPatch("grad", _grad)
backward_blocks: Final = TensorPatch("backward", _backward)


def _spelled(tensor: torch.Tensor) -> str:
    return f"The gradient of a tensor {described(tensor)}"


class BackwardBlocks:
    """Whether `with loss.backward():` waits for its block, in one trace."""

    __slots__ = ("_allowed",)

    def __init__(self) -> None:
        self._allowed = False

    def allow_in(self, *codes: CodeType) -> None:
        """From now on it does, if any of this code says so."""
        if not self._allowed and any(enters_call_of("backward", code) for code in codes):
            backward_blocks.begin()
            self._allowed = True

    def end(self) -> None:
        """It does no more, unless another trace is open."""
        if self._allowed:
            self._allowed = False
            backward_blocks.end()
