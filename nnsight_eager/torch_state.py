"""Save and restore the torch settings that are per thread but belong to a side.

Grad mode, inference mode, autocast, the default device, the levels of `torch.func` and the mode stacks are thread-local, so
without this what the body sets would reach the model across a switch, and the other way round. `Settings.take()` notes
what is in force, `in_force()` tells cheaply whether that still holds, and `exchange` switches sides with the other side's
settings in force and puts one's own back afterwards. Grad mode is set alone, since it alone differs often: `generate` runs
under `no_grad` and the body does not, so either side puts its own back when it goes on.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import _C
from torch.overrides import (
    _get_current_function_mode_stack as function_modes,
    _pop_mode as pop_function_mode,
    _push_mode as push_function_mode,
)
from torch.utils import _device as default_device
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack as dispatch_modes,
    _pop_mode as pop_dispatch_mode,
    _push_mode as push_dispatch_mode,
)

# The hot path is `Plain.in_force`, a dozen C calls. Bound here, each costs a global look-up instead of a chain of attributes.
grad_enabled: Final = torch.is_grad_enabled
inference_enabled: Final = torch.is_inference_mode_enabled
multithreading_enabled: Final = _C._is_multithreading_enabled
forward_ad_enabled: Final = _C._is_fwd_grad_enabled
any_autocast: Final = _C._is_any_autocast_enabled
autocast_enabled: Final = _C.is_autocast_enabled
autocast_dtype: Final = _C.get_autocast_dtype
autocast_cache_enabled: Final = _C.is_autocast_cache_enabled
open_autocast: Final = _C.autocast_increment_nesting
close_autocast: Final = _C.autocast_decrement_nesting
torch_function_enabled: Final = _C._is_torch_function_enabled
torch_function_state: Final[Callable[[], Any]] = _C._get_torch_function_state  # type: ignore[attr-defined]
count_function_modes: Final = _C._len_torch_function_stack
count_dispatch_modes: Final = _C._len_torch_dispatch_stack
top_saved_tensor_hooks: Final[Callable[[bool], Any]] = _C._autograd._top_saved_tensors_default_hooks
count_transforms: Final = _C._functorch.get_dynamic_layer_stack_depth
set_grad_enabled: Final = _C._set_grad_enabled
compiler_callback: Final = _C._dynamo.eval_frame.get_eval_frame_callback
set_compiler_callback: Final = _C._dynamo.eval_frame.set_eval_frame


def autocast_devices() -> list[str]:
    """The device types that autocast can be on for in this process."""
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None or accelerator.type == "cpu" else ["cpu", accelerator.type]


AUTOCAST_DEVICES: Final = autocast_devices()
NO_AUTOCAST: Final = [False for _ in AUTOCAST_DEVICES]


class Settings:
    """What torch has set on this thread at one moment, complete enough to be put back."""

    __slots__ = (
        "autocast", "autocast_cache", "autocast_nesting", "autocast_on", "autocasting", "compiler", "cuda", "default_device",
        "dispatch_mode_count", "dispatch_modes", "forward_ad", "function_mode_count", "function_modes", "grad", "inference",
        "lift_cpu_only", "modeless", "multithreading", "saved_tensor_hooks", "top_hooks", "torch_function",
        "transforms",
    )  # fmt: skip

    grad: bool
    inference: bool
    multithreading: bool
    forward_ad: bool
    top_hooks: Any
    autocasting: bool
    autocast: list[torch.dtype]
    autocast_on: list[bool]
    autocast_cache: bool
    autocast_nesting: int
    modeless: bool
    function_mode_count: int
    dispatch_mode_count: int
    function_modes: list[Any]
    dispatch_modes: list[Any]
    saved_tensor_hooks: list[Any]
    lift_cpu_only: bool
    default_device: torch.device | None
    torch_function: Any
    compiler: Any
    cuda: tuple[int, Any] | None
    transforms: list[Any]

    @classmethod
    def take(cls) -> "Settings":
        """Note everything in force; nothing is changed."""
        cuda = _cuda_place() if torch.cuda.is_initialized() else None
        self = cls.__new__(Plain if cuda is None and Plain.in_force() else cls)
        self.grad = grad_enabled()
        self.inference = inference_enabled()
        self.multithreading = multithreading_enabled()
        self.forward_ad = forward_ad_enabled()
        self.top_hooks = top_saved_tensor_hooks(True)
        self.autocasting = any_autocast()
        self.autocast_on = [*map(autocast_enabled, AUTOCAST_DEVICES)] if self.autocasting else NO_AUTOCAST
        self.autocast = [*map(autocast_dtype, AUTOCAST_DEVICES)]
        self.autocast_cache = autocast_cache_enabled()
        self.autocast_nesting = _autocast_nesting()
        self.function_mode_count = count_function_modes()
        self.dispatch_mode_count = count_dispatch_modes()
        self.modeless = not (self.function_mode_count or self.dispatch_mode_count)
        self.function_modes = [] if self.modeless else function_modes()
        self.dispatch_modes = [] if self.modeless else dispatch_modes()
        self.saved_tensor_hooks = _saved_tensor_hooks() if self.top_hooks else []
        self.lift_cpu_only = _C._only_lift_cpu_tensors()
        self.default_device = default_device.CURRENT_DEVICE
        self.torch_function = torch_function_state()
        self.compiler = compiler_callback()
        self.cuda = cuda
        self.transforms = _popped_transforms()
        _push_transforms(self.transforms)
        return self

    def in_force(self) -> bool:
        """Whether this thread's settings are these, grad mode left aside."""
        return (
            inference_enabled() is self.inference
            and torch_function_state() == self.torch_function
            and count_function_modes() == self.function_mode_count
            and count_dispatch_modes() == self.dispatch_mode_count
            and top_saved_tensor_hooks(True) == self.top_hooks
            and any_autocast() is self.autocasting
            and multithreading_enabled() is self.multithreading
            and forward_ad_enabled() is self.forward_ad
            and compiler_callback() is self.compiler
            and self._same_autocast()
            and (self.modeless or self._same_modes())
            and (self.cuda is None or self.cuda == _cuda_place())
            and not (self.transforms or count_transforms())  # two of the same kind cannot be told apart
        )

    def _same_autocast(self) -> bool:
        """Whether autocast is on, or off, in the same way."""
        return self.autocast_on == [*map(autocast_enabled, AUTOCAST_DEVICES)] and self._same_autocast_details()

    def _same_autocast_details(self) -> bool:
        """Whether autocast, where it is on or comes on, does the same."""
        return (
            self.autocast == [*map(autocast_dtype, AUTOCAST_DEVICES)]
            and self.autocast_cache is autocast_cache_enabled()
            and self.autocast_nesting == _autocast_nesting()
        )

    def _same_modes(self) -> bool:
        """Whether the very same modes are on both stacks: `meta` and `cpu`, or two fake modes, are equally many."""
        return [*map(id, function_modes())] == [*map(id, self.function_modes)] and [*map(id, dispatch_modes())] == [
            *map(id, self.dispatch_modes)
        ]

    def put(self) -> None:
        """Put these settings in force, where `clear` has emptied the stacks and the inference mode is right already."""
        self._put_autocast()
        _C._set_only_lift_cpu_tensors(self.lift_cpu_only)
        _C._set_multithreading_enabled(self.multithreading)
        _C._set_fwd_grad_enabled(self.forward_ad)
        set_grad_enabled(self.grad)
        _C._set_torch_function_state(self.torch_function)  # type: ignore[attr-defined]
        default_device.CURRENT_DEVICE = self.default_device
        set_compiler_callback(self.compiler)
        if self.cuda is not None:  # pragma: no cover: needs CUDA
            torch.cuda.set_device(self.cuda[0])
            torch.cuda.set_stream(self.cuda[1])
        for pack_and_unpack in self.saved_tensor_hooks:
            _C._autograd._push_saved_tensors_default_hooks(*pack_and_unpack)
        for mode in self.dispatch_modes:
            push_dispatch_mode(mode)
        for mode in self.function_modes:
            push_function_mode(mode)
        _push_transforms(self.transforms)

    def _put_autocast(self) -> None:
        """Put the autocast flags, dtypes and nesting in force; casts cached by the other side are dropped."""
        nesting = _autocast_nesting()
        for _ in range(self.autocast_nesting - nesting):
            open_autocast()
        for _ in range(nesting - self.autocast_nesting):
            close_autocast()
        if self.autocasting or any_autocast():
            _C.clear_autocast_cache()
        for device, enabled, dtype in zip(AUTOCAST_DEVICES, self.autocast_on, self.autocast, strict=True):
            _C.set_autocast_enabled(device, enabled)
            _C.set_autocast_dtype(device, dtype)
        _C.set_autocast_cache_enabled(self.autocast_cache)


class Plain(Settings):
    """The settings of a new thread without CUDA, whatever the grad mode: nearly always both sides have these."""

    __slots__ = ()

    @staticmethod
    def in_force() -> bool:
        """Whether this thread's settings are these, grad mode left aside: told by a dozen C calls."""
        return (
            not inference_enabled()
            and torch_function_enabled()
            and not count_function_modes()
            and not count_dispatch_modes()
            and top_saved_tensor_hooks(True) is None
            and not any_autocast()
            and not (open_autocast() and close_autocast())  # no autocast context is open, not even a disabled one
            and multithreading_enabled()
            and forward_ad_enabled()
            and compiler_callback() is None
            and not count_transforms()
        )

    def unchanged(self) -> bool:
        """Whether these settings are in force in every detail, those included that no switch looks at."""
        return (
            self.in_force()
            and grad_enabled() is self.grad
            and default_device.CURRENT_DEVICE is self.default_device
            and not torch.cuda._initialized
            and self._same_autocast_details()
        )


def exchange(mine: Settings, theirs: Settings, switch: Callable[[], Any], *, guard: bool) -> Any:
    """`switch()` with `theirs` in force; `mine` are back when it returns, whatever the other side left.

    Inference mode is a guard that restores the whole dispatch key set when it ends, so it cannot be set and unset like the
    rest. The side that resumes holds one always (`guard=True`), the side that pauses where the two differ.
    """
    clear()
    inference = _C._InferenceMode(theirs.inference) if guard or mine.inference is not theirs.inference else None
    if inference is not None:
        inference.__enter__()
    try:
        theirs.put()
        return switch()
    finally:
        clear()
        if inference is not None:
            inference.__exit__(None, None, None)
        mine.put()


def reset(mine: Settings) -> None:
    """Put `mine` back in force where inference mode is theirs already."""
    clear()
    mine.put()


def clear() -> None:
    """Pop every transform, mode and saved-tensor hook of this thread, innermost first."""
    _popped_transforms()
    while count_function_modes():
        pop_function_mode()
    while count_dispatch_modes():
        pop_dispatch_mode()
    while top_saved_tensor_hooks(True) is not None:
        _C._autograd._pop_saved_tensors_default_hooks()


def _popped_transforms() -> list[Any]:
    """The levels of `torch.func` (`vmap`, `grad`) that code runs in, outermost first; from here on it runs in none."""
    levels: list[Any] = []
    while count_transforms():
        levels.insert(0, _C._functorch.pop_dynamic_layer_stack())
    return levels


def _push_transforms(levels: list[Any]) -> None:
    """Have what follows run in these levels."""
    for level in levels:
        _C._functorch.push_dynamic_layer_stack(level)


def _saved_tensor_hooks() -> list[Any]:
    """The saved-tensor hooks, outermost first: only the innermost can be seen, so they are popped and pushed back."""
    hooks: list[Any] = []
    while (top := top_saved_tensor_hooks(True)) is not None:
        hooks.insert(0, top)
        _C._autograd._pop_saved_tensors_default_hooks()
    for pack_and_unpack in hooks:
        _C._autograd._push_saved_tensors_default_hooks(*pack_and_unpack)
    return hooks


def _autocast_nesting() -> int:
    """How many autocast contexts are open; torch tells only when one more is counted."""
    open_autocast()
    return close_autocast()


def _cuda_place() -> tuple[int, Any]:  # pragma: no cover: needs CUDA
    """The current CUDA device and stream."""
    return torch.cuda.current_device(), torch.cuda.current_stream()
