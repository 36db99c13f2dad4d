from . import plot as plot
from .activations import Activations as Activations
from .cache import Cache as Cache
from .compat import save as save
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

def load_ipython_extension(shell: object) -> None: ...
