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
from .model import NNsight as NNsight
from .nested import shapes as shapes

add_save_to_tensors()
