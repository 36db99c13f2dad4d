"""Look inside a running PyTorch model: the forward pass is a coroutine, and your code runs in place.

from nnsight_eager import LanguageModel

model = LanguageModel("openai-community/gpt2")
with model.trace("The Eiffel Tower is in the city of"):
    hidden = model.transformer.h[5].output        # a real tensor, now
    model.transformer.h[5].output = hidden * 0    # the model computes on with this
    logits = model.lm_head.output
"""

from typing import Any

from . import plot as plot
from .activations import Activations as Activations
from .cache import Cache as Cache
from .compat import add_save_to_tensors, save as save
from .errors import (
    BatchError as BatchError,
    CacheError as CacheError,
    ChangedInPlaceError as ChangedInPlaceError,
    DeadlockError as DeadlockError,
    EditError as EditError,
    EmptyInputError as EmptyInputError,
    ExtractError as ExtractError,
    InputError as InputError,
    InsideForwardError as InsideForwardError,
    InternalError as InternalError,
    InvokeError as InvokeError,
    LoadError as LoadError,
    MaskError as MaskError,
    NnsightEagerError as NnsightEagerError,
    NotReachedError as NotReachedError,
    OutOfOrderError as OutOfOrderError,
    OutsideTraceError as OutsideTraceError,
    PaddingError as PaddingError,
    PathError as PathError,
    PointError as PointError,
    RanksError as RanksError,
    RemoteError as RemoteError,
    RowsError as RowsError,
    RunEndedError as RunEndedError,
    RunError as RunError,
    ServerLostError as ServerLostError,
    ShardError as ShardError,
    SourceError as SourceError,
    StepError as StepError,
    TokenizerMissingError as TokenizerMissingError,
    WrongThreadError as WrongThreadError,
)
from .interactive.held import HeldRun as HeldRun
from .interactive.predicates import has_inf as has_inf, has_nan as has_nan, norm_above as norm_above, shape_is as shape_is
from .language import LanguageModel as LanguageModel
from .model import NNsight as NNsight
from .nested import shapes as shapes
from .progress import report as report
from .remote import connect as connect
from .summaries import summary as summary
from .trace import Trace as Trace
from .tree import Envoy as Envoy
from .vision import VisionLanguageModel as VisionLanguageModel

add_save_to_tensors()


def load_ipython_extension(shell: Any) -> None:
    """What `%load_ext nnsight_eager` calls: adds `%trace`, `%step` and the other magics of a run held by hand."""
    from .interactive.magics import load

    load(shell)
