"""The README's table of TransformerLens's names: each point is what that name is defined to be, by the arithmetic around it."""

import pytest
import torch

from nnsight_eager import LanguageModel

TEXT = "The Eiffel Tower is in the city of"
HEADS, WIDTH = 4, 32


@pytest.fixture
def model(folder):
    return LanguageModel(folder("gpt2"), dtype=torch.float64, dispatch=True)


@pytest.fixture
def block(model):
    return model.transformer.h[1]


def assert_same(one, other):
    torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_the_residual_stream_is_the_sum_of_what_is_written_to_it(model, block):
    with model.trace(TEXT):
        embedded = model.transformer.wte.output + model.transformer.wpe.output  # hook_embed + hook_pos_embed
        first = model.transformer.h[0].input  # blocks.0.hook_resid_pre
        before = block.input.clone()  # hook_resid_pre
        attention = block.attn.hidden  # hook_attn_out
        middle = block.ln_2.input  # hook_resid_mid
        written = block.mlp.output  # hook_mlp_out
        after = block.hidden  # hook_resid_post
    assert_same(first, embedded)
    assert_same(middle, before + attention)
    assert_same(after, middle + written)


def test_a_head_is_its_pattern_times_its_values_through_its_part_of_the_output_matrix(model, block):
    with model.trace(TEXT):
        _, query, key, value, *_ = block.attn.source.attention_interface_1.inputs[0]  # hook_q, hook_k, hook_v
        pattern = block.attn.pattern  # hook_pattern
        mixed = block.attn.c_proj.input.unflatten(-1, (HEADS, -1))  # hook_z
        attention = block.attn.hidden
    scores = query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    assert_same(pattern, scores.masked_fill(~causal, float("-inf")).softmax(-1))
    assert_same(mixed, (pattern @ value).transpose(1, 2))
    weight = block.attn.c_proj.weight.unflatten(0, (HEADS, -1))  # W_O: [head, head_dim, hidden]
    assert_same(attention, torch.einsum("bshd,hdm->bsm", mixed, weight) + block.attn.c_proj.bias)


def test_neurons_are_read_before_and_after_their_activation(model, block):
    with model.trace(TEXT):
        before = block.mlp.c_fc.output  # mlp.hook_pre
        after = block.mlp.act.output  # mlp.hook_post
        written = block.mlp.output
    assert_same(after, torch.nn.functional.gelu(before, approximate="tanh"))
    assert_same(written, after @ block.mlp.c_proj.weight + block.mlp.c_proj.bias)


def test_logits_are_the_normalized_stream_times_the_unembedding(model):
    with model.trace(TEXT) as tracer:
        normalized = model.transformer.ln_f.output
    assert_same(tracer.result.logits, normalized @ model.lm_head.weight.T)  # W_U


def test_a_run_with_a_cache_stops_where_it_is_told_to(model):
    ran = []
    model.lm_head._module.register_forward_hook(lambda *_: ran.append("lm_head"))
    with model.trace(TEXT) as tracer:
        cache = tracer.cache(modules="transformer.h.*.mlp")
        model.transformer.h[2].input  # stop_at_layer=2
        tracer.stop()
    assert not ran
    assert list(cache.keys()) == ["transformer.h.0.mlp", "transformer.h.1.mlp"]


def test_a_hook_is_an_assignment_and_a_permanent_one_is_an_edit(model, block):
    def halved(value):
        return value / 2

    with model.trace(TEXT):
        block.mlp.output = halved(block.mlp.output)
        once = model.lm_head.output

    def edit():
        block.mlp.output = halved(block.mlp.output)

    model.edit(edit, inplace=True)
    assert_same(model.trace(TEXT).result.logits, once)
    model.clear_edits()
    handle = block.mlp._module.register_forward_hook(lambda module, args, value: halved(value))
    assert_same(model.trace(TEXT).result.logits, once)
    handle.remove()
    assert not torch.allclose(model.trace(TEXT).result.logits, once)
