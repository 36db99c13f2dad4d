"""An output that is a tuple, used as if it were the tensor in it: what is refused, and what Python's own errors say then."""

import pytest
import torch

from nnsight_eager import NNsight
from nnsight_eager.errors import EditError

X = torch.ones(2, 3)


class Two(torch.nn.Module):
    """As many values as there are rows: a tensor in the place of the tuple could be unpacked."""

    def __init__(self, kind=tuple):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return self.kind((x + 1, x))


class Unpacking(torch.nn.Module):
    def __init__(self, kind=tuple):
        super().__init__()
        self.two = Two(kind)

    def forward(self, x):
        first, second = self.two(x)
        return first - second


@pytest.fixture
def model():
    return NNsight(Unpacking())


HOW = "`model.two.hidden`, the first tensor in it, or write `model.two.output = (hidden, *model.two.output[1:])`."


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_tensor_in_the_place_of_a_tuple_is_refused_at_its_line(kind):
    model = NNsight(Unpacking(kind))
    with pytest.raises(EditError) as caught, model.trace(X):
        model.two.output = X * 0
    assert str(caught.value) == (
        f"`model.two.output` is a {kind.__name__} of 2 values, and was given one tensor, [2, 3] float32.\nAssign it to {HOW}"
    )


def test_what_is_said_to_be_written_instead_is_right(model):
    with model.trace(X) as tracer:
        model.two.hidden = X * 5
    assert tracer.result.equal(X * 4)
    with model.trace(X) as tracer:
        model.two.output = (X * 5, *model.two.output[1:])
    assert tracer.result.equal(X * 4)


def test_a_tensor_is_refused_in_an_invoke_too(model):
    with pytest.raises(EditError, match="is a tuple of 2 values, and was given one tensor"), model.trace() as tracer:
        with tracer.invoke(X):
            model.two.output = X * 0
        with tracer.invoke(X):
            model.two.output


def test_a_tensor_is_refused_while_a_run_is_held_and_changes_nothing(model):
    run = model.trace(X).start()
    with pytest.raises(EditError, match="is a tuple of 2 values"):
        model.two.output = X * 0
    assert run.finish().equal(X)


def _assign(output):
    output[0] = X


MISTAKES = {
    "an item is assigned": _assign,
    "it is multiplied": lambda output: output * 0.5,
    "a tensor is added": lambda output: output + X,
    "its shape is asked for": lambda output: output.shape,
    "it is indexed as a tensor": lambda output: output[:, -1],
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_pythons_own_error_has_a_note_that_says_what_to_write(model, mistake):
    with pytest.raises((TypeError, AttributeError)) as caught, model.trace(X):
        mistake(model.two.output)
    assert caught.value.__notes__ == [f"`model.two.output` is a tuple of 2 values. Read and assign {HOW}"]


def test_the_note_is_there_in_an_invoke_too(model):
    with pytest.raises(TypeError, match="does not support item assignment") as caught, model.trace() as tracer:
        with tracer.invoke(X):
            model.two.output[0] = X
        with tracer.invoke(X):
            model.two.output
    assert f"`model.two.output` is a tuple of 2 values. Read and assign {HOW}" in caught.value.__notes__


def test_other_errors_have_no_note(model):
    with pytest.raises(TypeError) as caught, model.trace(X):
        model.two.output
        raise TypeError("something else")
    assert not hasattr(caught.value, "__notes__")
    with pytest.raises(TypeError, match="item assignment") as caught, model.trace(X):
        model.two.input
        (1, 2)[0] = 3  # of a tuple of the user's own, where the model is at no output
    assert not hasattr(caught.value, "__notes__")
    with pytest.raises(AttributeError) as caught, model.trace(X):
        model.two.output
        [].shape  # of a list of the user's own, where the output is a tuple
    assert not hasattr(caught.value, "__notes__")
