"""The README's table of what a script written for nnsight has to change: what is to be written instead does what it did."""

import pytest
import torch
from small_models import X4, Stack, hooked

from nnsight_eager import CacheError, InvokeError, LanguageModel, NNsight, StepError

TEXT = "The Eiffel Tower is in the city of"


@pytest.fixture
def model():
    return NNsight(Stack())


def test_without_a_block_the_call_is_made_when_its_result_is_asked_for(model, gpt2):
    ids = torch.tensor([gpt2.tokenizer(TEXT)["input_ids"]])
    expected = gpt2.dispatch()._module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0
    )
    ran = []
    model.head._module.register_forward_hook(lambda *_: ran.append("head"))
    tracer = model.trace(X4)
    assert not ran
    assert torch.equal(tracer.result, Stack()(X4))
    assert torch.equal(gpt2.generate(TEXT, max_new_tokens=2, do_sample=False).result, expected)


def test_an_edit_applies_to_a_call_without_a_block(model):
    with model.edit(inplace=True):
        model.head.output *= 0
    assert not model.trace(X4).result.any()


def test_a_method_of_the_module_is_run_by_its_name(model):
    with model.trace(X4, 2, fn="generate") as tracer:
        first = model.h[0].output.save()
        second = model.h[0].next().output.save()
    stack = Stack()
    (seen,) = hooked(stack, lambda: stack.generate(X4, 2), "h.0")
    assert torch.equal(first, seen[0])
    assert torch.equal(second, seen[1])
    assert torch.equal(tracer.result, Stack().generate(X4, 2))


def test_the_handle_of_an_edit_in_place_takes_away_that_one(model):
    with model.edit(inplace=True) as handle:
        model.h[0].output[:] = 0
    with model.edit(inplace=True):
        model.head.output *= 2
    handle.remove()
    assert torch.equal(model.trace(X4).result, Stack()(X4) * 2)


def test_several_steps_are_gone_on_by(gpt2):
    with gpt2.generate(TEXT, max_new_tokens=4, do_sample=False) as tracer:
        first = gpt2.lm_head.output[0, -1].argmax()
        tracer.next(2)
        third = gpt2.lm_head.output[0, -1].argmax()
        tracer.next(step=1)
        fourth = gpt2.lm_head.output[0, -1].argmax()
    new = tracer.result[0, -4:].tolist()
    assert [int(token) for token in (first, third, fourth)] == [new[0], *new[2:]]


def test_going_on_by_no_step_is_refused(gpt2):
    for step in (0, -1):
        with pytest.raises(StepError), gpt2.generate(TEXT, max_new_tokens=2) as tracer:
            tracer.next(step)


def test_the_tokens_of_a_generation_are_the_inputs_of_its_steps(gpt2):
    read = []
    with gpt2.generate(TEXT, max_new_tokens=3, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            read.append(gpt2.transformer.wte.input)
    assert torch.equal(torch.cat(read, 1), tracer.result[:, :-1])


def test_the_output_of_several_visits_is_asked_for_visit_by_visit(model):
    with model.trace(X4, fn="generate") as tracer:
        cache = tracer.cache(modules=[model.h[0]])
    stack = Stack()
    (seen,) = hooked(stack, lambda: stack.generate(X4), "h.0")
    with pytest.raises(CacheError, match=r"visits\[0\]\.output"):
        _ = cache["model.h.0"].output
    assert all(map(torch.equal, [each.output for each in cache["model.h.0"].visits], seen))


def test_the_paths_of_a_cache_are_torchs(model):
    with model.trace(X4) as tracer:
        cache = tracer.cache()
    assert set(cache.keys()) == {path for path, _ in model._module.named_modules()} - {"h", "unused"}


def test_a_module_is_found_by_its_path_and_the_modules_are_torchs(model):
    assert model["h.0.lin"] is model.h[0].lin
    with model.trace(X4):
        hidden = model["h.0.lin"].output.save()
    assert torch.equal(hidden, Stack().h[0].lin(X4))
    assert dict(model.named_modules()) == dict(model._module.named_modules())


def test_a_child_whose_name_is_taken_has_an_underscore(folder):
    layer = LanguageModel(folder("bert")).bert.encoder.layer[0]
    assert layer.output_ is layer["output"]
    assert layer.output_._module is layer._module.output


def test_a_scan_of_several_prompts_is_a_scan_of_a_list(gpt2):
    with gpt2.scan([TEXT, "Rome"]):
        shape = gpt2.lm_head.output.shape
    assert shape == (2, len(gpt2.tokenizer(TEXT)["input_ids"]), 320)
    with pytest.raises(InvokeError, match=r"model\.scan\(\[one, other\]\)"), gpt2.scan(TEXT) as tracer:
        tracer.invoke("Rome")


class Thrice(torch.nn.Module):
    """Runs its one layer three times in a pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return x


def test_the_visits_of_one_pass_are_met_one_after_another():
    model = NNsight(Thrice())
    with model.trace(X4):
        read = [visit.output for visit in model.layer.visits()]
    with model.trace(X4):
        operations = [visit.output for visit in model.source.torch_tanh_0.visits()]
    (seen,) = hooked(model._module, lambda: model._module(X4), "layer")
    assert len(read) == len(operations) == 3
    assert all(map(torch.equal, read, seen))
    assert all(map(torch.equal, operations, map(torch.tanh, seen)))


def test_a_source_is_a_dictionary_of_its_operations(model):
    source = model.h[0].source
    assert list(source) == ["self_lin_0"]
    assert "self_lin_0" in source
    with model.trace(X4):
        inside = [source[name].output for name in source]
    assert torch.equal(inside[0], Stack().h[0].lin(X4))


def test_the_side_to_pad_on_is_the_models_whatever_the_tokenizer_says(gpt2):
    alone = gpt2.trace("Rome").result.logits[0, -1]
    gpt2.tokenizer.padding_side = "right"
    torch.testing.assert_close(gpt2.trace([TEXT, "Rome"]).result.logits[1, -1], alone)


def test_how_inputs_become_one_batch_is_said_in_one_method(model):
    class Doubled(NNsight):
        def batch(self, inputs):
            given, sizes = super().batch(inputs)
            return given._replace(args=tuple(each * 2 for each in given.args)), sizes

    doubled = Doubled(Stack())
    with doubled.trace() as tracer:
        with tracer.invoke(X4):
            one = doubled.h[0].input.save()
        with tracer.invoke(X4 + 1):
            other = doubled.h[0].input.save()
    assert torch.equal(one, X4 * 2)
    assert torch.equal(other, X4 * 2 + 2)
