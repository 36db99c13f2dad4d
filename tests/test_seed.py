"""The examples users were promised, as they were written: only the import, the model's name and the device are changed.

They were written for a block that returns a tuple, as in transformers 4. On transformers 5, where it returns a tensor,
`.hidden` stands for `.output[0]`.
"""

import linecache
from pathlib import Path

import pytest
import torch
import transformers
from conftest import train_tokenizer

from nnsight_eager import shapes

FOLDER = Path(__file__).parent / "seed"
EARLIER = int(transformers.__version__.split(".")[0]) < 5


def run(example, folder):
    """Run one example and give the names it leaves."""
    source = (FOLDER / f"{example}.py").read_text()
    source = source.replace("from nnsight import", "from nnsight_eager import")
    source = source.replace("openai-community/gpt2", str(folder("gpt2")))
    source = source.replace("device_map='cuda'", "device_map='cpu'")
    if not EARLIER:
        source = source.replace(".output[0]", ".hidden")
    filename = f"<{example}>"
    linecache.cache[filename] = len(source), None, source.splitlines(True), filename  # as a notebook does with its cells
    names = {}
    exec(compile(source, filename, "exec"), names)
    return names


@pytest.fixture
def tokens(gpt2):
    return len(gpt2.tokenizer("The Eiffel Tower is in the city of")["input_ids"])


def test_the_first_example(folder, tokens):
    names = run("first", folder)
    assert names["hidden_states"].shape == (1, tokens, 32)
    assert names["output"].logits.shape == (1, tokens, 320)
    assert names["tracer"].result is names["output"]
    block = names["model"].transformer.h[-1]
    with names["model"].trace("The Eiffel Tower is in the city of"):
        printed = repr(shapes(block.output))
    hidden = f"torch.Size([1, {tokens}, 32])"
    assert printed.startswith(f"({hidden}," if EARLIER else hidden)


def test_operations(folder, tokens):
    names = run("operations", folder)
    assert names["hidden_states_pre"].shape == (1, tokens, 32)
    assert torch.equal(names["hs_sum"], names["hidden_states_pre"].sum())
    assert torch.equal(names["hs_edited"], names["hidden_states_pre"] + names["hs_sum"])


def test_setting(folder, tokens):
    names = run("setting", folder)
    assert names["hidden_states_pre"].shape == (1, tokens, 32)
    assert torch.equal(names["hidden_states_post"], names["hidden_states_pre"] + names["noise"])


def test_multiple_token_generation(folder, tokens):
    names = run("generation", folder)
    assert names["hidden_states1"].shape == (1, tokens, 32)
    assert names["hidden_states2"].shape == names["hidden_states3"].shape == (1, 1, 32)
    assert names["tracer"].result.shape == (1, tokens + 3)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")  # the example gives no max_new_tokens
def test_ad_hoc_module(folder, tokens):
    names = run("ad_hoc_module", folder)
    assert names["hidden_states"].shape == (1, tokens, 320)
    assert names["tokens"].shape == (1, tokens)


@pytest.fixture
def folder_of_words(folder, tmp_path):
    """A model whose tokenizer gives both prompts of the cross-prompt examples ten tokens, as GPT-2's own does."""
    tokenizer = train_tokenizer(700)
    config = transformers.AutoConfig.from_pretrained(folder("gpt2"), vocab_size=len(tokenizer))
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return lambda _: tmp_path


MADISON = "Madison square garden is located in the city of New"


def test_cross_prompt_intervention(folder_of_words):
    names = run("cross_prompt", folder_of_words)
    model, output = names["model"], names["output"]
    ids = model.tokenizer([MADISON, "_ _ _ _ _ _ _ _ _ _"], return_tensors="pt")["input_ids"]
    assert ids.shape == (2, 10)
    assert torch.equal(output[:, :10], ids)
    alone = model._module.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=3, pad_token_id=0)
    other = model._module.generate(ids[1:], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=3, pad_token_id=0)
    assert output[0].tolist() == alone[0].tolist()
    assert output[1, 10:].tolist() == alone[0, 10:].tolist() != other[0, 10:].tolist()
    assert torch.equal(names["embeddings"], model._module.transformer.wte(ids[:1]))


def test_cross_prompt_intervention_with_a_value_of_an_earlier_trace(folder_of_words):
    names = run("cross_prompt_value", folder_of_words)
    model, output = names["model"], names["tracer"].result
    alone = run("cross_prompt", folder_of_words)["output"]
    assert output[0, 10:].tolist() == alone[0, 10:].tolist()
    assert torch.equal(names["embeddings"], model._module.transformer.wte(alone[:1, :10]))
