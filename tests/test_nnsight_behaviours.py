"""What nnsight's documentation promises of one forward pass, written as it is written there, against hooks and autograd."""

import copy

import pytest
import torch
from small_models import X4, Stack, hooked

import nnsight_eager as nnsight
from nnsight_eager import NNsight, NotReachedError, OutOfOrderError, OutsideTraceError, SourceError

TEXT = "The Eiffel Tower is in the city of"


@pytest.fixture
def model():
    return NNsight(Stack())


def outputs(*names, module=None, x=X4):
    """What plain hooks see of a fresh stack, or of `module`, one value for each name."""
    module = Stack() if module is None else module
    return [visits[0] for visits in hooked(module, lambda: module(x), *names)]


def from_block(first, hidden):
    """What a fresh stack gives when block `first` is handed `hidden`."""
    stack = Stack()
    for block in stack.h[first:]:
        hidden = block(hidden)
    return stack.head(hidden)


# Values


def test_output_input_and_inputs_are_what_hooks_see(model):
    first, second = outputs("h.0", "h.1")
    with model.trace(X4):
        received = model.h[1].input.save()
        arguments, keywords = model.h[1].inputs.save()
        given = model.h[1].output.save()
    assert torch.equal(received, first)
    assert torch.equal(arguments[0], first)
    assert keywords == {}
    assert torch.equal(given, second)


def test_input_is_the_first_keyword_where_there_is_no_positional_argument():
    class Scaled(torch.nn.Module):
        def forward(self, *, x, scale):
            return x * scale

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scaled = Scaled()

        def forward(self, x):
            return self.scaled(x=x, scale=2)

    model = NNsight(Outer())
    with model.trace(X4) as tracer:
        received = model.scaled.input.save()
        model.scaled.inputs = ((), {"x": received, "scale": 3})
    assert torch.equal(received, X4)
    assert torch.equal(tracer.result, X4 * 3)


def test_an_output_is_changed_in_place_or_replaced(model):
    with model.trace(X4):
        before = model.h[0].output.clone().save()
        model.h[0].output[:, 1:] = 0
        in_place = model.h[0].output.save()
        model.h[1].output = model.h[1].output * 2
        logits = model.output.save()
    (plain,) = outputs("h.0")
    assert torch.equal(before, plain)
    assert torch.equal(in_place, plain * torch.tensor([1.0, 0, 0, 0]))
    assert torch.equal(logits, from_block(2, Stack().h[1](in_place) * 2))


def test_an_input_is_replaced(model):
    with model.trace(X4) as tracer:
        model.h[1].input = model.h[1].input * 0
    assert torch.equal(tracer.result, from_block(1, X4 * 0))


def test_a_part_of_a_tuple_is_changed_in_place_or_by_a_new_tuple(gpt2):
    attention, block = gpt2.transformer.h[0].attn, gpt2.transformer.h[0]
    with gpt2.trace(TEXT):
        attention.output[0][:] = 0
        in_place = block.hidden.save()
    with gpt2.trace(TEXT):
        attention.output = (torch.zeros_like(attention.output[0]), *attention.output[1:])
        replaced = block.hidden.save()
    handle = attention._module.register_forward_hook(lambda _, args, output: (output[0] * 0, *output[1:]))
    with gpt2.trace(TEXT):
        plain = block.hidden.save()
    handle.remove()
    assert torch.equal(in_place, plain)
    assert torch.equal(replaced, plain)


def test_any_value_is_saved_and_so_is_one_that_was_not(model):
    with model.trace(X4):
        values = [].save()
        values.append(model.h[0].output)
        function = nnsight.save("a string")
        shape, number, unsaved = values[0].shape.save(), (1.5).save(), "another"
    assert torch.equal(values[0], outputs("h.0")[0])
    assert (function, shape, number, unsaved) == ("a string", (1, 4), 1.5, "another")


def test_a_print_in_the_body_prints_the_value_during_the_forward_pass(model, capsys):
    printed = []
    model.h[1]._module.register_forward_hook(lambda *_: printed.append(capsys.readouterr().out))
    with model.trace(X4):
        print(model.h[0].output.tolist())
    assert printed == [f"{outputs('h.0')[0].tolist()}\n"]


def test_conditions_and_loops_in_the_body_are_pythons(model):
    with model.trace(X4):
        if (model.h[0].output.sum() > -1e9).all():
            model.h[0].output[:] = 0
        means = [layer.output.mean() for layer in model.h[1:]]
        last = model.output.save()
    stack = Stack()
    second = stack.h[1](X4 * 0)
    assert torch.equal(torch.stack(means), torch.stack([second.mean(), stack.h[2](second).mean()]))
    assert torch.equal(last, from_block(1, X4 * 0))


def test_a_point_outside_a_trace_and_one_that_has_passed_are_errors(model):
    with pytest.raises(OutsideTraceError):
        _ = model.h[0].output
    with pytest.raises(OutOfOrderError), model.trace(X4):
        _ = model.h[2].output
        _ = model.h[0].output


def test_the_result_is_what_the_call_gives_and_can_be_replaced(model):
    with model.trace(X4) as tracer:
        result = tracer.result.save()
        tracer.result = result * 2
    assert torch.equal(result, Stack()(X4))
    assert torch.equal(tracer.result, Stack()(X4) * 2)


def test_stop_keeps_what_was_read_and_runs_nothing_behind_it(model):
    ran = []
    model.head._module.register_forward_hook(lambda *_: ran.append("head"))
    with model.trace(X4) as tracer:
        hidden = model.h[0].output.save()
        tracer.stop()
        hidden = None
    assert torch.equal(hidden, outputs("h.0")[0])
    assert not ran


def test_a_skipped_module_does_not_run_and_gives_the_replacement(model):
    ran = []
    model.h[1]._module.register_forward_hook(lambda *_: ran.append("h.1"))
    model.h[1].lin._module.register_forward_hook(lambda *_: ran.append("h.1.lin"))
    with model.trace(X4):
        model.h[1].skip(model.h[0].output)
        skipped = model.h[1].output.save()
        logits = model.output.save()
    assert torch.equal(skipped, outputs("h.0")[0])
    assert torch.equal(logits, from_block(2, skipped))
    assert "h.1.lin" not in ran


def test_what_is_inside_a_skipped_module_is_an_error(model):
    with pytest.raises(NotReachedError, match="was skipped"), model.trace(X4):
        model.h[1].skip(model.h[1].input)
        _ = model.h[1].lin.output


# Modules


def test_modules_are_applied_ad_hoc_in_and_out_of_a_trace_and_keep_their_place(model):
    with model.trace(X4):
        hidden = model.h[0].output
        early = model.head(hidden).save()
        ahead = model.h[1](hidden)
        logits = model.head.output.save()
    stack = Stack()
    first, second = outputs("h.0", "h.1")
    assert torch.equal(early, stack.head(first))
    assert torch.equal(ahead, second)
    assert torch.equal(logits, stack(X4))
    assert torch.equal(model.head(first), early)


def test_a_module_added_to_the_tree_is_seen_where_it_is_called_with_hook(model):
    torch.manual_seed(1)
    adapter = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Linear(2, 4))
    model.h[0].adapter = adapter
    with model.edit() as edited:
        model.h[0].output = model.h[0].adapter(model.h[0].output, hook=True)
    with edited.trace(X4) as tracer:
        inner = edited.h[0].adapter[0].output.save()
        given = edited.h[0].adapter.output.save()
    (plain,) = outputs("h.0")
    assert torch.equal(inner, adapter[0](plain))
    assert torch.equal(given, adapter(plain))
    assert torch.equal(tracer.result, from_block(1, given))


def test_a_module_called_without_hook_is_not_seen(model):
    model.h[0].adapter = torch.nn.Linear(4, 4)
    with pytest.raises(NotReachedError), model.trace(X4):
        model.h[0].output = model.h[0].adapter(model.h[0].output)
        _ = model.h[0].adapter.output


def test_what_is_no_child_is_the_modules_own(model):
    layer = model._module.h[0].lin
    assert model.h[0].lin.weight is layer.weight
    assert next(iter(model.parameters())) is next(model._module.parameters())
    assert model.state_dict().keys() == model._module.state_dict().keys()
    model.requires_grad_(False)
    model.eval()
    assert (layer.bias.requires_grad, layer.training, model.training) == (False, False, False)


def test_children_are_indexed_sliced_counted_and_iterated(model):
    modules = list(model._module.h)
    assert [layer._module for layer in model.h] == modules
    assert [layer._module for layer in model.h[1:]] == modules[1:]
    assert (model.h[-1]._module, model.h["1"]._module, len(model.h)) == (modules[2], modules[1], 3)


def test_any_module_and_any_callable_that_runs_it_is_traced(model):
    with model.trace(X4, fn=model._module.generate) as tracer:
        first = model.h[0].output.save()
    assert torch.equal(first, outputs("h.0")[0])
    assert torch.equal(tracer.result, Stack().generate(X4))


def test_one_path_has_several_names_and_they_nest(gpt2):
    names = {"transformer.h": "layers", "mlp": "feedforward", ".transformer": ["model", "mdl"]}
    model = nnsight.LanguageModel(gpt2.dispatch()._module, tokenizer=gpt2.tokenizer, rename=names)
    with model.trace(TEXT) as tracer:
        cache = tracer.cache()
        renamed = model.layers[0].feedforward.output.save()
        own = model.transformer.h[0].mlp.output.save()
        last = model.model.layers[2].hidden.save()
    assert renamed is own
    assert model.mdl.layers[1]._module is gpt2._module.transformer.h[1]
    for found in (cache["layers.2"], cache["model.layers.2"], cache.layers[2], cache["transformer.h.2"]):
        assert torch.equal(found.hidden, last)


# Operations


def test_operations_have_the_names_they_have_in_nnsight(model):
    class Scores(torch.nn.Module):
        def forward(self, x):
            scores = torch.nn.functional.softmax(torch.relu(x) @ x.T, dim=-1)
            scores = torch.relu(scores)
            return scores.sum()

    names = [name.split("source.")[-1] for name in NNsight(Scores()).source]
    assert names == ["torch_relu_0", "torch_nn_functional_softmax_0", "scores_0", "torch_relu_1", "scores_1", "scores_sum_0"]


def test_an_operation_is_read_replaced_and_skipped(model):
    (inside,) = outputs("h.0.lin")
    with model.trace(X4) as tracer:
        arguments, keywords = model.h[0].source.self_lin_0.inputs.save()
        given = model.h[0].source.self_lin_0.output.clone().save()
        model.h[0].source.self_lin_0.output[:] = 0
        model.h[1].source.self_lin_0.skip(X4 * 0)
    assert torch.equal(arguments[0], X4)
    assert keywords == {}
    assert torch.equal(given, inside)
    assert torch.equal(tracer.result, from_block(2, X4))


def test_the_operations_of_what_an_operation_calls(gpt2):
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def noted(*args, **kwargs):
        seen.append(real(*args, **kwargs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch, gpt2.trace(TEXT):
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
        interface = gpt2.transformer.h[0].attn.source.attention_interface_1
        attended = interface.source.torch_nn_functional_scaled_dot_product_attention_0.output.save()
    assert torch.equal(attended, seen[0])


def test_an_operation_that_calls_a_module_sends_the_reader_to_the_modules_own_source(model):
    with pytest.raises(SourceError, match=r"`model\.h\[0\]\.lin\.source`"):
        _ = model.h[0].source.self_lin_0.source


def test_a_source_is_printed_with_the_names_beside_their_lines(model):
    line = next(line for line in repr(model.h[0].source).splitlines() if "return x + self.lin(x)" in line)
    assert line.split()[0] == "self_lin_0"


# Gradients


def autograd(loss_of):
    """The gradients of the three blocks' outputs, by autograd alone; `loss_of` makes the loss of what the stack gives."""
    stack = Stack()
    hidden, x = [], X4
    for block in stack.h:
        x = block(x)
        hidden.append(x)
    return torch.autograd.grad(loss_of(stack.head(x)), hidden)


def test_gradients_of_values_are_read_in_reverse_order(model):
    with model.trace(X4):
        first, last = model.h[0].output, model.h[2].output
        with model.output.square().sum().backward():
            late = last.grad.save()
            early = first.grad.save()
    expected = autograd(lambda output: output.square().sum())
    assert torch.equal(late, expected[2])
    assert torch.equal(early, expected[0])


def test_a_gradient_in_the_order_of_the_forward_pass_is_an_error(model):
    with pytest.raises(OutOfOrderError), model.trace(X4):
        first, last = model.h[0].output, model.h[2].output
        with model.output.sum().backward():
            _ = first.grad
            _ = last.grad


@pytest.mark.parametrize("how", ["replaced", "in place"])
def test_autograd_goes_on_with_a_gradient_that_was_changed(model, how):
    with model.trace(X4):
        first, last = model.h[0].output, model.h[2].output
        with model.output.sum().backward():
            if how == "replaced":
                last.grad = last.grad * 3
            else:
                last.grad[:] = last.grad * 3
            early = first.grad.save()
    torch.testing.assert_close(early, autograd(lambda output: output.sum() * 3)[0])


def test_a_second_backward_pass_of_one_graph(model):
    with model.trace(X4):
        hidden, output = model.h[1].output, model.output
        with output.sum().backward(retain_graph=True):
            once = hidden.grad.save()
        with (output * 2).sum().backward():
            twice = hidden.grad.save()
    assert torch.equal(once, autograd(torch.sum)[1])
    assert torch.equal(twice, once * 2)


def test_a_frozen_model_gives_gradients_from_where_they_are_required(model):
    model.requires_grad_(False)
    with model.trace(X4):
        hidden = model.h[1].output
        hidden.requires_grad_(True)
        with model.output.sum().backward():
            gradient = hidden.grad.save()
    torch.testing.assert_close(gradient, autograd(torch.sum)[1])


def test_a_backward_pass_after_the_trace(model):
    with model.trace(X4) as tracer:
        hidden, output = model.h[1].output.save(), model.output.save()
    with tracer.backward(output.sum()):
        gradient = hidden.grad.save()
    assert torch.equal(gradient, autograd(torch.sum)[1])


def test_a_backward_pass_without_a_block_is_torchs(model):
    with model.trace(X4):
        hidden = model.h[1].output
        hidden.retain_grad()
        model.output.sum().backward()
    other = copy.deepcopy(Stack())
    other(X4).sum().backward()
    assert torch.equal(hidden.grad, autograd(torch.sum)[1])
    assert torch.equal(model.head.weight.grad, other.head.weight.grad)
