"""What nnsight's documentation promises of several passes, prompts and steps, against hooks and plain generation."""

import pytest
import torch
import transformers
from small_models import X4, Stack, hooked

import nnsight_eager as nnsight
from nnsight_eager import NNsight, StepError

TEXT = "The Eiffel Tower is in the city of"
OTHER = "Mary and John went to the store"


@pytest.fixture
def model():
    return NNsight(Stack())


def outputs(*names):
    """What plain hooks see of a fresh stack, one value for each name."""
    stack = Stack()
    return [visits[0] for visits in hooked(stack, lambda: stack(X4), *names)]


def without_block_0():
    """What a fresh stack gives when its first block gives zeros."""
    stack = Stack()
    return stack.head(stack.h[2](stack.h[1](X4 * 0)))


def ids(gpt2, text):
    return torch.tensor([gpt2.tokenizer(text)["input_ids"]])


def plain(gpt2, text, *names, **options):
    """What plain hooks see of a generation, and its ids."""
    module = gpt2.dispatch()._module
    given = ids(gpt2, text)
    generated = []

    def call():
        mask = torch.ones_like(given)
        generated.append(module.generate(given, attention_mask=mask, do_sample=False, pad_token_id=0, **options))

    return *hooked(module, call, *names), generated[0]


# Edits


def test_an_edit_is_the_copys_and_the_model_stays_as_it_was(model):
    with model.edit() as edited:
        edited.h[0].output[:] = 0
    with model.trace(X4):
        own = model.output.save()
    with edited.trace(X4):
        changed = edited.output.save()
    assert torch.equal(own, Stack()(X4))
    assert torch.equal(changed, without_block_0())
    assert edited.head._module is model.head._module


def test_edits_in_place_stack_in_the_order_they_were_made_and_are_cleared_together(model):
    with model.edit(inplace=True):
        model.h[0].output = model.h[0].output * 2
    with model.edit(inplace=True):
        model.h[0].output = model.h[0].output + 1
    with model.trace(X4):
        edited = model.h[0].output.save()
    model.clear_edits()
    with model.trace(X4):
        cleared = model.h[0].output.save()
    (own,) = outputs("h.0")
    assert torch.equal(edited, own * 2 + 1)
    assert torch.equal(cleared, own)


def test_an_edit_may_skip_a_module(model):
    with model.edit(inplace=True):
        model.h[1].skip(model.h[1].input)
    with model.trace(X4) as tracer:
        before, after = model.h[0].output.save(), model.h[1].output.save()
    stack = Stack()
    assert torch.equal(before, after)
    assert torch.equal(tracer.result, stack.head(stack.h[2](stack.h[0](X4))))


def test_an_edit_needs_no_loop_to_be_in_every_step(gpt2):
    with gpt2.edit(inplace=True):
        gpt2.transformer.h[1].mlp.output *= 0
    with gpt2.generate(TEXT, max_new_tokens=3, do_sample=False) as tracer:
        norms = [gpt2.transformer.h[1].mlp.output.norm() for _ in tracer.iter[:]]
    assert [float(norm) for norm in norms] == [0, 0, 0]


# Caches


def test_a_cache_is_read_by_path_and_by_navigation_with_the_models_name_or_without(gpt2):
    with gpt2.trace(TEXT) as tracer:
        cache = tracer.cache()
        hidden, logits = gpt2.transformer.h[2].hidden.save(), gpt2.output.logits.save()
    for found in (
        cache["model.transformer.h.2"],
        cache["transformer.h.2"],
        cache.model.transformer.h[2],
        cache.transformer.h[-1],
        cache["model"].transformer["h"]["2"],
    ):
        assert torch.equal(found.hidden, hidden)
    for found in (cache["model"], cache.model):
        assert torch.equal(found.output.logits, logits)
    assert "model.transformer.h.2" in cache
    assert "transformer.h.2" in cache
    assert "model.transformer.h.3" not in cache


def test_the_models_own_child_called_model_comes_before_the_model_itself(folder):
    model = nnsight.LanguageModel(folder("llama"))
    with model.trace(TEXT) as tracer:
        cache = tracer.cache()
        hidden, logits = model.model.layers[1].hidden.save(), model.lm_head.output.save()
    for found in (cache["model.layers.1"], cache["model.model.layers.1"], cache.model.layers[1], cache.model.model.layers[1]):
        assert torch.equal(found.hidden, hidden)
    for found in (cache["model.lm_head"], cache.lm_head, cache.model.lm_head):
        assert torch.equal(found.output, logits)


def test_a_cache_keeps_chosen_modules_as_they_are_after_edits(model):
    with model.trace(X4) as tracer:
        cache = tracer.cache(modules=[model.h[0], "model.h.2", "head"])
        model.h[0].output[:] = 0
    assert list(cache.keys()) == ["h.0", "h.2", "head"]
    assert torch.equal(cache["model.h.0"].output, X4 * 0)
    assert torch.equal(cache["head"].output, without_block_0())


def test_a_cache_keeps_inputs_instead_of_outputs_or_beside_them(model):
    with model.trace(X4) as tracer:
        both = tracer.cache(include_inputs=True)
        inputs = tracer.cache(modules=[model.h[1]], include_output=False, include_inputs=True)
    first, second = outputs("h.0", "h.1")
    assert torch.equal(both["model.h.1"].input, first)
    assert torch.equal(both["model.h.1"].inputs[0][0], first)
    assert both["model.h.1"].inputs[1] == {}
    assert torch.equal(both["model.h.1"].output, second)
    assert torch.equal(inputs["h.1"].input, first)
    assert inputs["h.1"].output is None


def test_a_cache_converts_detaches_and_moves(model):
    with model.trace(X4) as tracer:
        usual = tracer.cache(modules=[model.h[0]])
        cache = tracer.cache(modules=[model.h[0]], device=None, dtype=torch.float64, detach=False)
        away = tracer.cache(modules=[model.h[0]], device=torch.device("meta"))
    (own,) = outputs("h.0")
    assert not usual["h.0"].output.requires_grad
    assert cache["h.0"].output.requires_grad
    assert torch.equal(cache["h.0"].output, own.double())
    assert away["h.0"].output.device.type == "meta"


def test_a_cache_of_a_generation_has_one_entry_for_each_step(gpt2):
    with gpt2.generate(TEXT, max_new_tokens=3, do_sample=False) as tracer:
        cache = tracer.cache(modules=[gpt2.lm_head, "model.transformer.h.2.mlp"], include_inputs=True)
    seen, _ = plain(gpt2, TEXT, "transformer.h.2.mlp", max_new_tokens=3)
    entries = cache["model.transformer.h.2.mlp"]
    assert len(entries) == len(cache["model.lm_head"]) == 3
    assert all(map(torch.equal, [entry.output for entry in entries.visits], seen))
    assert [entry.input.shape[1] for entry in entries.visits] == [len(seen[0][0]), 1, 1]


def test_the_cache_of_an_invoke_has_its_rows(gpt2):
    with gpt2.trace() as tracer:
        with tracer.invoke(TEXT):
            own = tracer.cache(modules=[gpt2.lm_head])
        with tracer.invoke([OTHER, TEXT]):
            others = tracer.cache(modules=[gpt2.lm_head])
        with tracer.invoke():
            logits = gpt2.lm_head.output.save()
    assert torch.equal(own["model.lm_head"].output, logits[:1])
    assert torch.equal(others["model.lm_head"].output, logits[1:])


# Scans and sessions


@pytest.mark.skipif(transformers.__version__ < "5", reason="attention masks of transformers 4 choose by values")
def test_a_scan_gives_shapes_without_weights_and_finds_a_wrong_index(folder):
    model = nnsight.LanguageModel(folder("gpt2"))
    with model.scan(TEXT):
        width = nnsight.save(model.transformer.h[0].hidden.shape[-1])
        last = model.lm_head.output[:, -1].save()
    assert (width, last.shape) == (32, (1, 320))
    with pytest.raises(IndexError), model.scan(TEXT):
        model.transformer.h[0].hidden[:, 1000] = 0
    assert all(weight.is_meta for weight in model.parameters())


def test_a_cache_in_a_scan_has_shapes(model):
    with model.scan(X4) as tracer:
        cache = tracer.cache()
    assert {path: cache[path].output.shape for path in ("h.0", "head")} == {"h.0": (1, 4), "head": (1, 4)}


@pytest.mark.skipif(transformers.__version__ < "5", reason="attention masks of transformers 4 choose by values")
def test_a_cache_in_a_scan_tells_the_size_before_anything_runs(folder):
    model, options = nnsight.LanguageModel(folder("gpt2")), {"modules": ["transformer.h.*"], "positions": [-1, -2]}
    with model.scan("The Eiffel Tower") as tracer:
        estimate = tracer.cache(**options, dtype=torch.float16)
    assert all(weight.is_meta for weight in model.parameters())
    assert estimate.nbytes == 3 * 2 * 32 * 2 == model.cache("The Eiffel Tower", **options, dtype=torch.float16).nbytes


def test_values_of_a_session_pass_from_trace_to_trace(model):
    with model.session():
        results = [].save()
        for factor in (0, 1, 2):
            with model.trace(X4 * factor):
                results.append(model.output)
        with model.trace(X4 * 5):
            model.h[0].output = X4 * 0 + results[2] * 0
            patched = model.output.save()
    for factor, result in enumerate(results):
        assert torch.equal(result, Stack()(X4 * factor))
    assert torch.equal(patched, without_block_0())


# Invokes


def test_each_invoke_sees_its_rows_and_one_without_input_all(gpt2):
    with gpt2.trace() as tracer:
        with tracer.invoke(TEXT):
            one = gpt2.lm_head.output[:, -1].save()
        with tracer.invoke([OTHER, "Rome"]):
            two = gpt2.lm_head.output[:, -1].save()
        with tracer.invoke():
            every = gpt2.lm_head.output[:, -1].save()
        with tracer.invoke():  # each invoke begins at the beginning
            first = gpt2.transformer.h[0].hidden.save()
    assert torch.equal(every, torch.cat([one, two]))
    assert len(first) == 3
    for logits, text in zip(every, [TEXT, OTHER, "Rome"], strict=True):
        torch.testing.assert_close(logits, gpt2._module(ids(gpt2, text)).logits[0, -1])


def test_any_modules_inputs_are_batched(model):
    with model.trace() as tracer:
        with tracer.invoke(X4):
            model.h[0].output[:] = 0
            one = model.output.save()
        with tracer.invoke(X4):
            other = model.output.save()
    torch.testing.assert_close(one, without_block_0())
    torch.testing.assert_close(other, Stack()(X4))


@pytest.mark.parametrize("barrier", [True, False])
def test_a_value_of_another_prompt_with_a_barrier_or_without(gpt2, barrier):
    with gpt2.trace() as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke(TEXT):
            clean = gpt2.transformer.h[1].hidden[:, -1]
            if barrier:
                meet()
        with tracer.invoke(OTHER):
            if barrier:
                meet()
            gpt2.transformer.h[1].hidden[:, -1] = clean
            patched = gpt2.lm_head.output[0, -1].save()

    def patch(_, args, output):
        (output if isinstance(output, torch.Tensor) else output[0])[:, -1] = clean

    (hidden,) = hooked(gpt2._module, lambda: gpt2._module(ids(gpt2, TEXT)), "transformer.h.1")
    torch.testing.assert_close(clean, (hidden[0] if isinstance(hidden[0], torch.Tensor) else hidden[0][0])[:, -1])
    handle = gpt2._module.transformer.h[1].register_forward_hook(patch)
    torch.testing.assert_close(patched, gpt2._module(ids(gpt2, OTHER)).logits[0, -1])
    handle.remove()


def test_a_barrier_is_used_again(gpt2):
    with gpt2.trace() as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke(TEXT):
            early = gpt2.transformer.h[0].hidden
            meet()
            late = gpt2.transformer.h[2].hidden
            meet()
        with tracer.invoke(TEXT):
            meet()
            first = early
            meet()
            second = late
    assert first is early
    assert second is late


def test_stop_in_an_invoke_ends_its_block_and_the_others_run_on(gpt2):
    with gpt2.trace() as tracer:
        with tracer.invoke(TEXT):
            hidden = gpt2.transformer.h[0].hidden.save()
            tracer.stop()
            hidden = None
        with tracer.invoke(OTHER):
            logits = gpt2.lm_head.output[0, -1].save()
    assert hidden is not None
    torch.testing.assert_close(logits, gpt2._module(ids(gpt2, OTHER)).logits[0, -1])


# Generations


def test_the_ids_are_the_result_and_the_generators_output(gpt2):
    with gpt2.generate(TEXT, max_new_tokens=3, do_sample=False) as tracer:
        ids = gpt2.generator.output.save()
    (expected,) = plain(gpt2, TEXT, max_new_tokens=3)
    assert torch.equal(ids, expected)
    assert torch.equal(tracer.result, expected)


@pytest.mark.parametrize(
    ("selection", "steps"), [(slice(None), [0, 1, 2, 3]), (slice(1, 3), [1, 2]), ([0, 2], [0, 2]), (2, [2])], ids=str
)
def test_a_loop_over_steps_reads_the_chosen_ones(gpt2, selection, steps):
    read = {}
    with gpt2.generate(TEXT, max_new_tokens=4, do_sample=False) as tracer:
        for step in tracer.iter[selection]:
            read[step] = gpt2.lm_head.output[0, -1].argmax()
    (expected,) = plain(gpt2, TEXT, max_new_tokens=4)
    new = expected[0, -4:].tolist()
    assert {step: int(token) for step, token in read.items()} == {step: new[step] for step in steps}


def test_a_step_counted_from_the_end_is_refused(gpt2):
    with pytest.raises(StepError), gpt2.generate(TEXT, max_new_tokens=2) as tracer:
        for _ in tracer.iter[-1]:
            pass


def test_all_is_every_step_and_what_is_written_behind_the_loop_runs(gpt2):
    tokens, ended = [].save(), False
    with gpt2.generate(TEXT, max_new_tokens=3, do_sample=False) as tracer:
        for step in tracer.all():
            if step == 1:
                gpt2.transformer.h[0].mlp.output[:] = 0
            tokens.append(gpt2.lm_head.output[0, -1].argmax())
        ended = True
    assert ended
    assert torch.equal(torch.stack(tokens), tracer.result[0, -3:])


@pytest.mark.parametrize("written", ["tracer", "module"])
def test_next_is_the_next_step(gpt2, written):
    layer = gpt2.transformer.h[1].mlp
    with gpt2.generate(TEXT, max_new_tokens=3, do_sample=False) as tracer:
        read = [layer.output.save()]
        for _ in range(2):
            if written == "tracer":
                tracer.next()
                read.append(layer.output.save())
            else:
                read.append(layer.next().output.save())
    seen, _ = plain(gpt2, TEXT, "transformer.h.1.mlp", max_new_tokens=3)
    assert all(map(torch.equal, read, seen))


def test_an_operation_is_met_in_every_step(gpt2):
    read = []
    with gpt2.generate(TEXT, max_new_tokens=3, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            read.append(gpt2.transformer.h[0].mlp.source.self_c_proj_0.output)
    seen, _ = plain(gpt2, TEXT, "transformer.h.0.mlp.c_proj", max_new_tokens=3)
    assert len(read) == 3
    assert all(map(torch.equal, read, seen))


def test_stop_ends_a_generation(gpt2):
    ran = []
    gpt2.dispatch().lm_head._module.register_forward_hook(lambda *_: ran.append("step"))
    with gpt2.generate(TEXT, max_new_tokens=5) as tracer:
        for step in tracer.iter[:]:
            _ = gpt2.lm_head.output
            if step == 1:
                tracer.stop()
    assert ran == ["step", "step"]
