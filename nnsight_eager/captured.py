"""A `with` block that is taken out where it stands, to run later.

class Later(Captured):
    def _take(self, block, frame):
        self.names = Names(block, frame, wait, "later")

with Later() as later:
    print("not now")
later.names.run()
"""

import sys
from types import FrameType
from typing import Any

from .blocks import AS_INVOKE, ENTERED, Block, Statement, find, refused
from .errors import InvokeError
from .names import Names, alone, end
from .skipping import Skipping


class Captured:
    """What a `with` statement enters whose block runs elsewhere."""

    _instead = AS_INVOKE
    """What to write where the block cannot be taken."""

    _entering: tuple[FrameType, Statement, Skipping] | None = None

    def __enter__(self) -> Any:
        self._check()
        frame = sys._getframe(1)
        try:
            statement = find(frame)
        except InvokeError as error:
            self._refused()
            error.args = refused(error.reason, self._instead).args
            raise error.with_traceback(None) from None
        self._entering = frame, statement, Skipping(frame)
        return self

    def __exit__(  # pragma: no cover: nothing is traced until the user's frame goes on
        self, kind: Any, error: BaseException | None, traceback: Any
    ) -> bool:
        entering, self._entering = self._entering, None
        assert entering is not None
        frame, (target, block), skipping = entering
        if not skipping.end(error):
            if error is not None:
                return False
            raise InvokeError(
                "A block that runs in the model's forward pass ran where it stands.",
                "Something else traces this code; write the block as a function.",
            )
        if target is not None:  # its own instructions were left out with the body
            names = Names(target, frame, alone, "target")
            names.bound[ENTERED] = self._entered()
            names.run()
            end([names])
        self._take(block, frame)
        return True

    def _check(self) -> None:
        """Refuse to be entered where that makes no sense."""

    def _refused(self) -> None:
        """The block cannot be taken."""

    def _entered(self) -> Any:  # pragma: no cover: called where nothing is traced until the user's frame goes on
        """What the `as` target gets."""
        return self

    def _take(self, block: Block, frame: FrameType) -> None:
        """Keep the block, which was met in `frame`."""
        raise NotImplementedError
