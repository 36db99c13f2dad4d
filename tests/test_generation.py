"""Generation: steps, loops, decoding strategies, and the result."""

import pytest
import torch

import nnsight_eager
from nnsight_eager import LanguageModel

PROMPT = "The Eiffel Tower is in the city of"


def plain(model, kind="ids", **options):
    """What transformers itself generates, and the hidden states a plain hook sees at every step."""
    module, seen = model.dispatch()._module, []
    layer = module.get_submodule("transformer.h.1")
    handle = layer.register_forward_hook(lambda m, args, out: seen.append(out if isinstance(out, torch.Tensor) else out[0]))
    try:
        torch.manual_seed(0)
        ids = module.generate(**model.tokenizer(PROMPT, return_tensors="pt"), pad_token_id=0, **options)
    finally:
        handle.remove()
    return ids, seen


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 4, "num_return_sequences": 2},
    ],
    ids=["greedy", "sampling", "beams", "sequences", "beams and sequences"],
)
def test_every_step_reads_what_a_plain_hook_sees(gpt2, options):
    ids, seen = plain(gpt2, max_new_tokens=5, **options)
    torch.manual_seed(0)
    read = []
    with gpt2.generate(PROMPT, max_new_tokens=5, **options) as tracer:
        for step in tracer.iter[:]:
            assert step == len(read)
            read.append(gpt2.transformer.h[1].hidden.clone())
    assert torch.equal(tracer.result, ids)
    assert len(read) == len(seen)
    assert all(map(torch.equal, read, seen))


def test_an_edit_at_every_step_is_what_a_hook_would_make(gpt2):
    handle = gpt2.dispatch()._module.transformer.h[1].mlp.register_forward_hook(lambda m, args, out: out * 0)
    want, _ = plain(gpt2, max_new_tokens=5, do_sample=False)
    handle.remove()
    with gpt2.generate(PROMPT, max_new_tokens=5, do_sample=False) as tracer:
        for _ in tracer.all():
            gpt2.transformer.h[1].mlp.output *= 0
    assert torch.equal(tracer.result, want)


def test_an_encoder_decoder_model_runs_its_encoder_in_step_0_only(folder):
    model = LanguageModel(folder("t5"))
    for _ in range(2):
        with model.generate(PROMPT, max_new_tokens=3) as tracer:
            encoded = model.encoder.output.last_hidden_state
            steps = [model.lm_head.output.shape for _ in tracer.iter[:]]
        assert encoded.shape[1] == len(model.tokenizer(PROMPT)["input_ids"])
        assert len(steps) == tracer.result.shape[1] - 1
        with pytest.raises(nnsight_eager.NotReachedError), model.generate(PROMPT, max_new_tokens=3) as tracer:
            for _ in tracer.iter[1:]:
                model.encoder.output


def test_code_after_the_loop_runs_when_generation_stops_early(gpt2):
    ids, _ = plain(gpt2, max_new_tokens=8, do_sample=False)
    length = len(gpt2.tokenizer(PROMPT)["input_ids"])
    end = ids[0, length + 2].item()
    first = ids[0, length:].tolist().index(end) + 1
    with gpt2.generate(PROMPT, max_new_tokens=8, do_sample=False, eos_token_id=end) as tracer:
        steps = list(tracer.iter[0:100])
        after = gpt2.generator.output
    assert steps == list(range(first))
    assert torch.equal(after, ids[:, : length + first])
    assert after is tracer.result


def test_chosen_steps_are_the_ones_visited(gpt2):
    with gpt2.generate(PROMPT, max_new_tokens=6, do_sample=False) as tracer:
        assert [*tracer.iter[1:6:2]] == [1, 3, 5]
    with gpt2.generate(PROMPT, max_new_tokens=6, do_sample=False) as tracer:
        assert [*tracer.iter[[0, 4]]] == [0, 4]
    with gpt2.generate(PROMPT, max_new_tokens=6, do_sample=False) as tracer:
        assert [*tracer.iter[2]] == [2]
        with pytest.warns(UserWarning, match="^Step 10 never came"):
            assert [*tracer.iter[10:]] == []


def test_next_on_tracer_and_module_mean_the_same_one_step(gpt2):
    _, seen = plain(gpt2, max_new_tokens=3, do_sample=False)
    layer = gpt2.transformer.h[1]
    with gpt2.generate(PROMPT, max_new_tokens=3, do_sample=False) as tracer:
        first = layer.hidden
        tracer.next()
        second = layer.next().hidden
        tracer.next()
        third = layer.next().hidden
    assert all(map(torch.equal, [first, second, third], seen))


def test_next_on_a_module_alone_moves_from_step_to_step(gpt2):
    _, seen = plain(gpt2, max_new_tokens=3, do_sample=False)
    layer = gpt2.transformer.h[1]
    with gpt2.generate(PROMPT, max_new_tokens=3, do_sample=False):
        read = [layer.hidden, layer.next().hidden, layer.next().hidden]
        with pytest.raises(nnsight_eager.NotReachedError):
            layer.next().output
    assert all(map(torch.equal, read, seen))


def test_a_passed_point_is_an_error_and_never_the_next_steps_value(gpt2):
    for _ in range(2):
        with pytest.raises(nnsight_eager.OutOfOrderError) as caught, gpt2.generate(PROMPT, max_new_tokens=4) as tracer:
            for step in tracer.iter[:]:
                gpt2.transformer.h[2].output
                if step == 1:
                    gpt2.transformer.h[0].output
        assert caught.value.asked == "model.transformer.h[0].output"
        assert caught.value.paused_at == "model.transformer.h[2].output"
        assert caught.value.step == 1


def test_generate_without_a_block_simply_generates(gpt2):
    ids, _ = plain(gpt2, max_new_tokens=4, do_sample=False)
    assert torch.equal(gpt2.generate(PROMPT, max_new_tokens=4, do_sample=False).result, ids)


def test_stop_leaves_a_generation_early_and_the_model_as_it_was(gpt2):
    before = {name: list(each.__dict__) for name, each in gpt2.dispatch()._module.named_modules()}
    with gpt2.generate(PROMPT, max_new_tokens=50) as tracer:
        for step in tracer.iter[:]:
            if step == 2:
                tracer.stop()
    assert step == 2
    assert {name: list(each.__dict__) for name, each in gpt2._module.named_modules()} == before
    with pytest.raises(nnsight_eager.RunEndedError):
        tracer.result


def test_the_body_keeps_its_own_grad_mode_while_generate_runs_without(gpt2):
    with gpt2.generate(PROMPT, max_new_tokens=2):
        hidden = gpt2.transformer.h[0].hidden
        assert torch.is_grad_enabled()
    assert not hidden.requires_grad


def test_a_model_that_does_not_generate_says_so(folder):
    with pytest.raises(nnsight_eager.InputError, match="does not generate"):
        LanguageModel(folder("bert")).generate(PROMPT)


def test_a_callback_of_generate_may_trace_the_same_model(gpt2):
    from transformers import LogitsProcessor, LogitsProcessorList

    lenses = []

    class Lens(LogitsProcessor):
        def __call__(self, ids, scores):
            with gpt2.trace(ids):
                lenses.append(gpt2.transformer.h[1].hidden[:, -1])
            return scores

    with gpt2.generate(PROMPT, max_new_tokens=3, do_sample=False, logits_processor=LogitsProcessorList([Lens()])) as tracer:
        read = [gpt2.transformer.h[1].hidden[:, -1] for _ in tracer.iter[:]]
    assert len(lenses) == len(read) == 3
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(lenses, read, strict=True))


def test_a_callback_that_asks_for_the_run_it_is_part_of_is_told_so(gpt2):
    from transformers import StoppingCriteriaList

    def criterion(ids, scores, **_):
        gpt2.transformer.h[0].output

    with (
        pytest.raises(nnsight_eager.InsideForwardError),
        gpt2.generate(PROMPT, max_new_tokens=2, stopping_criteria=StoppingCriteriaList([criterion])),
    ):
        pass
