"""What a layer gives moved by a constant, or replaced by one: the programs of steering and ablation.

    steer(model.transformer.h[6], vector, scale=4.0, positions=None)      # in a body of a run

Positions are those of the prompts' tokens: padding, which the attention mask of the step's call tells, is not counted.
"""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .cache import Positions
from .errors import EditError
from .nested import described
from .shared import SharedRun
from .tree import Envoy


def steer(layer: Envoy, vector: torch.Tensor, scale: float, positions: Positions) -> None:
    """Add `scale * vector` to the first tensor of the layer's output."""
    _change(layer, lambda hidden, real: hidden + scale * vector.to(hidden), positions)


def ablate(layer: Envoy, value: Any, positions: Positions) -> None:
    """Put a number, a tensor or the mean over all tokens in the place of the layer's output."""

    def constant(hidden: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        if isinstance(value, str):
            tokens = hidden[real] if real is not None else hidden.flatten(0, -2)
            return tokens.mean(0).expand_as(hidden).clone()
        return torch.as_tensor(value).to(hidden).expand_as(hidden).clone()

    _change(layer, constant, positions)


def _change(layer: Envoy, change: Any, positions: Positions) -> None:
    """Change the output at all positions of every step, or at some of the first step's."""
    run = layer._run()
    assert isinstance(run, SharedRun)
    if positions is not None and run.step:
        return
    hidden = layer.hidden
    real = _real_tokens(_mask(run, layer), hidden)
    changed = change(hidden, real)
    if positions is not None:
        chosen = _chosen(hidden, real, positions)
        changed = torch.where(chosen[..., None], changed, hidden)
    layer.hidden = changed


def _mask(run: SharedRun, layer: Envoy) -> Any:
    """The step's attention mask for the tokens that a layer gets: a decoder behind an encoder has others than the encoder."""
    behind_encoder = getattr(getattr(run.root, "config", None), "is_encoder_decoder", False)
    own_path = layer._tree.memory.aliases.own(layer._path)
    name = "decoder_attention_mask" if behind_encoder and "decoder" in own_path.split(".") else "attention_mask"
    return run.arguments[1].get(name)


def _real_tokens(mask: Any, hidden: torch.Tensor) -> torch.Tensor | None:
    """Which places of `[batch, seq]` hold a token and no padding; `None` where all do, as far as the mask tells.

    In a scan nothing has values, and every place is of one shape.
    """
    if not isinstance(mask, torch.Tensor) or isinstance(mask, FakeTensor) or mask.dim() != 2:
        return None
    if hidden.dim() == 2 and len(hidden) == mask.numel():  # `[batch * seq, hidden]`, as in a mixture of experts
        return mask.bool().flatten()
    return mask.bool() if mask.shape == hidden.shape[:2] else None


def _chosen(hidden: torch.Tensor, real: torch.Tensor | None, positions: Positions) -> torch.Tensor:
    """The chosen places as a mask `[batch, seq]`."""
    if hidden.dim() != 3:
        raise EditError(
            f"`positions={positions}` chooses from `[batch, seq, hidden]`, and this place gives {described(hidden)}.",
            "Leave `positions` away, or give a place that has a vector for each token, such as a layer.",
        )
    chosen = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    everywhere = torch.arange(hidden.shape[1], device=hidden.device)
    numbers = [positions] if isinstance(positions, int) else list(positions) if isinstance(positions, tuple) else positions
    for row in range(len(hidden)):
        places = everywhere if real is None else real[row].nonzero().flatten()
        try:
            chosen[row, places[numbers]] = True
        except IndexError:
            raise EditError(
                f"`positions={positions}` is not in a prompt of {len(places)} tokens ({described(hidden)}).",
                "Give positions that every prompt has, or negative ones, which count from its end.",
            ) from None
    return chosen
