"""What people do to models and around them, hooks, copies, precisions, transforms, forks: values are what plain calls give."""

import copy
import os
import pickle
import warnings

import pytest
import torch
from left_behind import everything
from small_models import X4, Stack, run_python
from torch.func import functional_call, grad, jvp, vmap

from nnsight_eager import NNsight

B4 = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return NNsight(Stack())


def with_zero_block(module, x):
    """The stack with its second block giving zeros, by a plain hook."""
    handle = module.h[1].register_forward_hook(lambda m, args, output: output * 0)
    try:
        return module(x)
    finally:
        handle.remove()


def zeroed(model, x, block=1):
    """The same by a trace; what the block gave, and the result."""
    with model.trace(x) as tracer:
        seen = model.h[block].output
        model.h[block].output = seen * 0
    return seen, tracer.result


# Hooks of the user's


def test_hooks_that_are_added_while_a_trace_is_paused_take_part_from_then_on_and_stay(model):
    module, events = model._module, []
    with model.trace(X4) as tracer:
        hidden = model.h[0].output
        pre = module.h[1].register_forward_pre_hook(lambda m, args: events.append("pre"))
        post = module.h[1].register_forward_hook(lambda m, args, output: output + 1)
        backward = module.h[2].register_full_backward_hook(lambda *_: events.append("backward"))
        after = model.h[1].output
    assert torch.equal(after, module.h[1].lin(hidden) + hidden + 1)
    assert events == ["pre"]
    tracer.result.sum().backward()
    assert events == ["pre", "backward"]
    assert [len(module.h[1]._forward_pre_hooks), len(module.h[1]._forward_hooks)] == [1, 1]
    assert torch.equal(tracer.result, module(X4))
    for each in (pre, post, backward):
        each.remove()


def test_a_hook_that_is_removed_while_a_trace_is_paused_is_gone(model):
    module = model._module
    plain = module(X4)
    handle = module.h[2].register_forward_hook(lambda m, args, output: output * 0)
    with model.trace(X4) as tracer:
        _ = model.h[1].output
        handle.remove()
        last = model.h[2].output
    assert last.any()
    assert torch.equal(tracer.result, plain)


def test_backward_hooks_see_the_gradients_of_an_edited_run(model):
    module, seen = model._module, {}
    x = X4.clone().requires_grad_()
    for number in (0, 2):
        module.h[number].register_full_backward_hook(lambda m, i, o, number=number: seen.setdefault(number, []).append(o[0]))
    hooked = module.h[1].register_forward_hook(lambda m, args, output: output * 3)
    module(x).sum().backward()
    hooked.remove()
    with model.trace(x) as tracer:
        model.h[1].output = model.h[1].output * 3
    tracer.result.sum().backward()
    assert all(torch.equal(*both) and both[0].any() for both in seen.values())
    assert sorted(seen) == [0, 2]


# `forward` reassigned, weights tied, modules used several times


def test_a_forward_that_is_reassigned_before_and_between_traces_is_the_one_that_runs(model):
    module = model._module
    block = module.h[1]
    for factor in (2, 5):
        block.forward = lambda x, factor=factor: x * factor
        with model.trace(X4) as tracer:
            assert torch.equal(model.h[1].output, model.h[1].input * factor)
        assert torch.equal(tracer.result, module(X4))
    del block.forward
    assert torch.equal(model.trace(X4).result, module(X4))
    assert "forward" not in block.__dict__


def test_a_forward_that_is_reassigned_while_a_trace_is_open_stays_and_is_called(model):
    module = model._module
    with model.trace(X4) as tracer:
        hidden = model.h[0].output
        inner = module.h[1].forward
        module.h[1].forward = lambda x: inner(x) * 0
        zero = model.h[2].input
    assert not zero.any()
    assert torch.equal(tracer.result, module(X4))
    assert torch.equal(model.trace(X4).result, module(X4))
    assert hidden.any()


def test_tied_weights_stay_tied_and_a_module_under_two_names_is_one_point():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = torch.nn.Embedding(6, 4)
            self.head = torch.nn.Linear(4, 6, bias=False)
            self.head.weight = self.wte.weight
            self.again = self.same = torch.nn.Linear(4, 4)

        def forward(self, ids):
            return self.head(self.same(self.again(self.wte(ids))))

    module, ids = Tied(), torch.tensor([[1, 2]])
    model = NNsight(module)
    for _ in range(2):
        with model.trace(ids) as tracer:
            first = model.same.output
            second = model.again.next().output
        assert torch.equal(first, module.same(module.wte(ids)))
        assert torch.equal(second, module.same(first))
        tracer.result.sum().backward()
    traced = module.wte.weight.grad / 2
    module.zero_grad()
    module(ids).sum().backward()
    assert torch.allclose(traced, module.wte.weight.grad)
    assert module.head.weight is module.wte.weight


# Precisions and modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_other_precisions(dtype):
    module = Stack().to(dtype)
    x = B4.to(dtype)
    seen, result = zeroed(NNsight(module), x)
    assert seen.dtype is result.dtype is dtype
    assert torch.equal(result, with_zero_block(module, x))


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "default device": lambda: torch.device("cpu"),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["around", "in the model", "around the read"])
def test_modes_belong_to_the_side_they_are_set_on(mode, where):
    class InMode(Stack):
        def forward(self, x):
            with MODES[mode]():
                return super().forward(x)

    module = InMode() if where == "in the model" else Stack()
    model, before = NNsight(module), (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    if where == "around the read":
        plain = with_zero_block(module, B4)
        with model.trace(B4) as tracer:
            with MODES[mode]():
                seen = model.h[1].output
            model.h[1].output = seen * 0
        assert seen.dtype is torch.float32
        assert seen.requires_grad
        assert not seen.is_inference()
        assert torch.equal(tracer.result, plain)
        return
    with MODES[mode]() if where == "around" else torch.enable_grad():
        want = with_zero_block(module, B4)
        seen, result = zeroed(model, B4)
        assert torch.equal(result, want)
        assert (result.dtype, result.requires_grad, result.is_inference()) == (
            want.dtype,
            want.requires_grad,
            want.is_inference(),
        )
    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


# torch.func

# torch scripts its formulas of forward differentiation when they are first used
ITS_OWN_WARNING = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@ITS_OWN_WARNING
def test_transforms_around_a_whole_trace(model):
    module = model._module

    def traced(x):
        return zeroed(model, x)[1]

    assert torch.allclose(vmap(traced)(B4), vmap(lambda x: with_zero_block(module, x))(B4))
    assert torch.allclose(grad(lambda x: traced(x).sum())(X4), grad(lambda x: with_zero_block(module, x).sum())(X4), atol=1e-6)
    tangent = torch.ones_like(X4)
    ours, theirs = jvp(traced, (X4,), (tangent,)), jvp(lambda x: with_zero_block(module, x), (X4,), (tangent,))
    assert all(torch.allclose(*both) for both in zip(ours, theirs, strict=True))


def test_transforms_in_the_body_do_not_touch_the_model(model):
    module = model._module
    with model.trace(B4) as tracer:
        hidden = model.h[0].output
        gradient = grad(lambda h: module.h[1](h).sum())(hidden.detach())
        rows = vmap(module.h[1])(hidden)
        after = model.h[1].output
    assert torch.allclose(rows, after, atol=1e-6)
    leaf = hidden.detach().requires_grad_()
    assert torch.allclose(gradient, torch.autograd.grad(module.h[1](leaf).sum(), leaf)[0], atol=1e-6)
    assert torch.equal(tracer.result, module(B4))


@ITS_OWN_WARNING
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_a_read_inside_a_transform_leaves_the_model_outside_of_it(model, transform):
    module, seen = model._module, []
    with model.trace(B4) as tracer:

        def body(x):
            seen.append(model.h[0].output)
            return (x * 2).sum()

        if transform == "vmap":
            vmap(body)(B4)
        elif transform == "grad":
            grad(body)(B4)
        else:
            jvp(body, (B4,), (B4,))
        after = model.h[1].output
    assert torch.equal(seen[0], module.h[0](B4))
    assert torch.equal(after, module.h[1](module.h[0](B4)))
    assert torch.equal(tracer.result, module(B4))


def test_a_model_that_draws_random_numbers_is_not_in_the_bodys_vmap():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 4))
    model = NNsight(module)
    torch.manual_seed(0)
    want = module(B4)
    for transform in (vmap, lambda body: vmap(grad(body))):
        torch.manual_seed(0)
        with model.trace(B4) as tracer:
            _ = model[0].output

            def body(x):
                assert model[2].input.shape == B4.shape
                return x.sum()

            rows = transform(body)(B4)
            with torch.no_grad():
                last = model[2].output
        assert torch.equal(rows, B4.sum(1) if rows.dim() == 1 else torch.ones_like(B4))
        assert torch.equal(tracer.result, want)
        assert torch.equal(last, want)


@ITS_OWN_WARNING
def test_a_transform_in_the_model_is_not_in_the_body():
    class Rows(Stack):
        def forward(self, x):
            return vmap(super().forward)(x)

    module = Rows()
    model = NNsight(module)
    with model.trace(B4) as tracer:
        _ = model.h[1].output  # of one row, as `vmap` wraps it
        assert torch.rand(2, 3).shape == (2, 3)
        assert torch.equal(vmap(torch.sum)(B4), B4.sum(1))
    assert torch.allclose(tracer.result, Stack.forward(module, B4))


def test_functional_call_runs_the_model_with_other_weights(model):
    module = model._module
    weights = {name: value.detach() * 2 for name, value in module.named_parameters()}
    other = Stack()
    other.load_state_dict({**weights})
    with model.trace(B4, fn=lambda x: functional_call(module, weights, (x,))) as tracer:
        seen = model.h[1].output
        model.h[1].output = seen * 0
    assert torch.equal(seen, other.h[1](other.h[0](B4)))
    assert torch.equal(tracer.result, with_zero_block(other, B4))
    assert torch.equal(model.trace(B4).result, module(B4))


# Copies


def test_a_wrapped_model_is_copied_and_pickled_and_the_copies_are_models_of_their_own(model, tmp_path):
    model.trace(X4).result
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            made.h[1].lin.weight.mul_(2)
        seen, result = zeroed(made, X4)
        assert torch.equal(result, with_zero_block(made._module, X4))
        assert not torch.equal(seen, zeroed(model, X4)[0])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_that_is_made_while_the_model_is_paused_is_a_plain_model(model, how):
    module = model._module
    with model.trace(X4) as tracer:
        _ = model.h[1].lin.output
        made = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
        if how == "deepcopy":  # nobody tells when unpickling ends; there the wrappers go with the first call
            assert not [name for name, each in made.named_modules() if "forward" in each.__dict__]
        inner = made(X4)
        assert not [name for name, each in made.named_modules() if "forward" in each.__dict__ and name not in ("h", "unused")]
        model.h[1].output = model.h[1].output * 0
    assert torch.equal(inner, module(X4))
    assert torch.equal(tracer.result, with_zero_block(module, X4))
    with torch.no_grad():
        made.head.weight.zero_()
        made.head.bias.fill_(1)
    assert torch.equal(zeroed(NNsight(made), X4)[1], torch.ones(1, 4))
    assert torch.equal(module(X4), inner)


def test_a_state_dict_that_is_taken_or_loaded_while_the_model_is_paused_is_its_own(model):
    module = model._module
    keys = [*module.state_dict()]
    zeros = {name: torch.zeros_like(value) for name, value in module.state_dict().items()}
    with model.trace(X4) as tracer:
        hidden = model.h[1].output
        assert [*module.state_dict()] == keys
        module.load_state_dict(zeros)
    assert hidden.any()
    assert not tracer.result.any()


def test_a_module_moved_to_another_precision_while_paused_goes_on_there(model):
    with model.trace(X4) as tracer:
        hidden = model.h[1].output
        model._module.double()
        model.h[1].output = hidden.double()
    assert tracer.result.dtype is torch.float64


def test_data_parallel_without_devices_calls_the_module_plainly(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallel = NNsight(torch.nn.DataParallel(model._module))
    before = everything(parallel)
    with parallel.trace(B4) as tracer:
        seen = parallel.module.h[1].output
        parallel.module.h[1].output = seen * 0
    assert torch.equal(seen, model._module.h[1](model._module.h[0](B4)))
    assert torch.equal(tracer.result, with_zero_block(model._module, B4))
    assert everything(parallel) == before


# Processes

HELD = """
import os, sys
import torch
from nnsight_eager import NNsight
sys.path.insert(0, "tests")
from small_models import X4, Stack
model = NNsight(Stack())
want = model._module(X4)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
def test_a_process_forked_with_a_run_open_goes_on_in_both(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        HELD
        + """
with model.trace(X4) as tracer:
    hidden = model.h[0].output
    child = os.fork()
    after = model.h[1].output
    if not child:
        model.h[1].output = after * 0
right = torch.equal(after, model._module.h[1](hidden))
right &= torch.equal(tracer.result, want) == bool(child)
right &= torch.equal(model.trace(X4).result, want)
if not child:
    os._exit(0 if right else 7)
print("parent", right, "child", os.waitpid(child, 0)[1] == 0)
"""
    )
    assert run_python("-W", "ignore", script, OMP_NUM_THREADS="1") == "parent True child True\n"


@pytest.mark.parametrize("kind", ["a block", "held", "an invoke", "a thread", "a generator"])
def test_an_interpreter_that_exits_with_a_run_open_exits_quietly(tmp_path, kind):
    bodies = {
        "a block": "tracer = model.trace(X4); tracer.__enter__(); _ = model.h[1].output",
        "held": "run = model.trace(X4).start(); run.step(3)",
        "an invoke": """
def leave():
    model.h[1].output
    print("end", flush=True)
    sys.exit(0)
with model.trace() as tracer:
    tracer.invoke(X4, leave)
""",
        "a thread": """
import threading
def work():
    tracer = model.trace(X4); tracer.__enter__(); _ = model.h[1].output
    started.set()
    threading.Event().wait(60)
started = threading.Event()
threading.Thread(target=work, daemon=True).start()
started.wait(60)
""",
        "a generator": """
def reads():
    with model.trace(X4):
        yield model.h[0].output
        yield model.h[1].output
generator = reads(); next(generator)
""",
    }
    script = tmp_path / "script.py"
    script.write_text(HELD + bodies[kind] + "\nprint('end', flush=True)")
    assert run_python(script) == "end\n"
