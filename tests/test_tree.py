"""Envoys mirror the model's own names, and looking at them never runs it."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from small_models import X4, Stack

from nnsight_eager import NNsight
from nnsight_eager.errors import EditError, InputError


class Named(torch.nn.Module):
    """Has children called like a point, a method and a string method."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.output = torch.nn.Linear(4, 4)
        self.trace = torch.nn.Linear(4, 4)
        self.hidden = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "input": torch.nn.Linear(4, 4)})

    def forward(self, x):
        return self.trace(self.output(self.hidden["input"](self.hidden["a"](x))))


@pytest.fixture
def model():
    return NNsight(Stack())


@pytest.fixture
def named():
    return NNsight(Named())


def message(error):
    return str(error.value)


# Names


def test_children_have_the_models_own_names(model):
    with model.trace(X4) as tracer:
        first = model.h[0].lin.output
        last = model.head.output
    assert torch.equal(first, model._module.h[0].lin(X4))
    assert torch.equal(last, tracer.result)


@pytest.mark.parametrize("key", [0, 2, -1, -3])
def test_an_index_means_what_it_means_to_the_module(model, key):
    assert model.h[key]._module is model._module.h[key]


@pytest.mark.parametrize("key", [slice(1, 3), slice(None, None, -1), slice(-1, None), slice(5, 9)])
def test_a_slice_gives_a_list_of_envoys(model, key):
    assert [envoy._module for envoy in model.h[key]] == list(model._module.h)[key]


def test_a_string_is_a_child_or_a_path(model):
    assert model["h"]["1"]._module is model._module.h[1]
    assert model["h.1.lin"]._module is model._module.h[1].lin


def test_length_iteration_and_containment_follow_the_module(model, named):
    assert len(model.h) == 3
    assert [envoy._module for envoy in model.h] == list(model._module.h)
    assert list(named["hidden"]) == ["a", "input"]
    assert "head" in model
    assert "tail" not in model
    assert bool(model.head)


def test_what_is_neither_point_nor_child_is_the_modules_own(model):
    assert model.head.weight is model._module.head.weight
    assert model.head.in_features == 4
    assert sum(p.numel() for p in model.parameters()) == 5 * 20
    model.head.in_features = 5
    assert model._module.head.in_features == 5


def test_an_attribute_that_is_a_module_of_the_tree_is_an_envoy():
    module = Stack()
    object.__setattr__(module, "first", module.h[0])
    model = NNsight(module)
    with model.trace(X4):
        hidden = model.first.output
    assert torch.equal(hidden, module.h[0](X4))


def test_a_child_called_like_a_point_or_a_method_gets_an_underscore(named):
    assert named.output_._module is named["output"]._module is named._module.output
    assert named.trace_._module is named["trace"]._module is named._module.trace
    assert named.hidden_.input_._module is named["hidden.input"]._module is named._module.hidden["input"]
    with named.trace(X4):
        inner, whole = named.output_.output, named.output
    assert torch.equal(inner, named._module.output(named._module.hidden["input"](named._module.hidden["a"](X4))))
    assert torch.equal(whole, named._module(X4))


def test_dir_lists_the_underscored_names(named):
    assert {"output_", "trace_", "hidden_", "output", "trace"} <= set(dir(named))


def test_a_module_exchanged_for_another_is_picked_up(model):
    _ = model.h[0].lin
    model.h[0].lin = new = torch.nn.Linear(4, 4)
    assert model._module.h[0].lin is new
    with model.trace(X4):
        hidden = model.h[0].lin.output
    assert torch.equal(hidden, new(X4))


def test_a_module_whose_name_is_taken_can_be_exchanged_under_its_underscored_name(named):
    named.output_ = new = torch.nn.Linear(4, 4)
    assert named._module.output is new
    assert "output_" not in named._module._modules


def test_the_tree_shows_repeats_once_and_what_torch_shows_of_each_module(model):
    assert repr(model).splitlines() == [
        "model            Stack",
        "├── h            ModuleList",
        "│   └── 0 … 2    3 x Block",
        "│       └── lin  Linear(in_features=4, out_features=4, bias=True)",
        "├── head         Linear(in_features=4, out_features=4, bias=True)",
        "└── unused       Linear(in_features=4, out_features=4, bias=True)",
    ]
    assert repr(model.h[0]).splitlines() == ["0        Block", "└── lin  Linear(in_features=4, out_features=4, bias=True)"]


# Calling


def test_calling_an_envoy_applies_its_module_and_leaves_the_run_where_it_is(model):
    assert torch.equal(model.head(X4), model._module.head(X4))
    events = []
    handles = [block.register_forward_hook(lambda m, a, o: events.append(m)) for block in model._module.h]
    with model.trace(X4):
        hidden = model.h[0].output
        events.append("called")
        early = model.head(model.h[2](hidden))
        events.append("read")
        late = model.h[1].output
    for handle in handles:
        handle.remove()
    blocks = list(model._module.h)
    assert events == [blocks[0], "called", blocks[2], "read", blocks[1], blocks[2]]
    assert torch.equal(early, model._module.head(blocks[2](hidden)))
    assert torch.equal(late, blocks[1](hidden))


def test_an_applied_module_passes_the_edits_by(model):
    with model.trace(X4):
        model.h[0].output = torch.zeros(1, 4)
        applied = model.h[0](X4)
    assert torch.equal(applied, model._module.h[0](X4))


# Mistakes


def test_an_unknown_name_is_told_with_near_names(model):
    with pytest.raises(AttributeError) as error:
        _ = model.hed
    assert message(error) == "`model` (Stack) has no `hed`; did you mean `head`?"
    with pytest.raises(AttributeError) as error:
        _ = model.h[0].zzz
    assert message(error) == "`model.h[0]` (Block) has no `zzz`."
    with pytest.raises(KeyError) as error:
        _ = model["h.1.lim"]
    assert error.value.args[0] == "`model.h[1]` (Block) has no `lim`; did you mean `lin`?"


def test_an_index_too_far_is_told_with_the_number_there_is(model):
    with pytest.raises(IndexError) as error:
        _ = model.h[3]
    assert message(error) == "`model.h` has 3 modules; there is no [3]."


def test_a_misspelt_point_cannot_be_assigned(model):
    with model.trace(X4), pytest.raises(EditError) as error:
        model.h[0].outptu = torch.zeros(1, 4)
    assert message(error) == (
        "`model.h[0]` (Block) has no `outptu`; did you mean `output`?\n"
        "The points of a module are `output`, `input`, `inputs`, `hidden`, `skip`."
    )
    assert not hasattr(model._module.h[0], "outptu")


def test_near_names_are_never_private_ones(model):
    for wrong in ("hiden", "pth", "modul", "bild", "clidren", "treee"):
        with pytest.raises(AttributeError) as error:
            getattr(model, wrong)
        assert "`_" not in message(error)


@pytest.mark.parametrize("method", ["skip", "next", "trace"])
def test_a_method_cannot_be_assigned_over(model, method):
    """`layer.skip = value` would otherwise look like an edit and do nothing."""
    with pytest.raises(EditError):
        setattr(model, method, torch.zeros(1, 4))


def test_an_underscored_name_that_is_not_there_is_refused_at_once(model):
    assert not hasattr(model, "_anything")
    assert not hasattr(model.h, "_repr_svg_")
    assert not hasattr(model.h[0], "__array__")


def test_something_that_is_no_module_is_refused():
    with pytest.raises(InputError) as error:
        NNsight("gpt2")
    assert message(error) == (
        "`NNsight(...)` was given `str`, which is not a `torch.nn.Module`.\n"
        "Pass the module itself; `LanguageModel` also takes a model's name or folder."
    )


# Copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_is_a_model_of_its_own(model, copied):
    with model.trace(X4):
        _ = model.h[0].output
    other = copied(model)
    with torch.no_grad():
        other.head.weight.zero_()
    with other.trace(X4) as tracer:
        hidden = other.h[1].output
    assert torch.equal(hidden, other.h[1](other.h[0](X4)))
    assert torch.equal(tracer.result, other._module.head.bias.expand(1, 4))
    assert not torch.equal(model(X4), tracer.result)


def test_a_copy_made_while_a_trace_is_open_is_not_part_of_it(model):
    with model.trace(X4):
        model.h[0].output = torch.zeros(1, 4)
        _ = model.h[1].output
        other = copy.deepcopy(model)
        assert torch.equal(other._module(X4), model._module(X4))
        with other.trace(X4) as tracer:
            hidden = other.h[0].output
    assert torch.equal(hidden, model.h[0](X4))
    assert torch.equal(tracer.result, model(X4))


def test_an_unknown_name_gets_one_suggestion_in_plain_python(tmp_path):
    script = tmp_path / "typed.py"
    script.write_text(
        "import torch\nfrom nnsight_eager import NNsight\n"
        "model = NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2)))\nmodel[0].weigth\n"
    )
    shown = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False).stderr
    assert "`model[0]` (Linear) has no `weigth`; did you mean `weight`" in shown
    assert shown.lower().count("did you mean") == 1
