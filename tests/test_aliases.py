import copy
import pickle

import pytest
import torch
from small_models import X4, Stack

from nnsight_eager import LanguageModel, NNsight, OutOfOrderError, PathError


@pytest.fixture
def model():
    return NNsight(Stack(), rename={"h": "layers", "*.lin": ["linear", "w"]})


def test_another_name_gives_the_same_envoy(model):
    assert model.layers is model.h
    assert model.layers[1].linear is model.h[1].lin
    assert model.layers[1].w is model.h[1].lin
    assert model["layers.1.linear"] is model.h[1].lin


def test_a_point_is_read_and_replaced_under_another_name(model):
    own = NNsight(model._module)
    with own.trace(X4):
        plain = own.h[1].lin.output
    with model.trace(X4):
        assert torch.equal(model.layers[1].linear.output, plain)
        model.layers[1].linear.output = plain * 0
        changed = model.output
    with own.trace(X4):
        own.h[1].lin.output = plain * 0
        assert torch.equal(own.output, changed)


def test_messages_use_the_names_that_were_given(model):
    with pytest.raises(OutOfOrderError) as caught, model.trace(X4):
        model.h[2].output
        model.h[0].lin.output
    assert str(caught.value).splitlines()[0] == (
        "`model.layers[0].linear.output` has already run in this step (step 0); the model was paused at "
        "`model.layers[2].output`."
    )


def test_an_open_trace_says_where_it_is_in_the_names_that_were_given(model):
    with model.trace(X4) as tracer:
        model.h[0].lin.output
        assert repr(tracer) == "<forward of Stack: paused at model.layers[0].linear.output, step 0>"


@pytest.mark.parametrize("pattern", ["layers.*.linear", "h.*.w", "layers.*.lin", "h.*.lin"])
def test_a_cache_takes_paths_in_any_names(model, pattern):
    cache = model.cache(X4, modules=pattern)
    assert cache.keys() == ["h.0.lin", "h.1.lin", "h.2.lin"]


def test_a_cache_is_read_in_any_names(model):
    cache = model.cache(X4, modules="layers.*.linear")
    kept = cache["h.1.lin"].output
    assert torch.equal(cache["layers.1.linear"].output, kept)
    assert torch.equal(cache.layers[1].w.output, kept)
    assert "layers.1.w" in cache
    assert "layers.3.w" not in cache


def test_a_map_is_shown_and_asked_in_the_names(model):
    found = model.map(X4)
    assert "model.layers[0…2].linear" in repr(found)
    assert found["layers.1.w"] == found["h.1.lin"]
    with pytest.raises(PathError, match=r"`layers\.1\.line` does not run; did you mean `layers\.1\.linear`"):
        found["layers.1.line"]


def test_the_representation_lists_the_names():
    shown = repr(NNsight(Stack(), rename={"h": "layers", "*.lin": "linear"}))
    assert shown.endswith("with\n  model.layers is model.h\n  model.layers.*.linear is model.h.*.lin")


def test_completion_offers_the_names(model):
    assert "layers" in dir(model)
    assert {"linear", "w"} <= set(dir(model.h[0]))


def test_a_class_names_the_modules_that_are_of_it():
    model = NNsight(Stack(), rename={torch.nn.ModuleList: "blocks"})
    assert model.blocks is model.h


def test_a_path_is_a_name_at_the_module_it_begins_at():
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Stack()

        def forward(self, x):
            return self.inner(x)

    model = NNsight(Outer(), rename={"inner.h": "layers"})
    assert model.layers[0] is model.inner.h[0]
    assert NNsight(Outer(), rename={"*.h": "layers"}).layers._own_path == "inner.h"


def test_one_dictionary_serves_models_that_have_only_some_of_the_modules():
    model = NNsight(Stack(), rename={"h": "layers", "transformer.h": "layers", "*.self_attn": "attention"})
    assert model.layers is model.h


def test_a_name_for_itself_changes_nothing():
    assert NNsight(Stack(), rename={"h": "h"}).h[0]._path == "h.0"


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        ({"h": "output"}, "`rename` cannot call `h` `output`: points and methods of a model are called so."),
        ({"h": "trace"}, "`rename` cannot call `h` `trace`: points and methods of a model are called so."),
        ({"h": "two words"}, "`rename` cannot call `h` `two words`: that is no name."),
        ({"h": "_h"}, "`rename` cannot call `h` `_h`: that is no name."),
        ({"h": "head"}, "`rename` would call both `model.head` and `model.h` `model.head`."),
        ({"h": "x", "head": "x"}, "`rename` would call both `model.h` and `model.head` `model.x`."),
        ({"h": "training"}, "`rename` would hide `model.training`, which `model.h` is not."),
    ],
)
def test_a_name_that_is_taken_is_refused(rename, says):
    with pytest.raises(PathError) as caught:
        NNsight(Stack(), rename=rename)
    assert str(caught.value).splitlines()[0] == says


def test_a_module_is_exchanged_under_another_name():
    model = NNsight(Stack(), rename={"head": "unembed"})
    model.unembed = torch.nn.Identity()
    assert isinstance(model._module.head, torch.nn.Identity)
    assert not hasattr(model._module, "unembed")


class Taken(torch.nn.Module):
    """Has children called like a point, as BERT's layers do, and like a method of the root."""

    def __init__(self):
        super().__init__()
        self.trace = Stack()
        self.layer = torch.nn.ModuleDict({"output": torch.nn.Linear(4, 4), "trace": torch.nn.Linear(4, 4)})

    def forward(self, x):
        return self.layer["trace"](self.layer["output"](self.trace(x)))


def test_a_name_that_is_taken_is_written_with_its_underscore_wherever_a_path_is():
    model = NNsight(Taken())
    assert "trace_ (trace)" in repr(model)
    assert "\nwith" not in repr(model)  # nobody has given these names
    with pytest.raises(OutOfOrderError) as caught, model.trace(X4) as tracer:
        cache = tracer.cache(modules=["layer.output_", "trace_.h.*"])
        model.layer.trace.output
        model.layer.output_.output
    assert str(caught.value).startswith("`model.layer.output_.output` has already run")
    assert caught.value.paused_at == "model.layer.trace.output"
    assert cache.layer.output_.output.shape == cache["layer.output_"].output.shape == cache["layer.output"].output.shape
    assert cache.trace_.h[1].output.shape == (1, 4)
    assert model["layer.output_"] is model.layer["output"]


def test_a_name_of_the_users_choice_comes_before_the_underscored_one():
    model = NNsight(Taken(), rename={"output": "out"})
    assert model.layer.out is model.layer.output_
    with pytest.raises(OutOfOrderError, match=r"^`model\.layer\.out\.output` has already run"), model.trace(X4):
        model.layer.trace.output
        model.layer.out.output


def test_copies_have_the_names(model):
    assert copy.deepcopy(model).layers[0].linear._module is not model.layers[0].linear._module
    assert pickle.loads(pickle.dumps(model)).layers[0].w._own_path == "h.0.lin"


def test_a_language_model_has_the_names_before_and_after_its_weights_are_loaded(folder):
    model = LanguageModel(folder("gpt2"), rename={"transformer.h": "layers", "*.attn": "attention"})
    layer = model.layers[1].attention
    with model.trace("The Eiffel Tower"):
        assert layer.output[0].shape[-1] == 32
        assert layer is model.transformer.h[1].attn


def test_the_rows_of_experts_are_refused_under_another_name():
    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

        def forward(self, x):
            return self.experts[0](x)

    model = NNsight(Routed(), rename={"experts": "parts"})
    from nnsight_eager import RowsError

    with pytest.raises(RowsError), model.trace() as tracer:
        tracer.invoke(X4, lambda: model.parts[0].output)
        tracer.invoke(X4, lambda: None)
