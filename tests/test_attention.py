"""Attention patterns: the explicit way for one layer, although the model runs sdpa."""

import copy
import threading

import pytest
import torch
import transformers

from nnsight_eager import LanguageModel, NotReachedError, OutOfOrderError
from nnsight_eager.nested import tensors

COMMON = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = {
    "gpt2": ({"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, **SPECIAL}, "transformer.h.1.attn"),
    "llama": (GROUPED, "model.layers.1.self_attn"),
    "mistral": ({**GROUPED, "sliding_window": 4}, "model.layers.1.self_attn"),
    "gemma2": (
        {**GROUPED, "sliding_window": 4, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
        "model.layers.0.self_attn",
    ),
    "bert": (COMMON, "bert.encoder.layer.1.attention.self"),
    "t5": (
        {"vocab_size": 50, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64, "d_kv": 8, "decoder_start_token_id": 0},
        "encoder.block.1.layer.0.SelfAttention",
    ),
}
HEADS = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
IDS = torch.arange(3, 21).reshape(2, 9)
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0


def both(kind):
    """The same model computed with `eager` attention and, where it can be, with sdpa."""
    if kind == "t5" and transformers.__version__ < "5":
        pytest.skip("T5 has no sdpa before transformers 5")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind][0])
    automodel = getattr(transformers, HEADS.get(kind, "AutoModelForCausalLM"))
    explicit = automodel.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    fused = automodel.from_config(
        copy.deepcopy(config), attn_implementation="eager" if kind == "gemma2" else "sdpa"  # sdpa has no soft cap
    ).eval()  # fmt: skip
    fused.load_state_dict(explicit.state_dict())
    return LanguageModel(explicit), LanguageModel(fused), KINDS[kind][1]


@pytest.fixture
def llama():
    return both("llama")[1]


def inputs(kind, padded):
    if not padded:
        return {"input_ids": IDS}, torch.ones_like(IDS).bool()
    mask = MASK.flip(1) if kind in ("bert", "t5") else MASK
    return {"input_ids": IDS, "attention_mask": mask}, mask.bool()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pattern_is_what_eager_attention_computes_and_the_model_goes_on_as_before(kind, padded):
    explicit, fused, path = both(kind)
    given, real = inputs(kind, padded)
    if kind == "bert" and transformers.__version__ < "5":  # it goes through the interface from transformers 5 on
        with pytest.raises(NotReachedError, match="attention interface"), fused.trace(**given):
            fused[path].pattern
        return
    with torch.no_grad():
        with explicit.trace(**given):
            weights = [each for each in tensors(explicit[path].output) if each.shape == (2, 4, 9, 9)][-1]
        plain = fused.trace(**given).result.logits
        with fused.trace(**given) as tracer:
            pattern = fused[path].pattern
    assert torch.allclose(pattern * real[:, None, :, None], weights * real[:, None, :, None], atol=1e-5)
    kept = real if kind != "t5" else torch.ones(2, 1, dtype=torch.bool)
    assert torch.allclose(tracer.result.logits[kept], plain[kept], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pattern_that_is_replaced_is_replaced_as_in_eager_attention(kind, monkeypatch):
    explicit, fused, path = both(kind)
    if kind == "bert" and transformers.__version__ < "5":  # it goes through the interface from transformers 5 on
        pytest.skip("BERT has no pattern before transformers 5")
    new = torch.softmax(torch.randn(2, 4, 9, 9), -1)
    with torch.no_grad(), fused.trace(input_ids=IDS) as tracer:
        fused[path].pattern = new
    softmax, module = torch.nn.functional.softmax, explicit._module.get_submodule(path)

    def attend(*args, **kwargs):
        with monkeypatch.context() as patch:  # eager attention has one softmax, which gives the probabilities
            patch.setattr(torch.nn.functional, "softmax", lambda scores, *_, **__: new.to(scores))
            return type(module).forward(module, *args, **kwargs)

    with torch.no_grad():
        plain = explicit.trace(input_ids=IDS).result.logits
        monkeypatch.setattr(module, "forward", attend)
        expected = explicit.trace(input_ids=IDS).result.logits
    assert torch.nn.functional.softmax is softmax
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert torch.allclose(tracer.result.logits, expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "value"), [("llama", "v_proj"), ("gpt2", "c_attn")])
def test_the_model_goes_on_with_a_pattern_that_is_assigned(kind, value):
    _, model, path = both(kind)
    new = torch.softmax(torch.randn(2, 4, 9, 9), -1)
    with torch.no_grad(), model.trace(input_ids=IDS):
        layer = model[path]
        values = layer[value].output[..., -(16 if kind == "llama" else 32) :].reshape(2, 9, -1, 8).transpose(1, 2)
        assert layer.pattern.shape == new.shape
        layer.pattern = new
        mixed = layer["o_proj" if kind == "llama" else "c_proj"].input
    expected = (new @ values.repeat_interleave(4 // values.shape[1], 1)).transpose(1, 2).reshape(2, 9, 32)
    assert torch.allclose(mixed, expected, atol=1e-6)


def test_a_pattern_may_be_changed_in_place_and_has_gradients(llama):
    layer = llama.model.layers[0].self_attn
    with llama.trace(input_ids=IDS):
        pattern = layer.pattern
        pattern.retain_grad()
        loss = llama.output.logits.sum()
    loss.backward()
    assert pattern.grad.shape == (2, 4, 9, 9)
    assert pattern.grad.abs().sum() > 0
    with torch.no_grad(), llama.trace(input_ids=IDS):
        layer.pattern[:, 1] = 0
        assert not layer.o_proj.input[..., 8:16].any()
        assert layer.o_proj.input[..., :8].any()


def test_an_invoke_sees_and_changes_the_pattern_of_its_rows(llama):
    layer = llama.model.layers[1].self_attn

    def zero():
        layer.pattern = layer.pattern * 0

    with torch.no_grad(), llama.trace() as tracer:
        tracer.invoke(IDS[:1], zero)
        mine = tracer.invoke(IDS[1:], lambda: layer.pattern)
        mixed = tracer.invoke(lambda: layer.o_proj.input)
    with torch.no_grad(), llama.trace(input_ids=IDS[1:]):
        alone = layer.pattern
    assert torch.allclose(mine.result, alone, atol=1e-6)
    assert not mixed.result[0].any()
    assert mixed.result[1].any()


def test_every_step_of_a_generation_has_its_pattern(llama):
    with llama.generate(input_ids=IDS[:1], max_new_tokens=3, min_new_tokens=3) as tracer:
        shapes = [tuple(llama.model.layers[0].self_attn.pattern.shape) for _ in tracer.iter[:]]
    assert shapes == [(1, 4, 9, 9), (1, 4, 1, 10), (1, 4, 1, 11)]
    plain = llama.generate(input_ids=IDS[:1], max_new_tokens=3, min_new_tokens=3).result
    assert torch.equal(tracer.result, plain)


def test_the_next_visit_of_an_attention_has_its_own_pattern(llama):
    attention = llama.model.layers[0].self_attn
    with llama.generate(input_ids=IDS[:1], max_new_tokens=3, min_new_tokens=3) as tracer:
        first = attention.pattern
        further = attention.next()
        second = further.pattern
        further.pattern = second * 0
        assert not further.pattern.any()
        assert not attention.o_proj.input.any()
        assert further.output[0].shape == (1, 1, 32)
        third = attention.next()
        assert third.input.shape == (1, 1, 32)
        assert third.pattern.shape == (1, 4, 1, 11)
        with pytest.raises(
            OutOfOrderError, match=r"this `model\.model\.layers\[0\]\.self_attn\.next\(\)\.pattern` met is over"
        ):
            further.pattern
    assert (first.shape, second.shape) == ((1, 4, 9, 9), (1, 4, 1, 10))
    assert tracer.result.shape == (1, 12)


def configurations(model):
    return [module.__dict__.get("config") for module in model._module.modules()]


def test_afterwards_every_module_has_its_own_configuration(llama):
    before = configurations(llama)
    layers = llama.model.layers
    with llama.trace(input_ids=IDS), llama.trace(input_ids=IDS) as inner:
        inner.model.model.layers[0].self_attn.pattern
    with pytest.raises(ZeroDivisionError), llama.trace(input_ids=IDS):
        layers[0].self_attn.pattern
        raise ZeroDivisionError
    with llama.trace(input_ids=IDS) as outer, llama.trace(input_ids=IDS) as inner:
        inner.model.model.layers[0].self_attn.pattern
        seen = outer.model.model.layers[0].self_attn.pattern
    assert all(own is one for own, one in zip(configurations(llama), before, strict=True))
    with llama.trace(input_ids=IDS):
        assert torch.allclose(layers[0].self_attn.pattern, seen)


def test_threads_read_patterns_of_one_model(llama):
    found, before = [], configurations(llama)

    def read():
        for _ in range(5):
            with torch.no_grad(), llama.trace(input_ids=IDS):
                found.append(llama.model.layers[1].self_attn.pattern)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    assert all(torch.equal(each, found[0]) for each in found)
    assert all(own is one for own, one in zip(configurations(llama), before, strict=True))


def test_what_has_no_pattern_says_so(llama):
    with pytest.raises(NotReachedError) as caught, llama.trace(input_ids=IDS):
        llama.model.layers[0].pattern
    assert str(caught.value).splitlines()[0] == (
        "`model.model.layers[0].pattern` does not exist: `LlamaDecoderLayer` does not go through transformers' attention "
        "interface."
    )


def test_a_pattern_that_has_been_computed_is_out_of_order(llama):
    layer = llama.model.layers[0].self_attn
    for _ in range(2):
        with pytest.raises(OutOfOrderError) as caught, llama.trace(input_ids=IDS):
            layer.output
            layer.pattern
        assert str(caught.value).splitlines() == [
            "`model.model.layers[0].self_attn.pattern` has already run in this step (step 0); the model was paused at "
            "`model.model.layers[0].self_attn.output`.",
            "Read `model.model.layers[0].self_attn.pattern` above the line that reads "
            "`model.model.layers[0].self_attn.output`; for a later visit of it write "
            "`model.model.layers[0].self_attn.next().pattern`.",
        ]
    with llama.trace(input_ids=IDS):
        layer.pattern
        assert layer.output[0].shape == (2, 9, 32)
        assert llama.model.layers[0].hidden.shape == (2, 9, 32)


def test_a_pattern_is_reached_from_where_its_attention_is_about_to_be_called(llama):
    """The forward has looked its attention function up by then."""
    layer = llama.model.layers[0].self_attn
    with torch.no_grad(), llama.trace(input_ids=IDS):
        pattern = layer.pattern
        expected = llama.lm_head.output
    with torch.no_grad(), llama.trace(input_ids=IDS):
        called = [name for name in layer.source if name.startswith("attention_interface")][
            -1
        ]  # transformers 4 has more before it
        _, query, key, *_ = layer.source[called].inputs[0]
        assert torch.equal(layer.pattern, pattern)
        assert torch.allclose(llama.lm_head.output, expected, atol=1e-6)
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) / query.shape[-1] ** 0.5
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    assert torch.allclose(pattern, scores.masked_fill(~causal, float("-inf")).softmax(-1), atol=1e-6)


@pytest.mark.parametrize("further", [False, True])
def test_an_attribute_error_of_the_forward_reaches_who_reads_a_pattern(llama, further):
    def fail(*_):
        raise AttributeError("in the forward")

    attention = llama.model.layers[1].self_attn
    handle = llama._module.model.layers[0].mlp.register_forward_hook(fail)
    with pytest.raises(AttributeError, match="in the forward"), llama.trace(torch.tensor([[1, 2, 3]])):
        _ = (attention.next() if further else attention).pattern
    handle.remove()


def test_a_run_that_was_about_to_call_the_attention_goes_on_when_the_one_with_its_pattern_has_ended(llama):
    attention = llama.model.layers[1].self_attn
    plain = llama.trace(IDS).result.logits
    run = llama.trace(IDS.flip(1)).start()
    run.model.model.layers[1].self_attn.pattern
    with llama.trace(IDS) as tracer:
        attention.source.attention_interface_1.input
        run.finish()
    assert torch.allclose(tracer.result.logits, plain, atol=1e-5)
