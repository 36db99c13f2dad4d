"""Torch's per-thread settings belong to a side: nothing that either side sets reaches the other."""

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from nnsight_eager import NNsight
from nnsight_eager.coroutine import Coroutine


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


CONTEXTS = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "no inference_mode": lambda: torch.inference_mode(False),
    "autocast to bfloat16": bfloat16,
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16, cache_enabled=False),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "device meta": lambda: torch.device("meta"),
    "device cpu": lambda: torch.device("cpu"),
    "function mode": Functions,
    "dispatch mode": Dispatch,
    "fake tensors": FakeTensorMode,
    "one backward thread": lambda: torch.autograd.set_multithreading_enabled(False),
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    "saved tensors on cpu": torch.autograd.graph.save_on_cpu,
    "no torch functions of subclasses": torch._C.DisableTorchFunctionSubclass,
    "no torch functions": torch._C.DisableTorchFunction,
    "no forward gradient": lambda: torch.autograd.forward_ad._set_fwd_grad_enabled(False),
}


def in_force():
    """All of it, as torch tells it, and not as the package does."""
    C = torch._C
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    hooks = []
    while (top := C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        C._autograd._pop_saved_tensors_default_hooks()
    for pack_and_unpack in reversed(hooks):
        C._autograd._push_saved_tensors_default_hooks(*pack_and_unpack)
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
        "autocast nesting": nesting,
        "function modes": [id(mode) for mode in _get_current_function_mode_stack()],
        "dispatch modes": [id(mode) for mode in _get_current_dispatch_mode_stack()],
        "default device": torch.utils._device.CURRENT_DEVICE,
        "saved tensor hooks": hooks,
        "multithreading": C._is_multithreading_enabled(),
        "forward gradient": C._is_fwd_grad_enabled(),
        "torch functions": str(C._get_torch_function_state()),
        "lift": C._only_lift_cpu_tensors(),
        "included keys": str(C._dispatch_tls_local_include_set()),
        "excluded keys": str(C._dispatch_tls_local_exclude_set()),
    }


@pytest.fixture(autouse=True)
def _no_autocast_left_open():
    """Each test begins on its own, though another may have left a context counted."""
    yield
    while torch.autocast_increment_nesting() > 1:
        torch.autocast_decrement_nesting()
        torch.autocast_decrement_nesting()
    torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    torch.set_autocast_dtype("cpu", torch.bfloat16)
    torch.set_autocast_cache_enabled(True)


class Nest:
    """Enters and leaves contexts at random, and crosses to the other side between any two of them."""

    def __init__(self, random, cross):
        self.random, self.cross = random, cross
        self.crossings = 0

    def run(self, depth=2):
        for _ in range(self.random.randint(1, 3)):
            with CONTEXTS[self.random.choice([*CONTEXTS])]():
                self.go_across()
                if depth:
                    self.run(depth - 1)
                self.go_across()

    def go_across(self):
        before = in_force()
        self.cross()
        assert in_force() == before
        self.crossings += 1


def cross_at_random(choice):
    def resume():
        if not coroutine.finished:
            coroutine.resume()

    inner = Nest(choice, lambda: coroutine.pause(None))
    outer = Nest(choice, resume)
    coroutine = Coroutine(inner.run)
    outer.run()
    while not coroutine.finished:
        coroutine.resume()
    return outer.crossings + inner.crossings


def test_random_nests_of_contexts_on_both_sides_leak_neither_way():
    clean, crossings = in_force(), 0
    for seed in range(300):
        choice = random.Random(seed)
        crossings += cross_at_random(choice)
        assert in_force() == clean, seed
    assert crossings > 5_000


@pytest.mark.parametrize("outside", CONTEXTS)
def test_any_two_contexts_on_the_two_sides_leak_neither_way(outside):
    def work(name):
        with CONTEXTS[name]():
            before = in_force()
            coroutine.pause(None)
            if in_force() != before:
                leaks.append(f"into {name}")
        before = in_force()
        coroutine.pause(None)
        if in_force() != before:
            leaks.append(f"after {name}")

    leaks, clean = [], in_force()
    for inside in CONTEXTS:
        coroutine = Coroutine(work, inside)
        while not coroutine.finished:
            with CONTEXTS[outside]():
                before = in_force()
                coroutine.resume()
                if in_force() != before:
                    leaks.append(f"out of {inside}")
    assert not leaks
    assert in_force() == clean


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_coroutine_begins_with_what_was_in_force_where_it_was_made(name):
    clean = in_force()
    with CONTEXTS[name]():
        made_in = in_force()
        coroutine = Coroutine(in_force)
    coroutine.resume()
    assert coroutine.result == made_in
    assert in_force() == clean


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_coroutine_closed_inside_a_context_leaves_the_thread_clean(name):
    def work():
        with CONTEXTS[name]():
            coroutine.pause(None)

    clean = in_force()
    coroutine = Coroutine(work)
    coroutine.resume()
    assert in_force() == clean
    coroutine.close()
    assert in_force() == clean


# An inference mode that nobody leaves stays in force after a plain call too.
@pytest.mark.parametrize("name", CONTEXTS.keys() - {"inference_mode", "no inference_mode"})
def test_a_function_that_fails_inside_a_context_leaves_the_thread_clean(name):
    def work():
        context = CONTEXTS[name]()
        context.__enter__()
        kept.append(context)
        raise KeyError

    kept, clean = [], in_force()
    coroutine = Coroutine(work)
    with pytest.raises(KeyError):
        coroutine.resume()
    assert in_force() == clean


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_second_coroutine_on_a_used_stack_begins_clean(name):
    def work():
        CONTEXTS[name]().__enter__()

    clean = in_force()
    Coroutine(work).resume()
    coroutine = Coroutine(in_force)
    coroutine.resume()
    assert coroutine.result == clean
    assert in_force() == clean


class Spy(torch.nn.Module):
    """Two layers that note what is in force when they run."""

    def __init__(self, inside=None):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.seen = []
        self.inside = inside

    def forward(self, x):
        self.seen.append(in_force())
        x = self.first(x)
        self.seen.append(in_force())
        if self.inside is None:
            return self.second(x)
        with self.inside():
            return self.second(x)


@pytest.mark.parametrize("name", CONTEXTS)
def test_what_the_body_sets_around_a_read_does_not_reach_the_model(name):
    clean, x = in_force(), torch.randn(2, 4)
    model = NNsight(Spy())
    with model.trace(x) as tracer:
        with CONTEXTS[name]():
            before = in_force()
            _ = model.first.output
            assert in_force() == before
        assert in_force() == clean
    assert model._module.seen == [clean, clean]
    plain = model._module(x)
    assert tracer.result.dtype == plain.dtype
    assert tracer.result.requires_grad
    assert torch.equal(tracer.result, plain)


@pytest.mark.parametrize("name", CONTEXTS)
def test_what_the_model_sets_inside_its_forward_does_not_reach_the_body(name):
    if name == "fake tensors":
        pytest.skip("a real module cannot run in it")
    clean = in_force()
    model = NNsight(Spy(CONTEXTS[name]))
    with model.trace(torch.randn(2, 4)):
        received = model.second.input
        assert in_force() == clean
        assert (received * 2).requires_grad
        _ = model.second.output
        assert in_force() == clean
    assert in_force() == clean


@pytest.mark.parametrize("name", ["no_grad", "autocast to bfloat16", "function mode", "dispatch mode", "one backward thread"])
def test_the_model_starts_with_what_was_in_force_where_the_trace_was_opened(name):
    model = NNsight(Spy())
    with CONTEXTS[name]():
        opened_in = in_force()
        tracer = model.trace(torch.randn(2, 4))
        tracer.__enter__()
    _ = model.first.output
    tracer.__exit__(None, None, None)
    assert model._module.seen == [opened_in, opened_in]


def test_old_weights_are_not_cached_while_the_model_is_paused_inside_a_disabled_autocast():
    """Autocast drops its cached casts where the outermost context ends: one that the model is inside of must not count."""
    model, x = NNsight(Spy(lambda: torch.autocast("cpu", enabled=False))), torch.randn(2, 4)
    weight = torch.nn.Parameter(torch.ones(4, 4))
    with model.trace(x):
        _ = model.second.input
        with bfloat16():
            _ = x @ weight
        with torch.no_grad():
            weight.zero_()
        with bfloat16():
            assert not (x @ weight).any()


def test_the_dtype_that_the_body_left_for_autocast_does_not_reach_the_model():
    model, x = NNsight(Spy(lambda: torch.autocast("cpu"))), torch.randn(2, 4)
    with model.trace(x), torch.autocast("cpu", torch.float16), torch.autocast("cpu", enabled=False):
        _ = model.first.output
        assert model.second.output.dtype == torch.bfloat16


def test_two_runs_side_by_side_each_keep_their_own():
    model, x, clean = NNsight(Spy()), torch.randn(2, 4), in_force()
    with bfloat16():
        low = model.trace(x)
        low.__enter__()
    with model.trace(x) as high:
        assert (low.model.first.output.dtype, high.model.first.output.dtype) == (torch.bfloat16, torch.float32)
        assert (low.model.second.output.dtype, high.model.second.output.dtype) == (torch.bfloat16, torch.float32)
    low.__exit__(None, None, None)
    assert in_force() == clean
