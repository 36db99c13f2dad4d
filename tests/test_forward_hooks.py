"""Taps and forward hooks: a read comes after every hook the module has, whenever it was added."""

import pytest
import torch
from tapped import Scaled, entries
from torch.nn.modules.module import register_module_forward_hook

from nnsight_eager import NNsight


@pytest.fixture
def module():
    return Scaled()


@pytest.fixture
def x():
    return torch.randn(2, 3)


def plus_one(module, args, value):
    return value + 1


def test_the_output_is_what_forward_hooks_leave_and_they_see_the_same_in_every_trace(module, x):
    seen = []
    module.child.register_forward_hook(plus_one)
    module.child.register_forward_hook(lambda module, args, value: seen.append(value))
    plain, before, model = module.child(x), entries(module), NNsight(module)
    for _ in range(2):
        with model.trace(x) as tracer:
            assert torch.equal(model.child.output, plain)
            model.child.output = model.child.output * 0
        assert not tracer.result.any()
    assert len(seen) == 3
    assert torch.equal(seen[1], seen[2])
    assert entries(module) == before


def test_a_module_that_a_hook_of_it_calls_again_is_read_at_its_own_call(module, x):
    others = []

    def call_again(each, args, value):
        if not others:
            others.append(None)
            others.append(each(args[0] * 2))

    module.child.register_forward_hook(call_again)
    plain, model = module.child(x), NNsight(module)
    for _ in range(2):
        others.clear()
        with model.trace(x):
            seen = model.child.output
        assert torch.equal(seen, plain)
        assert torch.equal(others[1], module.child(x * 2))


def test_a_trace_in_a_hook_is_read_at_its_own_call(module, x):
    seen = []

    def trace_again(each, args, value):
        if not seen:
            seen.append(None)
            with model.trace(x * 2) as tracer:
                seen.append(tracer.model.child.output)

    module.child.register_forward_hook(trace_again)
    model = NNsight(module)
    for _ in range(2):
        seen.clear()
        with model.trace(x):
            outer = model.child.output
        assert torch.equal(outer, module.child(x))
        assert torch.equal(seen[1], module.child(x * 2))


def test_a_hook_added_while_the_forward_runs_comes_before_the_read(x):
    class Late(torch.nn.Linear):
        def forward(self, x):
            self.handle = self.register_forward_hook(plus_one)
            return super().forward(x)

    module = torch.nn.Sequential(Late(3, 3))
    plain, model = torch.nn.functional.linear(x, module[0].weight, module[0].bias), NNsight(module)
    module[0].register_forward_hook(lambda *_: None)
    with model.trace(x):
        assert torch.equal(model[0].output, plain + 1)
    module[0].handle.remove()
    assert len(module[0]._forward_hooks) == 1


def test_global_forward_hooks_come_before_the_read(module, x):
    plain, model = module.child(x), NNsight(module)
    with register_module_forward_hook(lambda each, args, value: value + 1 if each is module.child else None):
        with model.trace(x):
            assert torch.equal(model.child.output, plain + 1)
        with model.trace(x) as tracer:
            model.child.output = model.child.output * 0
    assert not tracer.result.any()


def test_the_input_is_what_forward_pre_hooks_leave(module, x):
    module.child.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model = NNsight(module)
    with model.trace(x):
        assert torch.equal(model.child.input, x + 1)


def test_a_hook_that_raises_leaves_none_of_ours_behind(module, x):
    def broken(*_):
        raise ZeroDivisionError

    module.child.register_forward_hook(broken)
    before, model = entries(module), NNsight(module)

    def read():
        with model.trace(x):
            _ = model.child.output

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            read()
        assert entries(module) == before


def test_a_hook_that_always_runs_still_sees_the_call_that_fails(module, x):
    seen = []
    module.child.register_forward_hook(lambda *_: seen.append("called"), always_call=True)
    before, model = entries(module), NNsight(module)

    def read():
        with model.trace(torch.ones(2, 5)):
            _ = model.child.output

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        read()
    assert seen == ["called"]
    assert entries(module) == before
