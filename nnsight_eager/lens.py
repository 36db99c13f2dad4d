"""The logit lens: what each layer would answer if the model ended there.

    for layer in logit_lens(model, "The Eiffel Tower is in the city of"):
        print(layer.index, layer.tokens[0], layer.probabilities[0], layer.rank)

Each layer's output goes through the model's final norm and its output matrix (nostalgebraist, "interpreting GPT: the logit
lens", 2020).
"""

from dataclasses import dataclass
from typing import Any

import torch

from .errors import InputError
from .language import LanguageModel
from .tree import Envoy

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "final_norm", "ln_out")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's answer: its likeliest tokens, their probabilities, and the rank of the model's final answer (1 is top)."""

    index: int
    tokens: tuple[str, ...]
    probabilities: tuple[float, ...]
    rank: int


def logit_lens(model: LanguageModel, prompt: Any, *, top: int = 1, position: int = -1) -> list[Layer]:
    """Each layer's likeliest `top` tokens after `prompt`, read at token `position`, and where the final answer stands.

        logit_lens(model, "The Eiffel Tower is in the city of")[-1].tokens[0]     # " Paris"

    Raises `InputError` where the model has no decoder layers with a final norm and an output matrix, or the prompt no such
    position.
    """
    model.dispatch()
    layers, norm, head = parts(model)
    with torch.no_grad(), model.trace(prompt):
        hidden = []
        for layer in layers:
            states = layer.hidden
            if not -states.shape[1] <= position < states.shape[1]:
                raise InputError(
                    f"The prompt has {states.shape[1]} token{'s' * (states.shape[1] != 1)}; there is no position {position}.",
                    f"Choose one from {-states.shape[1]} to {states.shape[1] - 1}; -1 is the last.",
                )
            hidden.append(states[0, position])
        answer: Any = model.output
        final = answer.logits[0, position].argmax()
    with torch.no_grad():
        logits = head(norm(torch.stack(hidden))).float()
    probabilities = logits.softmax(-1)
    best = probabilities.topk(min(top, logits.shape[-1]), dim=-1)
    ranks = (logits > logits[:, final, None]).sum(-1) + 1
    return [
        Layer(index, tuple(_decoded(model, token) for token in tokens), tuple(values), rank)
        for index, (tokens, values, rank) in enumerate(
            zip(best.indices.tolist(), best.values.tolist(), ranks.tolist(), strict=True)
        )
    ]


def parts(model: LanguageModel) -> tuple[list[Envoy], Envoy, Any]:
    """The decoder layers, the norm behind them and the output matrix."""
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if stacks and head is not None:
        path = max(stacks, key=lambda stack: len(stack[1]))[0]
        parent = model[path.rpartition(".")[0]] if "." in path else model
        norm = next((parent[name] for name in FINAL_NORMS if name in parent), None)
        if norm is not None:
            return list(model[path]), norm, head
    raise InputError(
        f"`{type(model._module).__name__}` has no decoder layers with a final norm and an output matrix to look through.",
        "The logit lens takes a causal language model, such as GPT-2 or Llama.",
    )


def _decoded(model: LanguageModel, token: int) -> str:
    return str(token) if model.tokenizer is None else str(model.tokenizer.decode([token]))
