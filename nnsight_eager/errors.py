"""Every exception a user can meet.

NnsightEagerError
├── PointError                what was asked for cannot be had
│   ├── OutOfOrderError       the run has passed it
│   ├── NotReachedError       the run does not come by it
│   ├── OutsideTraceError     no run is open
│   ├── InsideForwardError    the forward pass itself asked
│   ├── ChangedInPlaceError   it was overwritten meanwhile
│   ├── RowsError             an invoke's rows in it cannot be told
│   └── ShardError            how it is divided among ranks cannot be told
├── RunError                  the run cannot do what is asked of it
│   ├── RunEndedError         it is over
│   ├── WrongThreadError      it is paused on another thread
│   ├── EditError             it cannot take this edit
│   ├── StepError             it has no such step
│   ├── InvokeError           its invokes cannot be run as they are written
│   ├── DeadlockError         its invokes wait for each other
│   └── RanksError            the ranks that run the model ask for different points
├── InputError                what the model was given cannot be run
│   ├── EmptyInputError       there is nothing in it
│   ├── TokenizerMissingError text, and nothing to tokenize it with
│   ├── PaddingError          several lengths, and nothing to pad them with
│   ├── MaskError             a mask that does not fit
│   └── BatchError            several inputs that do not go into one batch
├── PathError                 no module has that path
├── SourceError               the operations inside a forward cannot be told
├── CacheError                a cache does not hold, or cannot keep, what is asked of it
├── ExtractError              activations cannot be extracted as is asked, or a folder does not hold them
├── LoadError                 a model cannot be loaded
├── RemoteError               a model that runs elsewhere cannot do this, or cannot be reached
│   └── ServerLostError       the actor that holds it has died
└── InternalError             our bug: please report it

None derives from `AttributeError`, which an envoy's attribute look-up would swallow.
"""

from typing import Any


class NnsightEagerError(Exception):
    """What happened, in the user's words; on the second line what to write instead. Facts are attributes."""

    def __init__(self, happened: str, instead: str = "", **facts: Any) -> None:
        super().__init__(f"{happened}\n{instead}" if instead else happened)
        self.__dict__.update(facts)


class PointError(NnsightEagerError):
    """What was asked for cannot be had; `asked` is the point as the user writes it."""

    asked: str = ""


class OutOfOrderError(PointError):
    """The run has passed the point in this step; `paused_at` is where it was, `step` the step."""

    paused_at: str = ""
    step: int = 0


class NotReachedError(PointError):
    """The run does not come by the point in this step; `paused_at` is where it was, `step` the step."""

    paused_at: str = ""
    step: int = 0


class OutsideTraceError(PointError):
    """A point was asked for where no run is open."""


class InsideForwardError(PointError):
    """A point was asked for by code that the run's own forward pass called."""


class ChangedInPlaceError(PointError):
    """The module has changed its input in place, and what it received is gone."""


class RowsError(PointError):
    """A value in which the rows of an invoke cannot be told, or that it shares with others and cannot change."""


class ShardError(PointError):
    """A value of which each rank has something of its own, and how to put it together cannot be told."""


class RunError(NnsightEagerError):
    """The run cannot do what is asked of it."""


class RunEndedError(RunError):
    """The run is over: finished, stopped, closed or failed."""


class WrongThreadError(RunError):
    """The run is paused on another thread."""


class EditError(RunError):
    """The run cannot take this edit."""


class StepError(RunError):
    """The run has no such step, or has passed it."""


class InvokeError(RunError):
    """The invokes of a trace, or the block of an edit, cannot be run as they are written; `reason` is why a block cannot."""

    reason: str = ""


class DeadlockError(RunError):
    """The invokes of a trace wait for each other, and none can go on."""


class RanksError(RunError):
    """The ranks that run a model together ask for different points; `asked` is what each asks for, by rank."""

    asked: dict[int, str]


class InputError(NnsightEagerError):
    """What the model was given cannot be run."""


class EmptyInputError(InputError):
    """There is nothing to run the model on."""


class TokenizerMissingError(InputError):
    """There is text, and nothing to tokenize it with."""


class PaddingError(InputError):
    """There are several lengths, and nothing to pad them with."""


class MaskError(InputError):
    """The attention mask does not fit the input."""


class BatchError(InputError):
    """The inputs of several invokes do not go into one batch."""


class PathError(NnsightEagerError):
    """No module of the model has the path that was given."""


class SourceError(NnsightEagerError):
    """The operations inside a forward cannot be told, or it has none of that name."""


class CacheError(NnsightEagerError):
    """A cache does not hold, or cannot keep, what is asked of it."""


class ExtractError(NnsightEagerError):
    """Activations cannot be extracted as is asked, or a folder does not hold them."""


class LoadError(NnsightEagerError):
    """A model or tokenizer cannot be loaded."""


class RemoteError(NnsightEagerError):
    """A model that runs elsewhere cannot do what is asked of it, or cannot be reached."""


class ServerLostError(RemoteError):
    """The actor that holds the model has died, and with it the runs that were there."""


class InternalError(NnsightEagerError):
    """A state that should not occur. Please report it, with the traceback."""
