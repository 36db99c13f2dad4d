"""Errors begin at the user's line, and below it tell of the model's own code only."""

import traceback

import pytest
import torch
from small_models import X4, Stack

from nnsight_eager import EditError, LanguageModel, NNsight
from nnsight_eager.tracebacks import for_the_reader


def functions(error):
    """The functions of the frames, outermost first."""
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


def fails_at_the_head(model):
    model.h[2].output = torch.ones(1, 5)
    model.head.output


def test_below_the_users_line_there_is_a_frame_for_each_forward():
    model = NNsight(Stack())
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught, model.trace(X4):
        fails_at_the_head(model)
    here = "test_below_the_users_line_there_is_a_frame_for_each_forward"
    assert functions(caught.value) == [here, "fails_at_the_head", "forward", "forward"]  # of the stack, of the linear layer
    assert "The model was running `model.head`." in caught.value.__notes__


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_decorates_a_forward_in_transformers_is_left_out(folder, kind):
    model = LanguageModel(str(folder(kind)))
    layers = model.transformer.h if kind == "gpt2" else model.model.layers
    with pytest.raises(RuntimeError) as caught, model.trace("The Eiffel Tower is in"):
        layers[1].mlp.output = torch.ones(1, 5)
    assert functions(caught.value)[1:] == ["forward", "forward", "forward"]  # of the whole, of the model in it, of the layer


@pytest.mark.parametrize(
    "fail",
    [
        pytest.param(lambda model: model.trace(X4).start().finish(), id="held"),
        pytest.param(lambda model: model.cache(X4), id="cache"),
        pytest.param(lambda model: model.trace(X4).result, id="result"),
    ],
)
def test_so_it_is_however_the_model_is_run(fail):
    model = NNsight(Stack())
    model._module.h[1].lin = torch.nn.Linear(3, 4)
    with pytest.raises(RuntimeError) as caught:
        fail(model)
    assert functions(caught.value)[1:] == ["<lambda>", "forward", "forward", "forward"]
    assert not [frame for frame in traceback.extract_tb(caught.value.__traceback__) if "_call_impl" in frame.name]


def test_the_frame_that_raised_stays_also_where_it_is_torchs():
    class Forgetful(torch.nn.Module):
        def forward(self, x):
            return self.missing(x)

    model = NNsight(torch.nn.Sequential(Forgetful()))
    with pytest.raises(AttributeError, match="missing") as caught, model.trace(X4):
        model.output
    assert functions(caught.value)[1:] == ["forward", "forward", "__getattr__"]


def test_a_hook_of_the_users_own_is_shown():
    def hook(module, args):
        raise ZeroDivisionError

    model = NNsight(Stack())
    model._module.head.register_forward_pre_hook(hook)
    with pytest.raises(ZeroDivisionError) as caught, model.trace(X4):
        model.head.output
    assert functions(caught.value)[1:] == ["forward", "hook"]


def test_nothing_is_left_out_of_no_traceback():
    assert for_the_reader(None) is None


def assign(model):
    model.h[0].outptu = 3


def test_an_attribute_that_cannot_be_assigned_is_refused_at_its_line():
    with pytest.raises(EditError, match="has no `outptu`; did you mean `output`") as caught:
        assign(NNsight(Stack()))
    assert functions(caught.value)[1:] == ["assign"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda model: model.transformer, "`model` (Stack) has no `transformer`."),
        (lambda model: model.heed, "`model` (Stack) has no `heed`; did you mean `head`?"),
        (lambda model: model.h[40], "`model.h` has 3 modules; there is no [40]."),
        (lambda model: model["h.40"], "`model.h` (ModuleList) has no `40`."),
    ],
)
def test_a_name_that_is_not_there_is_refused_at_its_line_and_in_our_words_only(wrong, said):
    with pytest.raises((AttributeError, LookupError)) as caught:
        wrong(NNsight(Stack()))
    assert functions(caught.value)[1:] == ["<lambda>"]
    assert caught.value.args == (said,)
    assert getattr(caught.value, "obj", None) is None  # or Python would make a suggestion of its own behind ours
