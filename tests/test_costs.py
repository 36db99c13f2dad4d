"""What a read does, in exact counts: these do not depend on the machine. What it takes is measured by the benchmarks."""

from contextlib import contextmanager

import greenlet
import pytest
import torch

from nnsight_eager import NNsight

X = torch.ones(1, 4)


@pytest.fixture
def model():
    """A model that has run once, so that the order of its modules is known."""
    model = NNsight(torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(8)]))
    for _ in range(2):
        with model.trace(X):
            _ = model[0].output
    return model


@contextmanager
def switches():
    """The stacks that are switched to."""
    met = []
    before = greenlet.settrace(lambda event, stacks: met.append(stacks[1]))
    try:
        yield met
    finally:
        greenlet.settrace(before)


def switches_of(model, reads, kind="output"):
    with switches() as met, model.trace(X):
        for layer in list(model)[:reads]:
            getattr(layer, kind)
    return len(met)


def touched(model):
    return sum("forward" in vars(module) for module in model._module.modules())


def test_a_trace_switches_to_the_model_and_back(model):
    assert switches_of(model, 0) == 2


@pytest.mark.parametrize("kind", ["output", "input", "hidden"])
def test_a_read_takes_two_switches(model, kind):
    assert [switches_of(model, reads, kind) for reads in (1, 2, 5, 8)] == [4, 6, 12, 18]


def test_a_second_read_and_an_edit_at_the_same_point_take_no_switch(model):
    with switches() as met, model.trace(X):
        value = model[3].output
        before = len(met)
        model[3].output = value * 2
        model[3].output += 1
        assert model[3].input is not None
        assert len(met) == before


def test_a_read_touches_one_module(model):
    counts = []
    with model.trace(X):
        for layer in model:
            _ = layer.output
            counts.append(touched(model))
    around = counts[0] - 1  # what encloses the layer: its end can be asked for from inside
    assert around == 1
    assert counts == [around + reads for reads in range(1, 9)]
    assert touched(model) == 0


def test_a_trace_without_reads_touches_no_module(model):
    with model.trace(X):
        assert touched(model) == 0


def test_a_trace_makes_no_stack_of_its_own(model):
    stacks = []
    for _ in range(5):
        with switches() as met, model.trace(X):
            _ = model[0].output
        stacks.append({id(stack) for stack in met})
    assert stacks == stacks[:1] * 5
    assert len(stacks[0]) == 2  # the caller's, and the one that every trace runs on


def test_traces_within_each_other_use_the_same_stacks_again(model):
    stacks = []
    for _ in range(3):
        with switches() as met, model.trace(X):
            _ = model[0].output
            with model.trace(X):
                _ = model[1].output
        stacks.append({id(stack) for stack in met})
    assert stacks == stacks[:1] * 3


@pytest.mark.parametrize("gradients", [True, False])
def test_a_read_looks_at_no_tensor_of_the_value_where_the_model_runs_without_gradients_itself(model, monkeypatch, gradients):
    looked_at = []
    monkeypatch.setattr("nnsight_eager.visits.tensors", lambda value: looked_at.append(value) or [])

    @torch.no_grad()
    def generate(x):
        return model._module(x)

    with torch.set_grad_enabled(gradients), model.trace(X, fn=generate):
        for layer in model:
            _ = layer.output
    assert not looked_at


def test_the_first_trace_goes_over_the_model_a_few_times_and_not_once_for_each_module(monkeypatch):
    module = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(50)])
    passes, named_modules = [], torch.nn.Module.named_modules

    def counted(self, *args, **kwargs):
        if self is module:
            passes.append(1)
        return named_modules(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    with NNsight(module).trace(X):
        pass
    assert len(passes) < 10
