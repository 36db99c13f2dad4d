"""What `output`, `input`, `inputs`, `hidden` and `skip` read and replace, against plain hooks and calls."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from small_models import X4, Stack
from torch.utils.checkpoint import checkpoint

from nnsight_eager import NNsight
from nnsight_eager.errors import ChangedInPlaceError, EditError, NotReachedError, OutOfOrderError


@pytest.fixture
def model():
    return NNsight(Stack())


def of(*modules):
    return NNsight(torch.nn.Sequential(*modules))


class Calling(torch.nn.Module):
    """A parent that calls its one child as it is told."""

    def __init__(self, child, call) -> None:
        super().__init__()
        self.child = child
        self.call = call

    def forward(self, x):
        return self.call(self.child, x)


class Sum(torch.nn.Module):
    def forward(self, a=0, b=0, *, c=0):
        return torch.as_tensor(a + 10 * b + 100 * c)


# Output


def test_a_read_gives_what_was_last_written(model):
    with model.trace(X4) as tracer:
        first = model.h[1].output
        model.h[1].output = first * 2
        model.h[1].output = model.h[1].output + 1
        again = model.h[1].output
    assert torch.equal(again, 2 * first + 1)
    assert torch.equal(tracer.result, model.head(model.h[2](2 * first + 1)))


def test_writing_needs_no_reading(model):
    with model.trace(X4) as tracer:
        model.h[1].output = torch.ones(1, 4)
    assert torch.equal(tracer.result, model.head(model.h[2](torch.ones(1, 4))))


def test_a_change_in_place_is_an_edit(model):
    with torch.no_grad(), model.trace(X4) as tracer:
        model.h[1].output[:, 0] = 7
    with torch.no_grad():
        changed = model.h[1](model.h[0](X4))
        changed[:, 0] = 7
        assert torch.equal(tracer.result, model.head(model.h[2](changed)))


def test_the_roots_output_is_the_result_and_can_be_replaced(model):
    with model.trace(X4) as tracer:
        model.output = model.output * 2
    assert torch.equal(tracer.result, 2 * model(X4))


@pytest.mark.parametrize("edited", [False, True], ids=["read", "edited"])
def test_the_output_is_what_the_parent_receives_behind_forward_hooks(model, edited):
    """A hook sees what the module computed; the reader, and the parent, what the hook made of it."""
    seen = []
    handle = model._module.h[1].register_forward_hook(lambda m, args, out: seen.append(out) or out + 5)
    with model.trace(X4):
        output = model.h[1].output
        if edited:
            model.h[1].output = output * 2
        received = model.h[2].input
    handle.remove()
    assert torch.equal(seen[0], model.h[1](model.h[0](X4)))
    assert torch.equal(output, seen[0] + 5)
    assert torch.equal(received, output * 2 if edited else output)


# Input


def test_the_input_can_be_read_and_replaced(model):
    with model.trace(X4) as tracer:
        entered = model.h[1].input
        model.h[1].input = entered * 2
        output = model.h[1].output
    assert torch.equal(entered, model.h[0](X4))
    assert torch.equal(output, model.h[1](2 * entered))
    assert torch.equal(tracer.result, model.head(model.h[2](output)))


def test_the_input_can_still_be_read_at_the_output(model):
    with model.trace(X4):
        output = model.h[1].output
        entered = model.h[1].input
    assert torch.equal(entered, model.h[0](X4))
    assert torch.equal(output, model.h[1](entered))


def test_the_input_cannot_be_replaced_at_the_output(model):
    with pytest.raises(OutOfOrderError) as caught, model.trace(X4):
        _ = model.h[1].output
        model.h[1].input = X4
    assert str(caught.value) == (
        "`model.h[1].input` cannot be set any more: the model is paused at `model.h[1].output`.\n"
        "Set `model.h[1].input` above the line that reads `model.h[1].output`."
    )


def test_an_input_that_was_changed_in_place_is_refused_at_the_output():
    model = of(torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True))
    with pytest.raises(ChangedInPlaceError) as caught, model.trace(X4):
        _ = model[1].output
        _ = model[1].input
    assert str(caught.value) == (
        "`model[1].input` no longer holds what the module received: it was changed in place, or made "
        "under inference mode, where torch keeps no record of that.\n"
        "Read `model[1].input` above the line that reads its output."
    )


def test_an_input_that_the_body_itself_changed_in_place_is_what_the_module_receives():
    model = of(torch.nn.Linear(4, 4), torch.nn.Identity())
    with torch.no_grad(), model.trace(X4):
        model[1].input.zero_()
        entered, output = model[1].input, model[1].output
    assert torch.equal(entered, torch.zeros(1, 4))
    assert torch.equal(output, torch.zeros(1, 4))


CALLS = {
    "positional": (lambda m, x: m(x, x + 1), lambda x: ((x, x + 1), {})),
    "keywords": (lambda m, x: m(a=x, b=x + 1), lambda x: ((), {"a": x, "b": x + 1})),
    "keyword-only": (lambda m, x: m(c=x), lambda x: ((), {"c": x})),
    "both": (lambda m, x: m(x, c=x + 1), lambda x: ((x,), {"c": x + 1})),
}


@pytest.mark.parametrize("how", CALLS)
def test_inputs_are_all_arguments_and_input_is_the_first(how):
    call, arguments = CALLS[how]
    model = NNsight(Calling(Sum(), call))
    expected_args, expected_kwargs = arguments(3)
    with model.trace(3) as tracer:
        args, kwargs = model.child.inputs
        first = model.child.input
        model.child.input = 7
    assert (args, kwargs) == (expected_args, expected_kwargs)
    assert first == 3
    replaced = ((7, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): 7})
    assert tracer.result == Sum()(*replaced[0], **replaced[1])


def test_inputs_can_be_replaced_by_other_arguments():
    model = NNsight(Calling(Sum(), lambda m, x: m(x)))
    with model.trace(3) as tracer:
        model.child.inputs = (1,), {"b": 2, "c": 3}
    assert tracer.result == 321


@pytest.mark.parametrize(("value", "shown"), [(5, "int"), ((X4,), "([1, 4] float32)"), ([X4, 1], "[[1, 4] float32, int]")])
def test_inputs_that_are_no_pair_are_refused(model, value, shown):
    with pytest.raises(EditError) as caught, model.trace(X4):
        model.h[1].inputs = value
    assert str(caught.value) == (
        f"`model.h[1].inputs` was given {shown}; it takes a pair `(args, kwargs)`.\n"
        "Write `layer.inputs = ((hidden,), {})`, or `layer.input = hidden` for the first argument alone."
    )


def test_a_module_called_without_arguments_has_no_input():
    model = NNsight(Calling(Sum(), lambda m, x: m()))
    with pytest.raises(NotReachedError) as caught, model.trace(3):
        assert model.child.inputs == ((), {})
        _ = model.child.input
    assert str(caught.value) == (
        "`model.child.input` does not exist: the module was called without arguments.\n"
        "`model.child.inputs` gives `((), {})` there."
    )


# Skip


def test_skip_leaves_the_forward_out(model):
    events = []
    handle = model._module.h[1].lin.register_forward_pre_hook(lambda *a: events.append("ran"))
    with model.trace(X4) as tracer:
        model.h[1].skip(model.h[1].input)
        output = model.h[1].output
    handle.remove()
    assert events == []
    assert torch.equal(output, model.h[0](X4))
    assert torch.equal(tracer.result, model.head(model.h[2](output)))


def test_the_output_of_a_skipped_module_can_be_replaced(model):
    with model.trace(X4) as tracer:
        model.h[1].skip(X4)
        model.h[1].output = model.h[1].output * 2
    assert torch.equal(tracer.result, model.head(model.h[2](2 * X4)))


def test_what_lies_inside_a_skipped_module_is_not_reached(model):
    with pytest.raises(NotReachedError) as caught, model.trace(X4):
        model.h[1].skip(X4)
        _ = model.h[1].lin.output
    assert str(caught.value) == (
        "`model.h[1].lin.output` does not run in this step: it is inside `model.h[1]`, which was skipped.\n"
        "Read it in a trace that does not skip that module."
    )


def test_a_module_that_has_run_cannot_be_skipped(model):
    with pytest.raises(OutOfOrderError) as caught, model.trace(X4):
        _ = model.h[1].output
        model.h[1].skip(X4)
    assert caught.value.asked == "model.h[1].skip"


def test_the_root_can_be_skipped(model):
    with model.trace(X4) as tracer:
        model.skip(X4)
    assert torch.equal(tracer.result, X4)


# Hidden


@dataclass
class Out:
    hidden: torch.Tensor
    rest: int = 0


def tensors(value):
    """Every tensor in a result of this file's modules, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict, Out)):
        for each in value.values() if isinstance(value, dict) else vars(value).values() if isinstance(value, Out) else value:
            yield from tensors(each)


Named = namedtuple("Named", "first second")

WRAPPED = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, 1),
    "none first": lambda x: (None, x, x + 1),
    "list": lambda x: [x, 1],
    "named tuple": lambda x: Named(x, 1),
    "dict": lambda x: {"hidden": x, "rest": 1},
    "dataclass": lambda x: Out(x, 1),
    "nested": lambda x: ((x, 2), {"rest": x}),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_hidden_is_the_first_tensor_of_the_output_however_it_is_wrapped(how):
    wrap = WRAPPED[how]
    model = NNsight(Calling(Calling(torch.nn.Identity(), lambda m, x: wrap(m(x))), lambda m, x: m(x)))
    with model.trace(X4) as tracer:
        before, whole = model.child.hidden, model.child.output
        model.child.hidden = before + 1
        after = model.child.output
    assert before is X4
    assert tracer.result is after
    assert str(whole) == str(wrap(X4))
    assert type(after) is type(whole)
    (found, *others), (_, *expected_others) = (list(tensors(each)) for each in (after, wrap(X4)))
    assert torch.equal(found, X4 + 1)
    assert all(map(torch.equal, others, expected_others))


def test_a_module_that_returns_no_tensor_has_no_hidden():
    model = NNsight(Calling(Sum(), lambda m, x: (m(x), "text")[1:]))
    with pytest.raises(NotReachedError) as caught, model.trace(3):
        _ = model.hidden
    assert str(caught.value) == (
        "`model.hidden` does not exist: the module returned no tensor.\n`model.output` gives what it returned."
    )


# Gradient checkpointing


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("inside", [lambda m: m.child.child, lambda m: m.child.child.lin], ids=["the module", "inside it"])
def test_an_edit_inside_a_checkpointed_module_is_refused(use_reentrant, inside):
    stack = Stack()
    call = lambda m, x: checkpoint(m, x, use_reentrant=use_reentrant)  # noqa: E731
    model = NNsight(Calling(Calling(stack.h[0], call), lambda m, x: m(x)))
    x = X4.clone().requires_grad_()
    with pytest.raises(EditError) as caught, model.trace(x):
        inside(model).output = torch.zeros(1, 4)
    assert str(caught.value).endswith(
        " is inside gradient checkpointing: its forward is computed again for the gradient, unedited.\n"
        "Call `gradient_checkpointing_disable()` on the model first, or edit the checkpointed module as a whole."
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_reading_inside_a_checkpointed_module_leaves_the_gradient_right(use_reentrant):
    stack = Stack()
    call = lambda m, x: checkpoint(m, x, use_reentrant=use_reentrant)  # noqa: E731
    model = NNsight(Calling(stack.h[0], call))
    x, plain = X4.clone().requires_grad_(), X4.clone().requires_grad_()
    with model.trace(x) as tracer:
        hidden = model.child.lin.output
        model.output = model.output * 3
    tracer.result.sum().backward()
    (3 * stack.h[0](plain)).sum().backward()
    assert torch.equal(hidden, stack.h[0].lin(X4))
    assert torch.equal(x.grad, plain.grad)


def test_in_one_process_the_local_points_are_the_points_themselves(gpt2):
    block, attention = gpt2.transformer.h[1], gpt2.transformer.h[1].attn
    with torch.no_grad(), gpt2.trace("The Eiffel Tower") as expected:
        block.input = block.input * 2
        attention.pattern = attention.pattern * 0.5
        block.mlp.inputs = ((block.mlp.input + 1,), {})
        block.mlp.output = block.mlp.output * 3
        block.hidden = block.hidden - 1
        gpt2.transformer.h[2].skip(gpt2.transformer.h[2].input)
    with torch.no_grad(), gpt2.trace("The Eiffel Tower") as tracer:
        local = block.local
        local.input = block.local.input * 2
        assert local.input is block.input
        attention.local.pattern = attention.local.pattern * 0.5
        assert attention.local.pattern is attention.pattern
        args, _ = block.mlp.local.inputs
        block.mlp.local.inputs = ((args[0] + 1,), {})
        block.mlp.local.output = block.mlp.local.output * 3
        local.hidden = local.hidden - 1
        assert local.hidden is block.hidden
        gpt2.transformer.h[2].local.skip(gpt2.transformer.h[2].local.input)
    assert tracer.result.logits.equal(expected.result.logits)
