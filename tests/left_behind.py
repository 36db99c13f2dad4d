"""What a trace could leave behind, and a model with hooks and contexts of its own to look for it on."""

import contextlib
import gc
import sys

import torch
from greenlet import greenlet
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


class Block(torch.nn.Module):
    """A residual block that runs, between its two layers, what it is told to."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.first.register_forward_hook(lambda *_: None)
        self.between = None

    def forward(self, x):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden = self.first(x)
            if self.between is not None:
                self.between()
            return x + self.second(hidden)


def everything(model):
    """What a trace could leave behind on the modules, on the thread, and in torch."""
    modules = [
        (
            name,
            [*each.__dict__],
            each.__dict__.get("forward"),
            each.__dict__.get("_compiled_call_impl"),
            [[*value] for key, value in each.__dict__.items() if "_hooks" in key],
        )
        for name, each in model._module.named_modules()
    ]
    thread = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        _get_current_function_mode_stack(),
        _get_current_dispatch_mode_stack(),
        sys.gettrace(),
    )
    of_torch = [list(value) for name, value in vars(torch_module).items() if name.startswith("_global_") and "hooks" in name]
    return modules, thread, of_torch


def frames_on_other_stacks():
    """The name of every function that some greenlet is paused in."""
    names = []
    for each in gc.get_objects():
        if issubclass(type(each), greenlet):
            frame = each.gr_frame
            while frame is not None:
                names.append(frame.f_code.co_qualname)
                frame = frame.f_back
    return names


@contextlib.contextmanager
def as_before(model):
    """The block leaves nothing behind, and the model still works."""
    before = everything(model)
    yield
    assert everything(model) == before
    assert not [name for name in frames_on_other_stacks() if "forward" in name or "Module" in name]
    with model.trace(torch.ones(1, 3)) as tracer:
        hidden = model[0].second.output
    assert hidden.shape == (1, 3)
    assert torch.equal(tracer.result, model._module(torch.ones(1, 3)))
    assert everything(model) == before
