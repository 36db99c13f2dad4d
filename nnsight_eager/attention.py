"""The attention pattern of one layer, computed the explicit way where somebody asks for it.

    with model.trace("The Eiffel Tower is in"):
        pattern = model.transformer.h[5].attn.pattern            # [batch, head, query, key], although the model runs sdpa
        model.transformer.h[5].attn.pattern = pattern.mean(1, keepdim=True).expand_as(pattern)

While a run asks for it, the attention module has a copy of its configuration that names an attention function of ours, which
the library's attention interface then calls with the real queries, keys, values and mask. The probabilities are computed by a
small module of their own, so that they are a module's output like any other: listened to, paused at and replaced.
"""

import copy
import threading
from collections.abc import Hashable
from typing import Any, Final

import torch

from .errors import NotReachedError
from .inside import Part
from .paths import spelled
from .taps import exchange

NAME: Final = "nnsight_eager"
"""Under this name transformers finds our attention function."""

_lock: Final = threading.Lock()
# The patterns in use by the identity of their owners, which they hold: every operation of a rewritten forward looks here.
_explicit: Final[dict[int, "AttentionPattern"]] = {}


class AttentionPattern(Part):
    """Gives the probabilities `[batch, head, query, key]` of an attention."""

    def __init__(self, owner: torch.nn.Module, path: str, implementation: str) -> None:
        super().__init__(owner, path)
        self.implementation = implementation  # what the model runs otherwise
        self.users: set[Explicit] = set()
        self.configured: Any = None  # the attention module's own configuration

    def of(self, owner: torch.nn.Module) -> "AttentionPattern":
        """The pattern of another attention."""
        return AttentionPattern(owner, self.path, self.implementation)

    @property
    def key(self) -> Hashable:
        """One pattern is computed at a time."""
        return id(self)

    def apart(self, stack: Any) -> "Explicit":
        """The owner's attention, computed by `explicit_attention`."""
        return Explicit(self)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None = None,
        bias: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`mask` is boolean, or is added to the scores; `sinks` `[head]` take part in the softmax and are dropped."""
        scores = torch.matmul(query, key.transpose(2, 3)) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if bias is not None:
            scores = scores + bias
        allowed = mask if mask is not None and mask.dtype is torch.bool else None
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        if sinks is not None:
            scores = torch.cat((scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores)), -1)
        exact = torch.promote_types(scores.dtype, torch.float32)
        probabilities = torch.softmax(scores, -1, dtype=exact).to(query.dtype)[..., : key.shape[2]]
        if allowed is not None:  # a padded query attends to nothing, as with sdpa
            probabilities = probabilities * allowed.any(-1, keepdim=True)
        return probabilities


def explicit_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the attention interface calls: queries, keys and values are `[batch, head, seq, dim]`, keys may have fewer heads."""
    config: Any = module.config
    pattern = vars(config).get("nnsight_eager_pattern")
    if pattern is None:  # another run had asked for it, and has ended since its forward looked this function up
        pattern = AttentionPattern(module, "", config._attn_implementation)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    mask = _mask(pattern.implementation, attention_mask, causal, sliding_window, query, key)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    probabilities = pattern(query, key, mask, scaling, softcap, position_bias, s_aux)
    weights = torch.nn.functional.dropout(probabilities, dropout, training=module.training)
    output = torch.matmul(weights.to(value.dtype), value).transpose(1, 2).contiguous()
    return output, probabilities if pattern.implementation == "eager" else None


def _mask(
    implementation: str,
    given: torch.Tensor | None,
    causal: bool,
    window: int | None,
    query: torch.Tensor,
    key: torch.Tensor,
) -> torch.Tensor | None:
    """The mask that the model's own implementation would apply: sdpa is causal where it has none, flash in any case."""
    flash = "flash" in implementation
    padding = given[:, None, None, :].bool() if given is not None and given.dim() == 2 else None
    if not causal or query.shape[2] == 1 or not (flash or given is None) or implementation == "eager":
        return padding if padding is not None else given
    ends = key.shape[2] - query.shape[2] if flash else 0  # sdpa's own causal mask begins at the first key
    distance = torch.arange(query.shape[2], device=query.device)[:, None] + ends - torch.arange(key.shape[2], device=key.device)
    allowed = distance >= 0
    if flash and window is not None:
        allowed = allowed & (distance < window)
    return allowed[None, None] if padding is None else allowed & padding


class Explicit:
    """One run's use of a pattern: while any run has one, the module's attention is computed the explicit way."""

    def __init__(self, pattern: AttentionPattern) -> None:
        self._pattern = pattern

    def begin(self) -> None:
        """Have the attention computed the explicit way."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(NAME, explicit_attention)
        pattern = self._pattern
        with _lock:
            pattern.users.add(self)
            if pattern.configured is None:
                config = copy.copy(pattern.owner.config)
                # Not through the property, which would set the parts of a composed configuration too.
                vars(config).update(_attn_implementation_internal=NAME, nnsight_eager_pattern=pattern)
                pattern.configured = pattern.owner.config
                _explicit[id(pattern.owner)] = pattern
                exchange(pattern.owner, "config", config)

    def hear(self, part: Part, ear: Any) -> None:
        """The pattern is a module that is called like any other, so its ear hears by itself."""

    def passed(self, part: Part, begun: bool, entering: bool, further: bool) -> bool:
        """The configuration is read when the forward comes to its attention, so it is not too late before that."""
        return False

    def came_by(self, part: Part) -> bool:
        """Each call of the module computes its attention."""
        return True

    def end(self) -> None:
        """Give the module its configuration back, where no other run uses the pattern."""
        pattern = self._pattern
        with _lock:
            pattern.users.discard(self)
            if not pattern.users and pattern.configured is not None:
                exchange(pattern.owner, "config", pattern.configured)
                _explicit.pop(id(pattern.owner), None)
                pattern.configured = None


def pattern_of(module: torch.nn.Module, path: str) -> AttentionPattern:
    """The module that computes the pattern of an attention module; refused for any other."""
    configured = getattr(module, "config", None)
    implementation = getattr(configured, "_attn_implementation", None)
    if implementation is None or not _uses_the_interface(module):
        raise NotReachedError(
            f"`{spelled(path)}.pattern` does not exist: `{type(module).__name__}` does not go through transformers' attention "
            "interface.",
            'Read `.pattern` of an attention module, or load the model with `attn_implementation="eager"` and read what the '
            "module returns.",
            asked=f"{spelled(path)}.pattern",
        )
    return AttentionPattern(module, f"{path}.pattern", implementation)


def in_place_of(function: Any, owner: torch.nn.Module) -> Any:
    """What the forward of `owner` is to call where it is about to call `function`.

    The explicit attention, where the pattern was asked for after the forward had looked its attention function up.
    """
    pattern = _explicit.get(id(owner))
    return explicit_attention if pattern is not None and pattern.owner is owner and _is_attention(function) else function


def _is_attention(function: Any) -> bool:
    """Whether the library's attention interface gives this function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    registered = any(function is each for each in ALL_ATTENTION_FUNCTIONS.values())
    return registered or getattr(function, "__name__", "") == "eager_attention_forward"


def _uses_the_interface(module: torch.nn.Module) -> bool:
    """Whether the module's forward looks its attention function up in transformers' registry."""
    forward: Any = type(module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())
