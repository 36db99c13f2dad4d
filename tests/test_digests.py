"""Programs told apart by their code and what they see, the same in every process."""

import functools
import types

import numpy
import pytest
import torch
from small_models import Stack, run_python

from nnsight_eager import NNsight
from nnsight_eager.digests import digest, plain

SCALE = 2.0


def doubled(x):
    return x * 2


def tripled(x):
    return x * 3


def scaling(scale):
    return lambda x: x * scale


def defaulting(scale):
    def edit(x, by=scale):
        return x * by

    return edit


def by_module():
    return SCALE


class Given:
    def __init__(self, scale):
        self.scale = scale

    def method(self):
        return self.scale


def layer(value):
    module = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(module.weight, value)
    torch.nn.init.zeros_(module.bias)
    return module


DIFFERENT = {
    "code": (doubled, tripled),
    "variables": (scaling(2), scaling(3)),
    "tensors": (scaling(torch.ones(3)), scaling(torch.tensor([1.0, 1.0, 1.5]))),
    "types": (scaling(torch.ones(3)), scaling(torch.ones(3).double())),
    "shapes": (scaling(torch.ones(4)), scaling(torch.ones(2, 2))),
    "complex numbers": (scaling(torch.ones(2) * 1j), scaling((torch.ones(2) * 1j).conj())),
    "arrays": (scaling(numpy.arange(3)), scaling(numpy.arange(1, 4))),
    "types of arrays": (scaling(numpy.arange(3)), scaling(numpy.arange(3.0))),
    "numbers of numpy": (scaling(numpy.int64(2)), scaling(numpy.int64(3))),
    "sets": (scaling({3, 7}), scaling({3, 8})),
    "items": (scaling({"by": [1, 2]}), scaling({"by": [1, 3]})),
    "attributes": (scaling(types.SimpleNamespace(by=1)), scaling(types.SimpleNamespace(by=2))),
    "weights": (scaling(layer(1.0)), scaling(layer(2.0))),
    "functions": (scaling(doubled), scaling(tripled)),
    "variables of functions": (scaling(scaling(1)), scaling(scaling(2))),
    "defaults": (defaulting(1), defaulting(2)),
    "arguments": (functools.partial(doubled, x=1), functools.partial(doubled, x=2)),
    "objects": (Given(1).method, Given(2).method),
    "classes": (scaling(Given), scaling(torch.nn.Linear)),
    "layers": (scaling(NNsight(Stack()).h[0]), scaling(NNsight(Stack()).h[1])),
}


def told(program):
    return digest(plain(program))


@pytest.mark.parametrize(("one", "other"), DIFFERENT.values(), ids=DIFFERENT)
def test_programs_that_do_something_else_are_told_apart(one, other):
    assert told(one) == told(one)
    assert told(one) != told(other)


def test_what_a_name_of_the_module_means_tells_programs_apart(monkeypatch):
    before = told(by_module)
    monkeypatch.setattr("test_digests.SCALE", 3.0, raising=True)
    assert told(by_module) != before


def test_a_program_may_see_itself_and_what_has_no_values():
    def again(x):
        return again(x) if x else torch.relu

    assert told(again) == told(again)
    assert told(scaling(torch.ones(2, device="meta"))) == told(scaling(torch.ones(2, device="meta")))


SCRIPT = """
import torch
from nnsight_eager import NNsight
from nnsight_eager.digests import digest, plain
model = NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2)))
vector, names = torch.arange(2.0), {"one", "two", "three"}

def edit():
    model[0].output += vector * ("one" in {"one", "two", "three"}) * [each for each in names][0].count("o")

with model.edit(inplace=True):
    model[0].output += vector
names = sorted(names)
print(digest(plain(edit)), *[digest([*map(plain, each.settings)]) for each in model._tree.edits])
"""


def test_a_program_is_told_the_same_in_another_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    one, other = (run_python(script, PYTHONHASHSEED=seed) for seed in ("1", "2"))
    assert one == other
    assert len(one.split()) == 2
