"""What a trace hands over are real values in plain variables, and the settings around them stay on their side."""

import copy
import json
import pickle
from collections import namedtuple
from contextvars import ContextVar
from dataclasses import dataclass

import pytest
import torch
from small_models import BEGIN, X4, Block, X, mlp, run_python

from nnsight_eager import NNsight, save, shapes


@pytest.fixture
def model():
    return NNsight(mlp())


class Recorder(torch.nn.Module):
    """Keeps what `look()` says each time its forward runs."""

    def __init__(self, look) -> None:
        super().__init__()
        self.look = look
        self.seen = []
        self.first = torch.nn.Linear(4, 4)
        self.last = torch.nn.Linear(4, 4)

    def forward(self, x):
        self.seen.append(self.look())
        x = self.first(x)
        self.seen.append(self.look())
        x = self.last(x)
        self.seen.append(self.look())
        return x


# Plain variables


def test_a_value_that_was_not_saved_is_a_plain_variable(model):
    with model.trace(X):
        hidden = model[0].output
        norm = hidden.norm().item()
        shape = tuple(hidden.shape)
    assert type(hidden) is torch.Tensor
    assert torch.equal(hidden, model[0](X))
    assert norm == model[0](X).norm().item()
    assert shape == (1, 3)


def test_names_and_rebinding_are_pythons_own(model):
    with model.trace(X):
        a = save(5)
        b = a
        a = model[0].output
        a = save(a) * 2
    assert b == 5
    assert torch.equal(a, 2 * model[0](X))


def test_a_value_keeps_its_gradient_history(model):
    with model.trace(X) as tracer:
        hidden = model[0].output
    (gradient,) = torch.autograd.grad(tracer.result.sum(), hidden)
    plain = model[0](X).detach().requires_grad_()
    (expected,) = torch.autograd.grad(model[2](torch.relu(plain)).sum(), plain)
    assert torch.equal(gradient, expected)


# Saving, which is not needed


@pytest.mark.parametrize("value", [(1, 2), [1, 2], {"a": 1}, {1, 2}, 5, 2.5, True, 1j], ids=repr)
def test_save_gives_the_value_itself(model, value):
    model.trace(X).result
    assert save(value) is value
    assert value.save() is value


def test_a_saved_tensor_is_the_tensor_and_so_is_its_value(model):
    with model.trace(X):
        hidden = model[0].output.save()
        read = model[0].output
    assert hidden is read
    assert hidden.value is hidden
    assert torch.nn.Parameter(X).save().requires_grad


def test_a_plain_object_gets_no_save():
    assert not hasattr(object(), "save")
    assert not hasattr(type("Mine", (), {}), "save")


def test_builtin_types_still_copy_pickle_compare_and_subclass(model):
    model.trace(X).result
    value = {"a": (1, [2.5, {3}])}
    assert copy.deepcopy(value) == pickle.loads(pickle.dumps(value)) == value
    assert json.loads(json.dumps([1, 2])) == [1, 2]
    point = namedtuple("Point", "save y")(1, 2)
    assert point.save == 1
    mine = type("Mine", (dict,), {"save": lambda self: "own"})()
    assert mine.save() == "own"


def test_saving_can_be_turned_off_from_the_environment():
    script = BEGIN + "model.trace(x).result\nprint([hasattr(v, 'save') for v in (x, (), [], {}, 1, 1.0)], hasattr(x, 'value'))"
    printed = run_python("-", stdin=script, NNSIGHT_EAGER_SAVE="0")
    assert printed.strip() == f"{[False] * 6} False"
    printed = run_python("-", stdin=script)
    assert printed.strip() == f"{[True] * 6} True"


def test_importing_alone_changes_no_builtin_type():
    printed = run_python("-", stdin=BEGIN + "print([hasattr(v, 'save') for v in ((), [], {}, 1)])")
    assert printed.strip() == f"{[False] * 4}"


# Shapes


def test_shapes_keep_the_form_of_what_they_are_of():
    @dataclass
    class Out:
        hidden: torch.Tensor
        rest: tuple

    a, b = torch.zeros(1, 2), torch.zeros(3)
    assert shapes(a) == torch.Size([1, 2])
    assert shapes((a, [b, None], {"k": (b,), "n": 1})) == (a.shape, [b.shape, None], {"k": (b.shape,), "n": 1})
    assert shapes(Out(a, (b,))) == {"hidden": a.shape, "rest": (b.shape,)}
    assert shapes("text") == "text"
    assert shapes(()) == ()


def test_shapes_of_what_a_module_returns():
    lstm = NNsight(torch.nn.Sequential(torch.nn.LSTM(4, 3)))
    with lstm.trace(torch.zeros(2, 1, 4)):
        got = shapes(lstm[0].output)
    assert got == ((2, 1, 3), ((1, 1, 3), (1, 1, 3)))
    assert isinstance(got[1][0], torch.Size)


# Settings stay on their side


def autocast_dtype():
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")


SETTINGS = {
    "no_grad": (torch.no_grad, torch.is_grad_enabled),
    "inference_mode": (torch.inference_mode, torch.is_inference_mode_enabled),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), autocast_dtype),
    "device": (lambda: torch.device("meta"), lambda: torch.get_default_device().type),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_body_sets_around_a_read_stays_in_the_body(name):
    setting, look = SETTINGS[name]
    model = NNsight(Recorder(look))
    outside = look()
    with model.trace(X4):
        with setting():
            inside = look()
            _ = model.first.output
            assert look() == inside
        assert look() == outside
        _ = model.last.output
    assert inside != outside
    assert model._module.seen == [outside] * 3
    assert look() == outside


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_set_around_the_trace_is_set_in_the_model(name):
    setting, look = SETTINGS[name]
    model = NNsight(Recorder(look))
    with setting():
        inside = look()
        with model.trace(torch.zeros(1, 4, device="cpu")):
            _ = model.first.input
            assert look() == inside
            if name != "device":
                _ = model.last.input
    assert model._module.seen == [inside] * 3


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_model_sets_stays_in_the_model(name):
    setting, look = SETTINGS[name]
    model, outside = NNsight(Recorder(look)), look()

    def set_and_run(x):
        with setting():
            inside.append(look())
            return model._module(x)

    inside = []
    with model.trace(torch.zeros(1, 4, device="cpu"), fn=set_and_run):
        assert look() == outside
        _ = model.first.output
        assert look() == outside
        _ = model.last.output
        assert look() == outside
    assert look() == outside
    assert model._module.seen == inside * 3


def test_a_read_under_autocast_runs_no_layer_in_bfloat16(model):
    with model.trace(X) as tracer, torch.autocast("cpu", torch.bfloat16):
        hidden = model[0].output
        ours = torch.nn.functional.linear(X, model[0].weight)
    assert ours.dtype is torch.bfloat16
    assert torch.equal(hidden, model[0](X))
    assert torch.equal(tracer.result, model(X))


def test_an_edit_made_under_no_grad_keeps_the_models_other_gradients():
    model = NNsight(torch.nn.Sequential(Block(), Block()))
    with model.trace(X4) as tracer, torch.no_grad():
        model[0].output = model[0].output * 2
    tracer.result.sum().backward()
    assert model[0].lin.weight.grad is None
    assert model[1].lin.weight.grad is not None


# Context variables are shared


def test_a_context_variable_of_the_caller_is_seen_in_the_forward_and_the_other_way():
    variable = ContextVar("variable", default="unset")
    module = Recorder(variable.get)
    module.last.register_forward_hook(lambda *a: variable.set("set by the forward") and None)
    model = NNsight(module)
    variable.set("before")
    with model.trace(X4):
        _ = model.first.input
        variable.set("in the body")
        _ = model.last.output
        assert variable.get() == "set by the forward"
    assert module.seen == ["before", "in the body", "set by the forward"]
