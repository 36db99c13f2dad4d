"""Weights that are elsewhere, or are no plain tensors: accelerate's offloading, torchao, GGUF files."""

import importlib.util
import warnings

import pytest
import torch
from left_behind import everything

from nnsight_eager import LanguageModel, NNsight

PROMPT = "The Eiffel Tower is in the city of"


def with_zero_mlp(model, module, call):
    """What `call()` gives where the second layer's MLP gives zeros, by a plain hook; and what it would have given."""
    seen = []

    def zero(_, args, output):
        seen.append(output)
        return output * 0

    handle = module.register_forward_hook(zero)
    try:
        return call(), seen[0]
    finally:
        handle.remove()


OFFLOADED = {
    "disk": {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h.0": "cpu", "transformer.h.1": "disk",
             "transformer.h.2": "disk", "transformer.ln_f": "cpu", "lm_head": "cpu"},
    "cpu": {"": "cpu"},
}  # fmt: skip


@pytest.mark.parametrize("where", OFFLOADED)
def test_a_device_map_with_offloaded_layers(folder, tmp_path, where):
    plain = LanguageModel(folder("gpt2"), dispatch=True)
    model = LanguageModel(folder("gpt2"), device_map=OFFLOADED[where], offload_folder=str(tmp_path), dispatch=True)
    block = model.transformer.h[1]
    assert (block.mlp.c_fc.weight.device.type == "meta") == (where == "disk")
    want, mlp = with_zero_mlp(plain, plain._module.transformer.h[1].mlp, lambda: plain.trace(PROMPT).result.logits)
    before = everything(model)
    for _ in range(2):
        with model.trace(PROMPT) as tracer:
            inner = block.mlp.c_fc.output
            hidden = block.mlp.output
            block.mlp.output = hidden * 0
        assert torch.equal(hidden, mlp)
        assert torch.equal(tracer.result.logits, want)
        assert inner.shape[-1] == 4 * hidden.shape[-1]
    with model.generate(PROMPT, max_new_tokens=3) as tracer:
        for _ in tracer.iter[:]:
            block.mlp.output *= 0
    ids, _ = with_zero_mlp(plain, plain._module.transformer.h[1].mlp, lambda: plain.generate(PROMPT, max_new_tokens=3).result)
    assert torch.equal(tracer.result, ids)
    assert everything(model) == before


def test_accelerates_hooks_around_a_module_are_passed_through_and_stay():
    from accelerate import cpu_offload

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    x, weights = torch.randn(2, 4), {name: value.clone() for name, value in module.state_dict().items()}
    hidden = torch.nn.functional.linear(x, weights["0.weight"], weights["0.bias"])
    cpu_offload(module, execution_device=torch.device("cpu"))
    model = NNsight(module)
    before = everything(model)
    for _ in range(2):
        with model.trace(x) as tracer:
            seen = model[0].output
            model[0].output = seen * 2
        assert torch.equal(seen, hidden)
        want = torch.nn.functional.linear((hidden * 2).relu(), weights["2.weight"], weights["2.bias"])
        assert torch.equal(tracer.result, want)
    assert everything(model) == before
    assert all(each.device.type == "meta" for each in module.parameters())


@pytest.mark.skipif(
    not importlib.util.find_spec("torchao"), reason="torchao is an extra of its own: `pip install '.[quantized]'`"
)
@pytest.mark.filterwarnings("ignore")  # torchao's own, at its import
@pytest.mark.parametrize("kind", ["weights", "weights and activations"])
def test_weights_that_torchao_has_quantized_to_int8(kind):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32)).eval()
    quantize_(module, Int8WeightOnlyConfig() if kind == "weights" else Int8DynamicActivationInt8WeightConfig())
    model, x = NNsight(module), torch.randn(2, 32)
    with torch.no_grad():
        want, hidden = with_zero_mlp(model, module[0], lambda: module(x))
        for _ in range(2):
            with model.trace(x) as tracer:
                seen = model[0].output
                model[0].output = seen * 0
            assert torch.equal(seen, hidden)
            assert torch.equal(tracer.result, want)
    assert type(module[0].weight) is not torch.nn.Parameter
    with model.trace(x) as tracer:
        cache = tracer.cache()
    assert torch.equal(cache["0"].output, hidden)


@pytest.fixture
def gguf_folder(tmp_path, folder):
    """A small Llama whose linear weights are of 8 bits, in a GGUF file, and its weights as they are read from there."""
    import gguf
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(folder("llama"))
    config, weights = llama.config, llama.state_dict()
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    eight_bits = gguf.GGMLQuantizationType.Q8_0
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in weights.items():
        known = names.get_name(name, try_suffixes=(".weight",))
        if known is None:
            continue
        data = value.float().numpy()
        if value.dim() == 2 and "norm" not in name and value.shape[-1] % 32 == 0:
            writer.add_tensor(known, gguf.quants.quantize(data, eight_bits), raw_dtype=eight_bits)
        else:
            writer.add_tensor(known, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path


def test_a_gguf_file_of_8_bit_weights(gguf_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, of the tokenizer that is not there
        from transformers import AutoModelForCausalLM

        module = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file="model.gguf").eval()
    model, ids = LanguageModel(module), torch.tensor([[1, 2, 3]])
    mlp = module.model.layers[1].mlp
    with torch.no_grad():
        want, hidden = with_zero_mlp(model, mlp, lambda: module(ids).logits)
        for _ in range(2):
            with model.trace(ids) as tracer:
                seen = model.model.layers[1].mlp.output
                model.model.layers[1].mlp.output = seen * 0
            assert torch.equal(seen, hidden)
            assert torch.equal(tracer.result.logits, want)
