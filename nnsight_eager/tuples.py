"""An output that is a tuple, and somebody who takes it for the tensor in it: what is said then.

attn.output = hidden         # EditError: `model.h[5].attn.output` is a tuple of 2 values, and was given one tensor, …
attn.output[0] = hidden      # Python's own TypeError, with a note that says what to write instead
"""

import re
from typing import Any, Final

import torch

from .errors import EditError
from .nested import described
from .paths import spelled
from .run import Run
from .visits import OUTPUT

SPEAKS_OF_A_TUPLE: Final = re.compile(r"\b(tuple|list|sequence)\b")
"""Python's words where a tuple is used as a tensor: no attribute `shape`, no item assignment, no float to multiply it with."""


def refuse_tensor_for(whole: Any, value: Any, path: str) -> None:
    """Raise where one tensor is to take the place of an output that is a tuple or a list.

    Whoever unpacks it would take the tensor's rows for the values, and where there are as many of them nothing fails.
    """
    if isinstance(whole, (tuple, list)) and isinstance(value, torch.Tensor):
        raise EditError(
            f"{_what(whole, path)}, and was given one tensor, {described(value)}.", f"Assign it to {_how(whole, path)}."
        )


def explain(error: BaseException, run: Run) -> None:
    """Note on an error of the user's code at such an output what to write instead."""
    words = SPEAKS_OF_A_TUPLE.search(str(error)) if isinstance(error, (TypeError, AttributeError)) else None
    at = run.at
    if words is None or at is None or at.kind is not OUTPUT or not isinstance(at.value, (tuple, list)):
        return
    if words.group() in (_kind(at.value), "sequence"):
        path = run.path_of(at.module)
        error.add_note(f"{_what(at.value, path)}. Read and assign {_how(at.value, path)}.")


def _kind(whole: tuple[Any, ...] | list[Any]) -> str:
    return "list" if isinstance(whole, list) else "tuple"


def _what(whole: tuple[Any, ...] | list[Any], path: str) -> str:
    values = "1 value" if len(whole) == 1 else f"{len(whole)} values"
    return f"`{spelled(path, OUTPUT)}` is a {_kind(whole)} of {values}"


def _how(whole: tuple[Any, ...] | list[Any], path: str) -> str:
    output = spelled(path, OUTPUT)
    return f"`{spelled(path, 'hidden')}`, the first tensor in it, or write `{output} = (hidden, *{output}[1:])`"
