"""Edits that stay: every step of every run, in order, before invokes and the code of the trace."""

import weakref

import pytest
import torch
from left_behind import frames_on_other_stacks
from small_models import X4, Stack, hooked

from nnsight_eager import EditError, InvokeError, LanguageModel, NNsight, NotReachedError

B = torch.ones(2, 4)


@pytest.fixture
def model():
    return NNsight(Stack())


def with_hook(model, x, *changes):
    """What the model gives with plain hooks that change outputs: pairs of a path and a function."""
    handles = [
        model._module.get_submodule(path).register_forward_hook(lambda m, a, output, change=change: change(output))
        for path, change in changes
    ]
    try:
        return model._module(x)
    finally:
        for handle in handles:
            handle.remove()


def double(value):
    return value * 2


def test_an_edited_model_is_a_view_and_the_model_itself_stays_as_it_is(model):
    with model.edit() as edited:
        model.h[1].output *= 2
    assert torch.equal(edited.trace(X4).result, with_hook(model, X4, ("h.1", double)))
    assert torch.equal(model.trace(X4).result, model._module(X4))
    assert edited._module is model._module


def test_an_edit_in_place_is_the_models_until_it_is_removed(model):
    def change():
        model.h[1].output = model.h[1].output * 2

    handle = model.edit(change, inplace=True)
    assert torch.equal(model.trace(X4).result, with_hook(model, X4, ("h.1", double)))
    handle.remove()
    handle.remove()
    assert torch.equal(model.trace(X4).result, model._module(X4))
    model.edit(change, inplace=True)
    model.clear_edits()
    assert torch.equal(model.trace(X4).result, model._module(X4))


def test_an_edit_in_place_may_be_a_block_and_last_for_one(model):
    with model.edit(inplace=True):
        model.h[0].output *= 2
    assert torch.equal(model.trace(X4).result, with_hook(model, X4, ("h.0", double)))
    with model.edit(lambda: model.h[0].output.mul_(0.5), inplace=True):
        assert torch.allclose(model.trace(X4).result, model._module(X4))
    assert torch.equal(model.trace(X4).result, with_hook(model, X4, ("h.0", double)))


def test_the_code_of_a_trace_sees_what_edits_have_made(model):
    with model.edit() as edited:
        model.h[1].output = model.h[1].output * 2
    with edited.trace(X4):
        first = edited.h[0].output
        seen = edited.h[1].output
        edited.h[1].output = seen + 1
        last = edited.head.output
    assert torch.equal(first, hooked(model._module, lambda: model._module(X4), "h.0")[0][0])
    assert torch.equal(last, with_hook(model, X4, ("h.1", lambda output: output * 2 + 1)))


def test_edits_run_in_the_order_they_were_made(model):
    model.edit(lambda: model.h[1].output.mul_(2), inplace=True)
    model.edit(lambda: model.h[1].output.add_(1), inplace=True)
    assert torch.equal(model.trace(X4).result, with_hook(model, X4, ("h.1", lambda output: output * 2 + 1)))


def test_an_edit_of_an_edited_model_comes_on_top(model):
    once = model.edit(lambda: model.h[1].output.mul_(2))
    twice = once.edit(lambda: model.h[1].output.add_(1))
    assert torch.equal(once.trace(X4).result, with_hook(model, X4, ("h.1", double)))
    assert torch.equal(twice.trace(X4).result, with_hook(model, X4, ("h.1", lambda output: output * 2 + 1)))


def test_an_edit_runs_in_every_step(model):
    model.edit(lambda: model.h[1].output.mul_(2), inplace=True)
    x = X4
    for _ in range(3):
        x = with_hook(model, x, ("h.1", double))
    assert torch.equal(model.trace(X4, fn="generate").result, x)
    with model.trace(X4, fn="generate") as tracer:
        seen = [model.h[1].output for _ in tracer.iter[:]]
    assert len(seen) == 3
    assert torch.equal(tracer.result, x)


def test_an_edit_under_generate_changes_every_token(gpt2):
    plain = gpt2.generate("The Eiffel Tower", max_new_tokens=3).result
    vector = torch.zeros(320)
    vector[7] = 1e4

    def prefer():
        gpt2.lm_head.output += vector

    edited = gpt2.edit(prefer)
    assert edited.generate("The Eiffel Tower", max_new_tokens=3).result[0, -3:].tolist() == [7, 7, 7]
    assert torch.equal(gpt2.generate("The Eiffel Tower", max_new_tokens=3).result, plain)


def test_an_edit_comes_before_invokes_and_sees_all_rows(model):
    def change():
        assert model.h[1].output.shape[0] == 3
        model.h[1].output = model.h[1].output * 2

    model.edit(change, inplace=True)
    with model.trace() as tracer:
        one = tracer.invoke(X4, lambda: model.h[1].output)
        two = tracer.invoke(B, lambda: model.head.output)
    (hidden,) = hooked(model._module, lambda: model._module(torch.cat((X4, B))), "h.1")[0]
    assert torch.equal(one.result, hidden[:1] * 2)
    assert torch.allclose(two.result, with_hook(model, B, ("h.1", double)))


def test_an_edit_may_read_several_points_and_use_python_around_them(model):
    factors = {0: 2.0, 2: 3.0}

    def change():
        for number, factor in factors.items():
            model.h[number].output *= factor

    edited = model.edit(change)
    expected = with_hook(model, X4, ("h.0", double), ("h.2", lambda output: output * 3))
    assert torch.equal(edited.trace(X4).result, expected)


def test_a_block_means_what_it_meant_where_it_was_written(model):
    def make(factor):
        with model.edit() as edited:
            model.h[1].output *= factor
        factor = None
        return edited

    assert torch.equal(make(3).trace(X4).result, with_hook(model, X4, ("h.1", lambda output: output * 3)))


def test_an_edit_that_fails_is_an_error_at_its_line_in_every_trace(model):
    def wrong():
        model.unused.output

    edited = model.edit(wrong)
    for _ in range(2):
        with pytest.raises(NotReachedError, match=r"`model.unused.output` did not run"):
            edited.trace(X4).result
    assert torch.equal(model.trace(X4).result, model._module(X4))


def test_an_error_of_the_forward_is_raised_at_the_line_of_the_trace_and_names_the_edit(model):
    def wrong():
        model.h[0].output = torch.ones(1, 3)

    edited = model.edit(wrong)
    with pytest.raises(RuntimeError) as caught, edited.trace(X4):
        edited.h[2].output
    assert any("`model.h[0].output` in step 0" in note and __file__ in note for note in caught.value.__notes__)


def test_edits_are_listed(model):
    def named():
        pass

    model.edit(named, inplace=True)
    with model.edit(inplace=True):
        model.h[0].output
    *_, first, second = repr(model).splitlines()
    assert first.startswith("  <edit `test_edits_are_listed.<locals>.named` (")
    assert second.startswith(f"  <edit ({__file__}, line ")


@pytest.mark.parametrize("function", [lambda x: x, 3], ids=["takes an argument", "no function"])
def test_what_cannot_be_an_edit_is_refused_where_it_is_given(model, function):
    with pytest.raises(InvokeError, match="`edit` was given"):
        model.edit(function)


def test_traces_of_an_edited_model_nest_and_leave_nothing_behind(model):
    edited = model.edit(lambda: model.h[1].output.mul_(2))
    before = [list(each.__dict__) for each in model._module.modules()]
    with edited.trace(X4), edited.trace(B):
        inner = edited.h[2].output
    with edited.trace(X4) as stopped:
        edited.h[0].output
        stopped.stop()
    with pytest.raises(ZeroDivisionError), edited.trace(X4):
        edited.h[0].output
        raise ZeroDivisionError
    assert inner.shape == (2, 4)
    assert not [name for name in frames_on_other_stacks() if "_every_step" in name]
    assert [list(each.__dict__) for each in model._module.modules()] == before


def test_steering_adds_a_vector_and_ends_with_its_block(gpt2):
    vector, prompt = torch.randn(32), "The Eiffel Tower is in"
    plain = gpt2.trace(prompt).result.logits
    layer = gpt2._module.transformer.h[1]

    def hook(module, args, output):
        return (output[0] + 3 * vector, *output[1:]) if isinstance(output, tuple) else output + 3 * vector

    handle = layer.register_forward_hook(hook)
    expected = gpt2.trace(prompt).result.logits
    handle.remove()
    with gpt2.steer(gpt2.transformer.h[1], vector, scale=3):
        assert torch.equal(gpt2.trace(prompt).result.logits, expected)
    assert torch.equal(gpt2.trace(prompt).result.logits, plain)


def test_steering_chosen_positions_is_steering_the_prompt(gpt2):
    vector, prompt = torch.randn(32), "The Eiffel Tower is in"
    with gpt2.trace(prompt):
        gpt2.transformer.h[1].hidden[:, [1, 2]] += vector
        expected = gpt2.transformer.h[1].hidden.clone()
    with gpt2.steer(gpt2.transformer.h[1], vector, positions=[1, 2]), gpt2.generate(prompt, max_new_tokens=3) as tracer:
        hidden = [gpt2.transformer.h[1].hidden for _ in tracer.iter[:]]
    assert torch.equal(hidden[0], expected)
    assert len(hidden) == 3


@pytest.mark.parametrize("value", [0, "mean", torch.arange(4.0)], ids=["zero", "mean", "tensor"])
def test_ablation_puts_a_constant_in_the_place_of_an_output(model, value):
    def change(output):
        return output.mean(0, keepdim=True).expand_as(output) if isinstance(value, str) else output * 0 + value

    model.ablate(model.h[1].lin, value)
    assert torch.allclose(model.trace(B).result, with_hook(model, B, ("h.1.lin", change)))
    assert repr(model).endswith("<ablate `model.h[1].lin`>")


def test_an_ablation_to_an_unknown_word_is_refused(model):
    with pytest.raises(EditError, match="`ablate` was given 'median'"):
        model.ablate(model.h[1], "median")


def test_a_model_that_is_not_loaded_yet_shares_its_weights_with_its_edited_view(folder):
    model = LanguageModel(folder("gpt2"))
    with model.edit() as edited:
        model.transformer.h[1].mlp.output *= 0
    assert edited._module is model._module
    assert not torch.equal(edited.trace("The").result.logits, model.trace("The").result.logits)


def test_an_edit_belongs_to_its_own_run_whatever_other_runs_are_open(model):
    edited = model.edit(lambda: setattr(model.h[1], "output", model.h[1].output * 2))
    plain, changed = model._module(X4), with_hook(model, X4, ("h.1", double))
    with edited.trace(X4) as one, model.trace(X4) as two:
        one.model.h[2].output
    assert torch.equal(one.result, changed)
    assert torch.equal(two.result, plain)
    with edited.trace(X4) as outer:
        with model.trace(X4) as inner:
            model.h[0].output
        last = outer.model.head.output
    assert torch.equal(last, changed)
    assert torch.equal(inner.result, plain)


def test_an_edit_of_an_encoder_ends_after_the_first_step(folder):
    model = LanguageModel(folder("t5"))
    with model.edit(lambda: model.encoder.block[0].hidden.mul_(1)).generate("The Eiffel Tower", max_new_tokens=3) as tracer:
        steps = list(tracer.iter[:])
    assert steps == [0, 1, 2]


def test_an_edit_of_an_encoder_and_a_decoder_is_refused_when_the_encoder_no_longer_runs(folder):
    model = LanguageModel(folder("t5"))

    def both():
        model.encoder.block[0].hidden.mul_(1)
        model.decoder.block[1].hidden.mul_(0)

    edited = model.edit(both)
    for _ in range(2):
        with pytest.raises(NotReachedError) as caught:
            edited.generate("The Eiffel Tower", min_new_tokens=3, max_new_tokens=3).result
        assert caught.value.__notes__[0].endswith("which runs in every step: write two edits.")


def test_positions_and_means_count_tokens_and_no_padding(gpt2):
    short, long, vector = "The", "The Eiffel Tower is in the city of", torch.randn(32)
    for change in (
        lambda: gpt2.steer(gpt2.transformer.h[0], vector, positions=0),
        lambda: gpt2.steer(gpt2.transformer.h[0], vector, positions=slice(0, 1)),
    ):
        with change(), gpt2.trace() as tracer:
            beside = tracer.invoke(short, lambda: gpt2.lm_head.output[0, -1])
            tracer.invoke(long, lambda: None)
        with change():
            alone = gpt2.trace(short).result.logits[0, -1]
        assert torch.allclose(beside.result, alone, atol=1e-5)
    with gpt2.ablate(gpt2.transformer.h[0].mlp, "mean"), gpt2.trace([short, short + short]) as tracer:
        mean = gpt2.transformer.h[0].mlp.output[0, -1]
    with gpt2.trace([short, short + short]) as tracer:
        whole = gpt2.transformer.h[0].mlp.output
    ids = gpt2.tokenizer([short, short + short])["input_ids"]
    tokens = torch.cat([row[-len(each) :] for row, each in zip(whole, ids, strict=True)])
    assert torch.allclose(mean, tokens.mean(0), atol=1e-6)


def test_a_position_that_no_prompt_has_is_a_sentence_at_the_trace(gpt2):
    gpt2.steer(gpt2.transformer.h[0], torch.randn(32), positions=50)
    with pytest.raises(EditError, match=r"`positions=50` is not in a prompt of") as caught, gpt2.trace("The Eiffel"):
        gpt2.lm_head.output
    assert caught.value.__notes__ == ["In steer `model.transformer.h[0]`."]


class Flattening(torch.nn.Module):
    """Hands its layer the tokens of all rows one after another, as a mixture does its experts."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x, attention_mask):
        return self.layer(x.flatten(0, 1)).reshape(x.shape)


def test_a_mean_leaves_padding_out_where_tokens_are_flattened():
    model, x, mask = NNsight(Flattening()), torch.randn(2, 3, 4), torch.tensor([[0, 1, 1], [1, 1, 1]])
    with model.ablate(model.layer, "mean"), model.trace(x, attention_mask=mask) as tracer:
        pass
    expected = model._module.layer(x[mask.bool()]).mean(0)
    assert torch.allclose(tracer.result, expected.expand(2, 3, 4), atol=1e-6)


def test_the_padding_of_an_encoders_prompt_is_none_of_its_decoders(folder):
    model = LanguageModel(folder("t5"), rename={"decoder.block": "answering"})
    given = {"input_ids": torch.arange(1, 9).reshape(2, 4), "decoder_input_ids": torch.arange(11, 19).reshape(2, 4)}
    given["attention_mask"] = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    for path, masks, real in (
        ("answering.0", {}, torch.ones(2, 4)),
        ("answering.0", {"decoder_attention_mask": given["attention_mask"].flip(0)}, given["attention_mask"].flip(0)),
        ("encoder.block.0", {}, given["attention_mask"]),
    ):
        layer = model[path]
        with model.trace(**given, **masks):
            plain = layer.hidden
        with model.ablate(path, "mean"), model.trace(**given, **masks):
            assert torch.allclose(layer.hidden[0, 0], plain[real.bool()].mean(0), atol=1e-6)


def test_positions_where_there_is_no_dimension_of_them_are_refused(model):
    with model.steer(model.h[0], torch.ones(4), positions=0), pytest.raises(EditError) as caught:
        model.trace(B).result
    assert str(caught.value).splitlines() == [
        "`positions=0` chooses from `[batch, seq, hidden]`, and this place gives [2, 4] float32.",
        "Leave `positions` away, or give a place that has a vector for each token, such as a layer.",
    ]


def test_what_was_ablated_can_be_changed_in_place(model):
    with model.ablate(model.h[1].lin), model.trace(B):
        model.h[1].lin.output[0] = 1
        seen = model.h[1].lin.output.clone()
    assert seen.tolist() == [[1.0] * 4, [0.0] * 4]


def test_an_edit_changes_no_error(model):
    messages = []
    for each in (model, model.edit(lambda: model.h[0].output)):
        with pytest.raises(NotReachedError) as caught, each.trace(X4, fn="generate") as tracer:
            for _ in range(4):
                tracer.next()
            each.h[0].output
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_stored_block_keeps_nothing_of_its_frame_but_what_it_needs(model):
    class Large:
        pass

    def make():
        large, factor = Large(), 2
        with model.edit(inplace=True):
            model.h[0].output *= factor
        return weakref.ref(large)

    assert make()() is None
    assert torch.equal(model.trace(X4).result, with_hook(model, X4, ("h.0", double)))


def test_an_edit_on_a_child_is_an_edit_of_its_model(model):
    with model.h[1].edit(inplace=True):
        model.h[1].output *= 2
    assert torch.equal(model.trace(X4).result, with_hook(model, X4, ("h.1", double)))
    edited = model.h[0].lin.edit(lambda: model.h[1].output.add_(1))
    assert torch.equal(edited.trace(X4).result, with_hook(model, X4, ("h.1", lambda output: output * 2 + 1)))


def test_a_trees_part_without_its_model_sends_the_reader_there(model):
    with pytest.raises(EditError, match="not reached through its model"), model.trace(X4) as tracer:
        tracer.model.h[1].edit(lambda: None)


def test_a_block_that_cannot_run_elsewhere_is_refused_in_words_that_fit_an_edit(model):
    def leave():
        with model.edit():
            return 1

    with pytest.raises(InvokeError) as caught:
        leave()
    assert str(caught.value) == (
        "This block cannot be run in the model's forward pass: it contains `return`, which would leave the code around it.\n"
        "Write it as a function: `model.edit(function)`."
    )


def test_the_block_of_an_edit_in_place_gives_a_handle(model):
    plain = model.trace(X4).result
    with model.edit(inplace=True) as handle:
        model.h[0].output *= 0
    assert not torch.equal(model.trace(X4).result, plain)
    handle.remove()
    assert torch.equal(model.trace(X4).result, plain)


def test_a_function_is_an_edit_as_a_decorator_too(model):
    plain = model.trace(X4).result

    @model.edit(inplace=True)
    def zero():
        model.h[1].lin.output *= 0

    assert torch.equal(model.trace(X4).result, with_hook(model, X4, ("h.1.lin", lambda output: output * 0)))
    zero.remove()
    assert torch.equal(model.trace(X4).result, plain)


def test_steering_and_ablation_take_a_path_and_nothing_that_is_no_place(model):
    with model.ablate("h.1.lin"), model.steer("h.0", torch.ones(4)):
        assert repr(model).endswith("<ablate `model.h[1].lin`>\n  <steer `model.h[0]`>")
    with pytest.raises(EditError) as caught:
        model.steer(model._module.h[0], torch.ones(4))
    assert str(caught.value).splitlines()[0] == "`steer` was given a `Block`, which is no place in the model."


@pytest.mark.parametrize("kind", ["generator", "coroutine", "with arguments"])
def test_a_function_that_would_never_run_is_refused_as_an_edit(model, kind):
    def generator():
        yield

    async def coroutine():
        pass

    function = {"generator": generator, "coroutine": coroutine, "with arguments": lambda x: x}[kind]
    with pytest.raises(InvokeError) as caught:
        model.edit(function)
    assert str(caught.value).splitlines()[1] == "Give it a plain function that takes no arguments."


def test_an_edit_belongs_to_the_run_that_replays_it_where_runs_are_held_and_forked():
    model = NNsight(Stack())
    module = model._module
    want = module.head(module.h[2](module.h[1](X4) * 0 + 1))  # the first block is what the edit has it give: `X4`

    def edit():
        model.h[0].output = model.h[0].input

    with model.edit(edit, inplace=True):
        run = model.trace(X4).start()
        run.to(model.h[1])
        model.h[1].output = model.h[1].output * 0 + 1
        other = run.fork()
        assert torch.equal(other.model.head.output, want)
        assert torch.equal(run.finish(), want)
        assert torch.equal(other.finish(), want)
        with model.trace(X4 * 3, keep=True) as tracer:
            _ = model.h[1].output
            forked = tracer.fork()
            assert torch.equal(forked.model.h[2].input, module.h[1](X4 * 3))
        assert torch.equal(tracer.result, module.head(module.h[2](module.h[1](X4 * 3))))
        assert torch.equal(forked.finish(), tracer.result)
