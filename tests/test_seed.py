"""The examples users were promised, as they were written: only the import, the model's name and the device are changed.

They were written for a block that returns a tuple, as in transformers 4. On transformers 5, where it returns a tensor,
`.hidden` stands for `.output[0]`. The cross-prompt examples need invokes and are not here yet.
"""

from pathlib import Path

import pytest
import torch
import transformers

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
    names = {}
    exec(compile(source, example, "exec"), names)
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
