"""Shapes without computing, and without weights."""

import pytest
import torch
from left_behind import everything
from small_models import X4, Stack
from torch._subclasses.fake_tensor import FakeTensor

from nnsight_eager import InputError, LanguageModel, NNsight, PathError, RunError
from nnsight_eager.nested import tensors

PROMPT = "The Eiffel Tower is in"


@pytest.fixture
def model():
    return NNsight(Stack())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
def test_shapes_are_those_of_a_real_run_and_weights_are_not_loaded(folder, kind):
    scanned, real = LanguageModel(folder(kind)), LanguageModel(folder(kind))
    seen = {}
    with scanned.scan(PROMPT) as scan:
        for path, module in scanned._module.named_modules():
            scan.watch(module, lambda visit, path=path: seen.setdefault((path, visit.kind), form(visit)))
    assert all(each.device.type == "meta" for each in scanned._module.parameters())
    expected = {}
    with real.trace(PROMPT) as tracer:
        for path, module in real._module.named_modules():
            tracer.watch(module, lambda visit, path=path: expected.setdefault((path, visit.kind), form(visit)))
    assert list(seen) == list(expected)
    assert seen == expected


def form(visit):
    """The tensors of an output, or the first of the inputs: transformers leaves out a mask whose values are all ones."""
    every = list(tensors(visit.value)) if visit.kind == "output" else list(tensors((visit.args, visit.kwargs)))[:1]
    return [(tuple(each.shape), each.dtype) for each in every]


def test_the_block_of_a_scan_is_the_block_of_a_trace(gpt2):
    with gpt2.scan(PROMPT) as scan:
        hidden = gpt2.transformer.h[1].hidden
        gpt2.transformer.h[1].hidden = hidden * torch.ones(1, 1, 32)
        guess = gpt2.lm_head(gpt2.transformer.ln_f(hidden))
        logits = gpt2.lm_head.output
    assert isinstance(hidden, FakeTensor)
    assert guess.shape == logits.shape == scan.result.logits.shape == gpt2.trace(PROMPT).result.logits.shape


def test_behind_a_scan_everything_is_as_before(model):
    before, state = everything(model), {name: id(each) for name, each in model._module.state_dict(keep_vars=True).items()}
    with model.scan(X4):
        model.h[1].output
    with pytest.raises(ZeroDivisionError), model.scan(X4):
        model.h[1].output
        raise ZeroDivisionError
    with model.scan(X4) as scan:
        model.h[0].output
        scan.stop()
    assert everything(model) == before
    assert {name: id(each) for name, each in model._module.state_dict(keep_vars=True).items()} == state
    assert not isinstance(torch.ones(1), FakeTensor)
    with model.trace(X4):
        assert torch.equal(model.output, model._module(X4))


def test_a_wrong_edit_is_found_by_a_scan(model):
    with pytest.raises(RuntimeError) as caught, model.scan(X4):
        model.h[0].output = torch.ones(1, 3)
    assert any("[1, 4] float32 became [1, 3] float32" in note for note in caught.value.__notes__)


def test_asking_a_scan_for_a_value_says_that_it_has_none(model):
    with pytest.raises(Exception, match="_local_scalar_dense") as caught, model.scan(X4):
        model.h[0].output.sum().item()
    assert caught.value.__notes__ == ["A scan has shapes and no values, and something here asks for a value."]


class Choosing(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_model_that_asks_a_map_or_the_end_of_a_scan_for_a_value_says_so_too():
    def scanned(model):
        with model.scan(X4):
            pass

    for show in (scanned, lambda model: model.map(X4)):
        with pytest.raises(Exception, match=r"aten\.") as caught:
            show(NNsight(Choosing()))
        assert caught.value.__notes__[-1] == "A scan has shapes and no values, and something here asks for a value."


def test_a_map_lists_the_modules_in_the_order_they_begin(model):
    found = model.map(X4)
    assert [row.path for row in found.rows] == ["", "h.0", "h.0.lin", "h.1", "h.1.lin", "h.2", "h.2.lin", "head"]
    assert found["h.1.lin"] == ("h.1.lin", "Linear", "[1, 4] float32", "[1, 4] float32", 1)
    text = repr(found)
    assert "model.h[0…2].lin" in text  # alike but for the number
    assert "unused" not in text


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.lin(self.lin(x))


def test_a_map_counts_visits():
    assert NNsight(Twice()).map(X4)["lin"].visits == 2


def test_a_scan_of_another_method_is_refused(model):
    from nnsight_eager.scan import Scan

    with pytest.raises(InputError, match="A scan runs the forward pass"):
        Scan(model._tree, model._call("generate", (X4,), {}))


def test_a_second_scan_is_refused_while_one_is_open_and_nothing_stays_fake(model):
    def scanning():
        with model.scan(X4):
            yield model.h[0].output.shape

    first, second = scanning(), scanning()
    next(first)
    with pytest.raises(RunError, match="open already"):
        next(second)
    first.close()
    scan = model.scan(X4)
    with scan, pytest.raises(RunError, match="open already"):
        scan.__enter__()
    assert not any(isinstance(each, FakeTensor) for each in model._module.parameters())
    assert not isinstance(torch.ones(1), FakeTensor)


def test_a_map_has_no_row_for_what_does_not_run(model):
    with pytest.raises(PathError, match="`unused` does not run"):
        model.map(X4)["unused"]


def test_a_scan_that_cannot_begin_leaves_no_fake_mode(model, monkeypatch):
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    from nnsight_eager.trace import Trace

    def broken(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trace, "__enter__", broken)
    with pytest.raises(KeyboardInterrupt):
        model.scan(torch.ones(1, 4)).__enter__()
    assert _get_current_dispatch_mode() is None
    assert type(torch.ones(1)) is torch.Tensor


def test_a_map_shows_visits_where_a_module_is_visited_more_than_once_and_counts_its_rows(model):
    found = model.map(X4)
    assert len(found) == 8
    assert "visits" not in repr(found)

    assert repr(NNsight(Twice()).map(X4)).splitlines()[0].split()[-1] == "visits"


@pytest.mark.parametrize("prompt", ["The Eiffel", ["The", "The Eiffel Tower is in"]], ids=["one", "padded"])
def test_steering_and_ablation_are_in_scans(gpt2, prompt):
    shape = gpt2.map(prompt)["transformer.h.1"].output
    for positions in (0, -1, slice(0, 1), [0, -1], (0, -1)):
        gpt2.steer(gpt2.transformer.h[0], torch.randn(32), positions=positions)
    gpt2.ablate(gpt2.transformer.h[1], "mean")
    gpt2.ablate(gpt2.transformer.h[1].mlp, "mean", positions=0)
    assert gpt2.map(prompt)["transformer.h.1"].output == shape
    with gpt2.scan(prompt):
        assert gpt2.transformer.h[1].hidden.shape[-1] == 32
