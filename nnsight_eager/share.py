"""What one of several bodies sees of a visit: its own rows.

share = run.ask(layer, "output", "layer")        # in a body
share.part(share.value, "output")                # its rows of the whole batch's value
"""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from .bodies import Asker
from .visits import Kind, Visit


class Holder(Protocol):
    """The run that holds what its bodies have been given."""

    def settle(self, body: Asker) -> None:
        """Make the model's what the body has exchanged in the containers it was given."""

    def put_together(self, visit: Visit) -> None:
        """Have the visit hold what the bodies hold of it."""

    def lend(self, visit: Visit, body: Asker, whole: Any, path: str, kind: str) -> Any:
        """The body's rows of a value of the visit."""


class Share:
    """What one body sees of a visit: its own rows."""

    __slots__ = ("_body", "_path", "_run", "visit")

    def __init__(self, visit: Visit, body: Asker, run: Holder, path: str) -> None:
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
        self._put_together()
        return self.visit.args

    @property
    def kwargs(self) -> dict[str, Any]:
        """The whole batch's keyword arguments."""
        self._put_together()
        return self.visit.kwargs

    @property
    def value(self) -> Any:
        """What the module returns for the whole batch."""
        self._put_together()
        return self.visit.value

    def _put_together(self) -> None:
        """Who sees all rows sees what the bodies hold of them, so that what they have read is upstream of it."""
        if self.has_all_rows:
            self._run.put_together(self.visit)

    def local(self) -> AbstractContextManager[None]:
        """Have values be what this process holds, where several hold one model."""
        return self.visit.local()

    def inputs_unchanged(self) -> bool:
        """Whether the inputs still hold what the module received."""
        return self.visit.inputs_unchanged()

    def begin_change(self) -> None:
        """A new value is about to be built of the one that is here."""
        self._run.settle(self._body)
        self._run.put_together(self.visit)

    def part(self, whole: Any, kind: str) -> Any:
        """The body's rows of `whole`, a value of this visit."""
        return self._run.lend(self.visit, self._body, whole, self._path, kind)

    @property
    def has_all_rows(self) -> bool:
        """Whether the body sees the whole batch."""
        return self._body.rows is None or self._body.rows.all
