"""Loading, device maps, and traces of real architectures."""

import copy
import inspect

import pytest
import torch
import transformers
from small_models import hooked

import nnsight_eager
from nnsight_eager import LanguageModel
from nnsight_eager.nested import first_tensor, with_first_tensor

PROMPT = "The Eiffel Tower is in the city of"


def own_keys(module):
    return {name: list(each.__dict__) for name, each in module.named_modules()}


def test_a_folder_gives_the_tree_at_once_and_the_weights_at_the_first_run(folder):
    model = LanguageModel(folder("gpt2"))
    layer = model.transformer.h[1]
    assert layer.mlp.c_fc.weight.is_meta
    with model.trace(PROMPT):
        hidden = layer.hidden
    assert not hidden.is_meta
    assert layer is model.transformer.h[1]
    assert not layer.mlp.c_fc.weight.is_meta


def test_dispatch_loads_the_weights_at_once(folder):
    assert not LanguageModel(folder("gpt2"), dispatch=True).transformer.wte.weight.is_meta


def test_options_reach_the_loader(folder):
    model = LanguageModel(folder("llama"), dtype=torch.bfloat16, attn_implementation="eager", dispatch=True)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_a_module_is_used_as_it_is(gpt2):
    module = gpt2.dispatch()._module
    assert LanguageModel(module, tokenizer=gpt2.tokenizer)._module is module


def test_an_unknown_name_is_a_sentence():
    with pytest.raises(nnsight_eager.LoadError) as caught:
        LanguageModel("no/such-model")
    happened, instead = str(caught.value).splitlines()
    assert happened.startswith("`no/such-model` cannot be loaded: ")
    assert instead == "Give the folder of a saved model, or a model's name on the hub and a connection to it."


def test_a_folder_without_a_tokenizer_matters_only_for_text(folder, tmp_path):
    LanguageModel(folder("gpt2")).dispatch()._module.save_pretrained(tmp_path)
    model = LanguageModel(tmp_path)
    assert model.tokenizer is None
    assert model.trace([1, 2, 3]).result.logits.shape[:2] == (1, 3)
    with pytest.raises(nnsight_eager.TokenizerMissingError):
        model.trace(PROMPT)


SPLIT = dict.fromkeys(["transformer.wte", "transformer.wpe", "transformer.drop", "transformer.ln_f", "lm_head"], "cpu")


@pytest.mark.parametrize(
    "device_map",
    ["auto", {"": "cpu"}, {**SPLIT, "transformer.h.0": "cpu", "transformer.h.1": "disk", "transformer.h.2": "disk"}],
    ids=["auto", "cpu", "disk"],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning:accelerate")
def test_device_maps_and_offloaded_modules_read_and_edit_as_usual(folder, tmp_path, gpt2, device_map):
    plain = gpt2.dispatch()._module
    encoded = gpt2.tokenizer(PROMPT, return_tensors="pt")
    model = LanguageModel(folder("gpt2"), device_map=device_map, offload_folder=tmp_path).dispatch()
    before = own_keys(model._module)
    seen = []
    handle = plain.transformer.h[2].mlp.c_fc.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    zero = plain.transformer.h[1].register_forward_hook(lambda m, args, out: with_first_tensor(out, first_tensor(out) * 0))
    try:
        want = plain(**encoded).logits
    finally:
        handle.remove()
        zero.remove()
    for _ in range(2):
        with model.trace(PROMPT):
            model.transformer.h[1].hidden = torch.zeros_like(model.transformer.h[1].hidden)
            entered = model.transformer.h[2].mlp.c_fc.input
            logits = model.lm_head.output
        assert torch.allclose(logits, want, atol=1e-6)
        assert torch.allclose(entered, seen[0], atol=1e-6)
    assert own_keys(model._module) == before


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
def test_every_module_that_runs_reads_as_a_plain_hook_reads_it(folder, kind):
    model = LanguageModel(folder(kind)).dispatch()
    module = model._module
    paths = [name for name, each in module.named_modules() if name]
    seen, handles = {}, []
    for path in paths:

        def note(m, args, out, path=path):
            seen.setdefault(path, out)

        handles.append(module.get_submodule(path).register_forward_hook(note))
    model.trace(PROMPT).result
    for handle in handles:
        handle.remove()
    for path in seen:
        with model.trace(PROMPT):
            value = model[path].output
        assert same(value, seen[path]), path


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.allclose(one, other, atol=1e-6)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other)


def test_recorded_hidden_states_show_an_edit_in_the_first_trace_and_the_second_alike(folder):
    model = LanguageModel(folder("gpt2"))
    for _ in range(2):
        with model.trace(PROMPT, output_hidden_states=True) as tracer:
            model.transformer.h[0].hidden = torch.zeros_like(model.transformer.h[0].hidden)
        assert tracer.result.hidden_states[1].abs().max() == 0


def test_generate_sees_the_forwards_own_signature_while_it_is_tapped(gpt2):
    types = torch.zeros(1, 3, dtype=torch.long)
    with gpt2.generate([1, 2, 3], max_new_tokens=2, token_type_ids=types):
        hidden = gpt2.transformer.h[0].hidden
        assert "token_type_ids" in inspect.signature(gpt2._module.forward).parameters
    assert hidden.shape == (1, 3, 32)


def test_a_copy_made_inside_a_trace_runs_its_own_weights(gpt2):
    gpt2.trace(PROMPT).result
    with gpt2.trace(PROMPT):
        gpt2.transformer.h[0].output
        twin = copy.deepcopy(gpt2._module)
    for parameter in twin.parameters():
        parameter.data.zero_()
    encoded = gpt2.tokenizer(PROMPT, return_tensors="pt")
    assert twin(**encoded).logits.abs().max() == 0
    assert own_keys(twin) == own_keys(gpt2._module)


def test_an_ad_hoc_module_call_does_not_touch_the_run(gpt2):
    with gpt2.trace(PROMPT):
        early = gpt2.transformer.h[0].hidden
        guess = gpt2.lm_head(gpt2.transformer.ln_f(early))
        late = gpt2.transformer.h[2].hidden
        logits = gpt2.lm_head.output
    module = gpt2._module
    assert torch.equal(guess, module.lm_head(module.transformer.ln_f(early)))
    assert torch.allclose(logits, module.lm_head(module.transformer.ln_f(late)), atol=1e-6)


def test_two_traces_side_by_side_patch_one_into_the_other(gpt2):
    other = "The Colosseum is in the city of Rome"
    with gpt2.trace(PROMPT):
        clean = gpt2.transformer.h[1].hidden[:, -1].clone()
    with gpt2.trace(other):
        gpt2.transformer.h[1].hidden[:, -1] = clean
        want = gpt2.lm_head.output
    with gpt2.trace(PROMPT) as one, gpt2.trace(other) as two:
        two.model.transformer.h[1].hidden[:, -1] = one.model.transformer.h[1].hidden[:, -1]
        patched = two.model.lm_head.output
    assert torch.equal(patched, want)


def test_gradients_flow_through_a_trace(gpt2):
    with gpt2.trace(PROMPT):
        hidden = gpt2.transformer.h[1].hidden
        hidden.retain_grad()
        loss = gpt2.lm_head.output[0, -1].logsumexp(-1)
    loss.backward()
    kept = []

    def keep(layer, args, out):
        kept.append(first_tensor(out))
        kept[0].retain_grad()

    handle = gpt2._module.transformer.h[1].register_forward_hook(keep)
    gpt2._module(**gpt2.tokenizer(PROMPT, return_tensors="pt")).logits[0, -1].logsumexp(-1).backward()
    handle.remove()
    assert torch.allclose(hidden.grad, kept[0].grad, atol=1e-7)


@pytest.mark.parametrize(
    ("named", "layer"),
    [("AutoModelForSequenceClassification", "bert.encoder.layer.1"), ("BertForTokenClassification", "bert.encoder.layer.1"),
     ("AutoModel", "encoder.layer.1")],
)  # fmt: skip
@pytest.mark.parametrize("by_name", [False, True])
def test_any_model_class_can_be_named(folder, named, layer, by_name):
    found = getattr(transformers, named)
    model = LanguageModel(folder("bert"), automodel=named if by_name else found)
    assert model[layer].attention.self.query.weight.is_meta
    with model.trace(PROMPT) as tracer:
        hidden = model[layer].hidden
        model[layer].hidden = hidden * 0
    encoded = model.tokenizer(PROMPT, return_tensors="pt")
    module = found.from_pretrained(folder("bert"))
    ((expected,),) = hooked(module, lambda: module(**encoded), layer)
    assert type(model._module) is type(module)
    assert torch.equal(hidden, first_tensor(expected))
    assert type(tracer.result) is type(module(**encoded))


def test_a_class_that_is_none_or_is_for_other_models_is_a_sentence(folder):
    with pytest.raises(nnsight_eager.LoadError) as caught:
        LanguageModel(folder("bert"), automodel="AutoModelForEverything")
    assert str(caught.value).startswith("`automodel='AutoModelForEverything'` is no model class of transformers ")
    for named in ("AutoModelForSeq2SeqLM", "GPT2LMHeadModel"):
        with pytest.raises(nnsight_eager.LoadError, match="is a `bert` model, and the class is for others: "):
            LanguageModel(folder("bert"), automodel=named)


def test_a_model_runs_on_what_its_class_takes():
    """Sounds and images are no tokens: a tensor is what the model's main keyword takes, and invokes are joined unpadded."""
    torch.manual_seed(0)
    sizes = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    lengths = {"max_source_positions": 8, "num_mel_bins": 4, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 20}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = transformers.WhisperConfig(**sizes, **lengths, **special, suppress_tokens=None, begin_suppress_tokens=None)
    model = LanguageModel(transformers.WhisperForConditionalGeneration(config).eval())
    one, other = torch.randn(2, 1, 4, 16)
    start = torch.tensor([[3]])
    expected = model._module(input_features=one, decoder_input_ids=start).logits
    for given in (model.trace(one), model.trace(input_features=one)):
        with given:
            logits = model.proj_out.output
        assert torch.equal(logits, expected)
    with model.trace() as tracer:
        with tracer.invoke(input_features=other):
            pass
        with tracer.invoke(input_features=one):
            logits = model.proj_out.output
    assert torch.allclose(logits, expected, atol=1e-6)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(one, **options).result, model._module.generate(input_features=one, **options))


def test_what_a_generation_returns_can_be_replaced_and_says_what_it_is(gpt2):
    with gpt2.generate("The Eiffel Tower", max_new_tokens=2, do_sample=False) as tracer:
        ids = gpt2.generator.output
        gpt2.generator.output = ids + 1
    assert tracer.result.equal(ids + 1)
    assert repr(gpt2.generator) == "model.generator: its `output` is what `model.generate(...)` returns"


def test_another_method_is_traced_with_what_it_is_given(gpt2):
    def forward_twice(input_ids):
        return gpt2._module(gpt2._module(input_ids).logits.argmax(-1)).logits

    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), gpt2.trace(ids, fn=forward_twice) as tracer:
        first = gpt2.transformer.h[0].hidden
        second = gpt2.transformer.h[0].next().hidden
    with torch.no_grad():
        expected = gpt2._module(gpt2._module(ids).logits.argmax(-1)).logits
    assert tracer.result.equal(expected)
    assert not first.equal(second)


def test_remote_code_is_trusted_only_where_that_is_said(folder):
    assert "trust_remote_code" not in LanguageModel(folder("gpt2"))._source.options
    assert LanguageModel(folder("gpt2"), trust_remote_code=True)._source.options["trust_remote_code"] is True


def test_weights_that_are_not_there_are_a_sentence(folder, tmp_path):
    import shutil

    shutil.copytree(folder("gpt2"), tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    model = LanguageModel(tmp_path / "bare")
    with pytest.raises(nnsight_eager.LoadError) as caught:
        model.dispatch()
    assert f"`{tmp_path / 'bare'}` cannot be loaded" in str(caught.value)


def test_an_architecture_that_no_automatic_class_has_is_loaded_as_what_it_is():
    import transformers

    from nnsight_eager.loading import automodel_for

    config = transformers.GPT2Config(architectures=["GPT2DoubleHeadsModel"], **SIZE)
    assert type(automodel_for(config).from_config(config)) is transformers.GPT2DoubleHeadsModel
    assert automodel_for(transformers.GPT2Config(architectures=["Unknown"])) is transformers.AutoModelForCausalLM


SIZE = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 10}
