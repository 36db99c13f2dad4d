"""Functions that are the blocks of traces, run as the invokes of one forward pass where several wait for the model.

    passes = Passes(run, rows=32)
    passes.do(Block(function, inputs, …))        # what the function returns, when it has run, alone or with others

Nothing is waited for: while one pass runs others queue, and the next one takes whoever has waited longest and all that fit it.
They fit where their inputs are of the same shape but for the rows, so that nothing is padded and each sees what it sees alone.
Whoever gives labels has a pass of its own, since a loss is computed from all rows; another number that a model makes of all
of them is not divided.

A function that a shared pass has not carried to its end, by whose fault it may be, runs once more alone, and what comes of that
is what its client gets. So an error is its own client's, and what can only be done alone is done alone.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from contextvars import copy_context
from typing import Any, Final

import torch

from ..batching import Given, joined
from ..invokes import Division
from ..model import NNsight
from ..nested import tensors
from ..run import Call
from ..trace import Trace

PLAIN: Final = (type(None), bool, int, float, str)
"""Keywords that say how a model computes, and are the same for every row."""
ALONE: Final = frozenset({"labels", "return_loss", "output_router_logits"})
"""Inputs with which a model returns a number that it has from all rows, which no client is to get of another's."""


class Block:
    """A function that was submitted, and where it is the block of a trace the inputs of that, until it has run."""

    def __init__(
        self,
        function: Callable[[], Any],
        inputs: dict[str, Any] | None,
        edits: list[Any],
        owner: str,
        asked: Any,
        refuse: Callable[[], None] = lambda: None,
    ) -> None:
        """`edits` are those of its client, which are of every row of a pass: with any it runs alone.

        `asked` is how it came; `refuse` raises where nobody wants it any more.
        """
        self.function = function
        self.inputs, self.edits, self.owner, self.asked = inputs, edits, owner, asked
        self.rows = max((len(each) for each in tensors(inputs) if each.dim()), default=1)
        self.form = None if inputs is None or edits else form_of(inputs, self.rows)
        self.done = False
        self._refuse = refuse
        self.error: BaseException | None = None
        self._value: Any = None

    def is_wanted(self) -> bool:
        """Whether it is to be run still; where it is not, its error tells why."""
        try:
            self._refuse()
        except Exception as error:
            self.error = error
        return self.error is None

    def run(self) -> None:
        """As the block: call the function, in context variables of its own, and keep what comes of it."""
        try:
            self._value = copy_context().run(self.function)
        except Exception as error:
            self.error = error

    def fits(self, other: "Block") -> bool:
        """Whether both can be blocks of one pass."""
        return self.form is not None and self.form == other.form

    def result(self) -> Any:
        """What the function has returned; what it has raised is raised here."""
        if self.error is not None:
            raise self.error
        return self._value


class Passes:
    """The passes of one model, one after another, and the functions that wait for theirs."""

    def __init__(self, run: Callable[[list[Block]], None], rows: int) -> None:
        """`run` runs blocks together; `rows` is how many there may be in a pass that is shared."""
        self._run = run
        self._rows = rows
        self._waiting: list[Block] = []
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()

    def do(self, block: Block) -> Any:
        """Return what the function does, when it has run: in a pass that this thread or another one has begun."""
        with self._lock:
            self._waiting.append(block)
        while not block.done:
            with self._one_at_a_time:
                if not block.done:
                    self._pass(self._next())
        return block.result()

    def _next(self) -> list[Block]:
        """Whoever has waited longest, and those that fit it."""
        with self._lock:
            first, *others = self._waiting
            chosen, self._waiting, rows = [first], [], first.rows
            for each in others:
                if each.fits(first) and rows + each.rows <= self._rows:
                    chosen.append(each)
                    rows += each.rows
                else:
                    self._waiting.append(each)
        return chosen

    def _pass(self, blocks: list[Block]) -> None:
        """Run the blocks together, and those that this has not carried to their ends once more, alone."""
        try:
            self._run(blocks)
        except BaseException as error:
            for each in blocks:
                each.error = each.error or error
        for each in blocks:
            if each.error is not None and len(blocks) > 1:
                each.error = None
                self._pass([each])
            each.done = True


def form_of(inputs: dict[str, Any], rows: int) -> Hashable:
    """What has to be the same in inputs that share a pass; `None` where they cannot, as with labels: a loss is of all rows."""
    if not ALONE.isdisjoint(inputs):
        return None
    form: list[Hashable] = []
    for name, value in sorted(inputs.items()):
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == rows:
            form.append((name, value.dtype, value.shape[1:]))
        elif isinstance(value, PLAIN):
            form.append((name, value))
        else:
            return None
    return tuple(form)


def run_together(model: NNsight, blocks: Sequence[Block]) -> None:
    """Run the model once on the inputs of all blocks, and every block with it, on its own rows. There are no gradients."""

    def together(given: Sequence[Given]) -> tuple[Call, list[int]]:
        batch, sizes = joined(given)
        return Call("forward", model._module, (), batch.kwargs), sizes

    with torch.no_grad(), Trace(model._tree, "forward", None, Division(together, batched=True)) as tracer:
        for block in blocks:
            tracer.invoke(block.run, **(block.inputs or {}))
