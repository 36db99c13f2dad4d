"""Modules of one's own in the tree (autoencoders and the like), and PEFT adapters."""

import copy

import pytest
import torch
from small_models import X4, Stack

from nnsight_eager import EditError, LanguageModel, LoadError, NNsight

# peft asks for a name that transformers 5 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Autoencoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = torch.nn.Linear(4, 8)
        self.decoder = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.decoder(torch.relu(self.encoder(x)))


@pytest.fixture
def model():
    model = NNsight(Stack())
    model.h[1].adapter = Autoencoder()
    return model


def through(module, x, *, codes=None, at=None):
    """The output of the stack with the autoencoder behind its second block, computed by hand."""
    hidden = module.h[1](module.h[0](x))
    codes = module.h[1].adapter.encoder(hidden) if codes is None else codes
    if at is not None:
        at.append(codes)
    return module.head(module.h[2](module.h[1].adapter.decoder(torch.relu(codes))))


def test_a_module_that_is_added_is_an_envoy_at_once(model):
    assert model.h[1].adapter.encoder.weight.shape == (8, 4)
    assert model["h.1.adapter"] is model.h[1].adapter


def test_a_module_applied_without_a_hook_is_not_visited(model):
    with model.trace(X4) as tracer:
        cache = tracer.cache("h.1.adapter")
        model.h[1].output = model.h[1].adapter(model.h[1].output)
        changed = model.output
    assert cache.keys() == []
    assert torch.allclose(changed, through(model._module, X4))


@pytest.mark.parametrize("again", [False, True], ids=["first trace", "later trace"])
def test_a_module_applied_with_a_hook_is_visited(model, again):
    if again:
        model.trace(X4).result
    expected = []
    with model.trace(X4) as tracer:
        cache = tracer.cache(["h.1.adapter", "h.1.adapter.encoder"])
        model.h[1].output = model.h[1].adapter(model.h[1].output, hook=True)
        changed = model.output
    assert torch.allclose(changed, through(model._module, X4, at=expected))
    assert torch.allclose(cache["h.1.adapter.encoder"].output, expected[0])
    assert len(cache["h.1.adapter"].visits) == 1


def test_what_an_edit_applies_is_read_and_replaced_in_a_trace(model):
    with model.edit() as edited:
        model.h[1].output = model.h[1].adapter(model.h[1].output, hook=True)
    with edited.trace(X4):
        codes = edited.h[1].adapter.encoder.output
        edited.h[1].adapter.encoder.output = codes * 0
        changed = edited.output
    expected = []
    through(model._module, X4, at=expected)
    assert torch.allclose(codes, expected[0])
    assert torch.allclose(changed, through(model._module, X4, codes=torch.zeros(1, 8)))


def test_invokes_see_their_rows_of_what_an_edit_applies(model):
    with model.edit() as edited:
        model.h[1].output = model.h[1].adapter(model.h[1].output, hook=True)
    with edited.trace() as tracer:
        with tracer.invoke(X4):
            edited.h[1].adapter.encoder.output = edited.h[1].adapter.encoder.output * 0
            first = edited.output
        with tracer.invoke(X4 * 2):
            codes = edited.h[1].adapter.encoder.output
            second = edited.output
    assert codes.shape == (1, 8)
    assert torch.allclose(first, through(model._module, X4, codes=torch.zeros(1, 8)))
    assert torch.allclose(second, through(model._module, X4 * 2))


def test_it_runs_in_the_settings_of_the_model(model):
    with model.trace(X4):
        hidden = model.h[1].output
        with torch.no_grad():
            heard = model.h[1].adapter(hidden, hook=True)
            plain = model.h[1].adapter(hidden)
    assert heard.requires_grad
    assert not plain.requires_grad


def test_what_it_raises_is_raised_in_the_body_and_the_model_goes_on(model):
    with model.trace(X4):
        hidden = model.h[1].output
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model.h[1].adapter(torch.ones(3), hook=True)
        assert torch.equal(model.h[1].output, hidden)
        assert torch.allclose(model.output, model._module(X4))


def test_a_hook_needs_a_forward_pass_that_is_paused(model):
    with pytest.raises(EditError) as caught, model.trace(X4):
        model.h[1].adapter(X4, hook=True)
    assert str(caught.value).splitlines()[0] == (
        "`model.h[1].adapter(..., hook=True)` is a call in the model's forward pass, which is not paused at a point."
    )


def test_a_module_is_not_called_inside_its_own_call(model):
    with pytest.raises(EditError) as caught, model.trace(X4):
        model.h[1].lin.output
        model.h[1](X4, hook=True)
    assert str(caught.value).splitlines()[0] == (
        "`model.h[1](..., hook=True)` is a call in the model's forward pass, which is not paused outside of it."
    )


# PEFT


@pytest.fixture
def adapter(folder, tmp_path):
    """A folder with a LoRA adapter of the tiny GPT-2, and what the model gives with it for some ids."""
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    torch.manual_seed(2)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder("gpt2")), config).eval()
    adapted.save_pretrained(tmp_path)
    return tmp_path, adapted


IDS = torch.tensor([[5, 6, 7]])


def test_an_adapter_takes_part_and_paths_stay(folder, adapter):
    path, adapted = adapter
    model = LanguageModel(folder("gpt2"))
    plain = model.trace(IDS).result.logits
    model.load_adapter(path)
    with model.trace(IDS) as tracer:
        read = model.transformer.h[0].attn.c_attn.output
        inside = model.transformer.h[1].attn.c_attn.lora_A.default.output
    assert read.shape == (1, 3, 96)
    assert inside.shape == (1, 3, 2)
    assert torch.allclose(tracer.result.logits, adapted(IDS).logits, atol=1e-5)
    assert not torch.allclose(tracer.result.logits, plain, atol=1e-2)


def test_a_peft_model_is_wrapped_as_it_is(adapter):
    _, adapted = adapter
    model = LanguageModel(copy.deepcopy(adapted))
    with model.trace(IDS) as tracer:
        hidden = model.transformer.h[1].hidden
    assert hidden.shape == (1, 3, 32)
    assert torch.allclose(tracer.result.logits, adapted(IDS).logits, atol=1e-5)


def test_an_adapter_that_is_not_there_is_refused(gpt2, tmp_path):
    with pytest.raises(LoadError, match=r"The adapter `.*` cannot be loaded"):
        gpt2.load_adapter(tmp_path / "nothing")
