"""Look inside a running PyTorch model: the forward pass is a coroutine, and your code runs in place.

from nnsight_eager import LanguageModel

model = LanguageModel("openai-community/gpt2")
with model.trace("The Eiffel Tower is in the city of"):
    hidden = model.transformer.h[5].output        # a real tensor, now
    model.transformer.h[5].output = hidden * 0    # the model computes on with this
    logits = model.lm_head.output
"""

from .compat import add_save_to_tensors
from .compat import save as save
from .errors import (
    ChangedInPlaceError as ChangedInPlaceError,
)
from .errors import (
    EditError as EditError,
)
from .errors import (
    EmptyInputError as EmptyInputError,
)
from .errors import (
    InputError as InputError,
)
from .errors import (
    InsideForwardError as InsideForwardError,
)
from .errors import (
    InternalError as InternalError,
)
from .errors import (
    LoadError as LoadError,
)
from .errors import (
    MaskError as MaskError,
)
from .errors import (
    NnsightEagerError as NnsightEagerError,
)
from .errors import (
    NotReachedError as NotReachedError,
)
from .errors import (
    OutOfOrderError as OutOfOrderError,
)
from .errors import (
    OutsideTraceError as OutsideTraceError,
)
from .errors import (
    PaddingError as PaddingError,
)
from .errors import (
    PointError as PointError,
)
from .errors import (
    RunEndedError as RunEndedError,
)
from .errors import (
    RunError as RunError,
)
from .errors import (
    StepError as StepError,
)
from .errors import (
    TokenizerMissingError as TokenizerMissingError,
)
from .errors import (
    WrongThreadError as WrongThreadError,
)
from .language import LanguageModel as LanguageModel
from .model import NNsight as NNsight
from .nested import shapes as shapes
from .trace import Trace as Trace
from .tree import Envoy as Envoy

add_save_to_tensors()
