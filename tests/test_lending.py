"""What an invoke is given of a value, and what comes back of it: gradients, exchanged items, shared values."""

import copy

import pytest
import torch
from small_models import Stack

from nnsight_eager import BatchError, DeadlockError, EditError, NNsight, RunEndedError

A, B = torch.arange(4.0).reshape(1, 4), torch.ones(2, 4)


@pytest.fixture
def model():
    return NNsight(Stack())


class Structured(torch.nn.Module):
    """Gives its input in containers, with something that all rows share."""

    def forward(self, x):
        return {"rows": x * 1, "list": [x * 2, None], "shared": torch.ones(1, 4)}


class Structures(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.structured = Structured()

    def forward(self, x):
        given = self.structured(x)
        return given["rows"] + given["list"][0] + given["shared"]


@pytest.fixture
def structures():
    return NNsight(Structures())


def nothing():
    pass


def alone(stack, x, *, scale=1.0):
    """The gradients of the loss of one input, with plain autograd and a plain hook."""
    stack = copy.deepcopy(stack)
    kept = []

    def hook(module, args, output):
        kept.append(output * scale)
        kept[0].retain_grad()
        return kept[0]

    stack.h[1].register_forward_hook(hook)
    stack(x).sum().backward()
    return kept[0].grad, stack.h[0].lin.weight.grad


def test_what_an_invoke_has_read_is_upstream_of_what_it_reads_later(model):
    with model.trace() as tracer:
        with tracer.invoke(A):
            hidden = model.h[1].output
            hidden.retain_grad()
            model.output.sum().backward(retain_graph=True)
        with tracer.invoke(B):
            other = model.h[1].output
            other.retain_grad()
            loss = model.output.sum()
    assert torch.allclose(hidden.grad, alone(model._module, A)[0])
    loss.backward()
    assert torch.allclose(other.grad, alone(model._module, B)[0])


def test_the_gradient_with_respect_to_rows_is_had_beside_an_edit_of_other_rows(model):
    def read():
        hidden = model.h[1].output
        return hidden, model.output.sum()

    def edit():
        model.h[1].output = model.h[1].output * 3
        return model.output.sum()

    with model.trace() as tracer:
        first = tracer.invoke(A, read)
        second = tracer.invoke(B, edit)
    hidden, loss = first.result
    (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert torch.allclose(gradient, alone(model._module, A)[0])
    second.result.backward()
    assert torch.allclose(model._module.h[0].lin.weight.grad, alone(model._module, B, scale=3.0)[1])


def test_rows_read_of_a_frozen_model_may_require_a_gradient_of_their_own(model):
    model._module.requires_grad_(False)

    def read():
        hidden = model.h[1].output.requires_grad_()
        return hidden, model.output.sum()

    with model.trace() as tracer:
        tracer.invoke(B, nothing)
        invoke = tracer.invoke(A, read)
    hidden, loss = invoke.result
    assert torch.allclose(torch.autograd.grad(loss, hidden)[0], alone(Stack(), A)[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_write_without_gradient_leaves_the_gradients_of_the_other_rows(model, mode):
    def write():
        with mode():
            model.h[1].output = model.h[1].output * 2

    with model.trace() as tracer:
        tracer.invoke(A, write)
        loss = tracer.invoke(B, lambda: model.output.sum())
    loss.result.backward()
    assert torch.allclose(model._module.h[0].lin.weight.grad, alone(model._module, B)[1])


def test_what_is_read_without_gradient_keeps_its_own(model):
    def read():
        with torch.no_grad():
            return model.h[1].output

    with model.trace() as tracer:
        invoke = tracer.invoke(A, read)
        tracer.invoke(B, nothing)
    invoke.result.sum().backward()
    expected = copy.deepcopy(model._module)
    expected.zero_grad()
    expected.h[1](expected.h[0](A)).sum().backward()
    assert torch.allclose(model._module.h[0].lin.weight.grad, expected.h[0].lin.weight.grad)


def with_exchanged(structures, exchange):
    """What the model returns for both inputs where the first invoke exchanges something in what it is given."""

    def body():
        exchange(structures.structured.output)

    with structures.trace() as tracer:
        tracer.invoke(A, body)
        tracer.invoke(B, nothing)
    return tracer.result


def test_an_item_that_is_exchanged_in_a_container_is_the_models(structures):
    def exchange(given):
        given["rows"] = given["rows"] * 0

    assert torch.equal(with_exchanged(structures, exchange), torch.cat((A * 2 + 1, B * 3 + 1)))


def test_an_item_that_is_exchanged_deep_in_a_container_is_the_models(structures):
    def exchange(given):
        given["list"][0] = given["list"][0] + 5

    assert torch.equal(with_exchanged(structures, exchange), torch.cat((A * 3 + 6, B * 3 + 1)))


def test_an_item_that_is_changed_in_place_in_a_container_is_the_models(structures):
    assert torch.equal(with_exchanged(structures, lambda given: given["rows"].zero_()), torch.cat((A * 2 + 1, B * 3 + 1)))


def test_what_all_share_in_a_container_is_not_changed(structures):
    for exchange in (lambda given: given["shared"].zero_(), lambda given: given.update(shared=torch.zeros(1, 4))):
        with pytest.raises(EditError, match="share"):
            with_exchanged(structures, exchange)


def test_a_container_that_was_read_and_not_changed_does_not_undo_what_a_later_invoke_replaces(structures):
    def replace():
        structures.structured.output = {
            "rows": torch.zeros(3, 4),
            "list": [torch.zeros(3, 4), None],
            "shared": torch.ones(1, 4),
        }

    with structures.trace() as tracer:
        tracer.invoke(A, lambda: structures.structured.output)
        tracer.invoke(B, nothing)
        tracer.invoke(replace)
    assert torch.equal(tracer.result, torch.ones(3, 4))


def test_a_read_gives_the_same_object_as_long_as_nobody_has_replaced_it(model):
    def read():
        first = model.h[1].output
        return first is model.h[1].output

    with model.trace() as tracer:
        invoke = tracer.invoke(A, read)
        tracer.invoke(B, nothing)
    assert invoke.result


@pytest.mark.parametrize("part", [A * (1 + 1j), A.to(torch.complex64)], ids=["complex", "complex without imaginary part"])
def test_a_value_that_the_whole_cannot_hold_is_refused(model, part):
    def write():
        model.h[1].output = part

    with pytest.raises(EditError, match="cannot hold it"), model.trace() as tracer:
        tracer.invoke(A, write)
        tracer.invoke(B, nothing)


def test_a_value_that_is_no_container_torch_knows_is_refused(model):
    from types import SimpleNamespace

    class Odd(torch.nn.Module):
        def forward(self, x):
            return SimpleNamespace(x=x)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Odd()

        def forward(self, x):
            return self.odd(x).x

    odd = NNsight(Model())
    with pytest.raises(Exception, match="cannot be told"), odd.trace() as tracer:
        tracer.invoke(A, lambda: odd.odd.output)
        tracer.invoke(B, nothing)


def test_inputs_whose_rows_do_not_correspond_are_refused():
    class Two(torch.nn.Module):
        def forward(self, x, y):
            return x.sum() + y.sum()

    two = NNsight(Two())
    with pytest.raises(BatchError), two.trace() as tracer:
        tracer.invoke(torch.ones(1, 2), torch.ones(3, 2), nothing)
        tracer.invoke(torch.ones(1, 2), torch.ones(1, 2), nothing)


def test_a_keyword_is_given_to_the_trace_or_to_an_invoke(gpt2):
    labels = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(BatchError) as caught, gpt2.trace(labels=labels) as tracer, tracer.invoke([1, 2], labels=labels):
        pass
    assert str(caught.value).splitlines()[0] == "`labels` is given to the trace and to an invoke."


def test_one_body_cannot_meet_itself_at_a_barrier(model):
    def body():
        for _ in range(2):
            with pytest.raises(DeadlockError):
                barrier()

    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        tracer.invoke(A, body)


def test_the_finally_block_of_a_body_that_is_closed_does_not_reach_an_outer_trace(model):
    errors = []

    def wait():
        try:
            model.h[2].output
        finally:
            try:
                model.h[2].output = torch.zeros(1, 4)
            except RunEndedError as error:
                errors.append(error)

    def fail():
        model.h[0].output
        raise ValueError("mine")

    with model.trace(A) as outer:
        with pytest.raises(ValueError, match="mine"), model.trace() as tracer:
            tracer.invoke(A, wait)
            tracer.invoke(A, fail)
        assert len(errors) == 1
    assert torch.equal(outer.result, model._module(A))


def test_every_body_is_closed_and_what_one_raises_then_is_noted(model):
    ended = []

    def waiting(name):
        def body():
            try:
                model.h[2].output
            finally:
                ended.append(name)
                raise KeyError(name)

        return body

    def fail():
        model.h[0].output
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught, model.trace() as tracer:
        tracer.invoke(A, waiting("first"))
        tracer.invoke(A, fail)
        tracer.invoke(A, waiting("third"))
    assert ended == ["first", "third"]
    assert [note.split(" it ")[1] for note in caught.value.__notes__] == [
        "raised KeyError: 'first'",
        "raised KeyError: 'third'",
    ]


def test_one_after_another_a_stopped_invoke_has_no_result_and_keeps_its_place(model):
    with model.trace(batched=False) as tracer:
        with tracer.invoke(A):
            model.h[0].output
            tracer.stop()
        with tracer.invoke(B):
            pass
    assert tracer.result[0] is None
    assert torch.equal(tracer.result[1], model._module(B))


class Tupled(torch.nn.Module):
    """A layer that gives a tuple, and a layer behind it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.pair = Pair()

    def forward(self, x):
        hidden, more = self.pair(self.first(x))
        return self.second(hidden) + more["aux"]


class Pair(torch.nn.Module):
    def forward(self, x):
        return x * 1, {"aux": x * 2, "n": None}


@pytest.mark.parametrize("exchanged", [False, True])
def test_the_hidden_states_of_a_tuple_are_replaced_beside_other_reads(exchanged):
    model = NNsight(Tupled())

    def replace():
        if exchanged:
            model.pair.output[1]["aux"] = torch.zeros(2, 4)
        model.pair.hidden = model.pair.hidden * 2

    with model.trace() as tracer:
        tracer.invoke(A, lambda: model.pair.output)
        tracer.invoke(B, replace)
    module = model._module
    hidden = module.first(B)
    changed = module.second(hidden * 2) + (0 if exchanged else hidden * 2)
    assert torch.allclose(tracer.result, torch.cat((module(A), changed)))


def test_rows_that_were_read_are_upstream_of_what_an_invoke_with_all_rows_makes_of_them():
    model = NNsight(Tupled())

    def read():
        hidden = model.pair.hidden
        hidden.retain_grad()
        model.output.sum().backward()
        return hidden.grad

    with model.trace() as tracer:
        invoke = tracer.invoke(A, read)
        tracer.invoke(B, nothing)
        tracer.invoke(lambda: setattr(model.pair, "hidden", model.pair.hidden * 3))
    expected = torch.ones(1, 4) @ model._module.second.weight * 3
    assert torch.allclose(invoke.result, expected)
