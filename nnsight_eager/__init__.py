"""Look inside a running PyTorch model: the forward pass is a coroutine, and your code runs in place.

from nnsight_eager import LanguageModel

model = LanguageModel("openai-community/gpt2")
with model.trace("The Eiffel Tower is in the city of"):
    hidden = model.transformer.h[5].output        # a real tensor, now
    model.transformer.h[5].output = hidden * 0    # the model computes on with this
    logits = model.lm_head.output
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import lazy_loader

from .compat import add_save_to_tensors

# What there is, `__init__.pyi` says; each name is imported where it is first used.
_named, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """A name of the package, or one of its modules: `nnsight_eager.errors` needs no import of its own."""
    if name in __all__:
        return _named(name)
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    return import_module(f"{__name__}.{name}")


add_save_to_tensors()


def load_ipython_extension(shell: Any) -> None:
    """What `%load_ext nnsight_eager` calls: adds `%trace`, `%step` and the other magics of a run held by hand."""
    from .interactive.magics import load

    load(shell)
