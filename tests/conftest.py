"""Tiny random models, saved and loaded as real ones are, and what every test needs."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

# A fixed seed where a change is judged, a fresh one wherever somebody works on it.
hypothesis.settings.register_profile("fixed", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("fixed")

TEXT = [
    "The Eiffel Tower is in the city of Paris, and the Colosseum is in the city of Rome.",
    "Madison square garden is located in the city of New York City. _ _ _ _ _ _ _ _ _ _",
    "When Mary and John went to the store, John gave a drink to Mary. 0123456789",
]
SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    },
    "bert": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    },
    "t5": {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64, "d_kv": 8, "decoder_start_token_id": 0},
}
AUTOMODELS = {
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "bert": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
}


def train_tokenizer(size=320):
    """A small byte-level BPE tokenizer; one of 700 entries has every word of the training text as one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer) -> Callable[[str], Path]:
    """The folder of a tiny saved model: `folder("gpt2")`."""
    import transformers

    root = tmp_path_factory.mktemp("models")

    def saved(kind: str) -> Path:
        path = root / kind
        if kind == "llava" and not path.exists():
            import small_vision

            small_vision.saved(path, tokenizer)
        if not path.exists():
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(
                kind, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0, **SIZES[kind]
            )
            model = getattr(transformers, AUTOMODELS[kind]).from_config(config).eval()
            for parameter in model.parameters():  # the default initialisation makes every token equally likely
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        return path

    return saved


@pytest.fixture
def gpt2(folder):
    from nnsight_eager import LanguageModel

    return LanguageModel(folder("gpt2"))


@pytest.fixture(scope="module")
def shell():
    """IPython, in this process."""
    from IPython.core import async_helpers
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    yield InteractiveShell(config=Config(HistoryManager={"enabled": False}))
    if async_helpers._asyncio_event_loop is not None:
        async_helpers._asyncio_event_loop.close()
        async_helpers._asyncio_event_loop = None


@pytest.fixture
def one_torch_thread():
    """Torch's own threads wait for each other in a busy loop, which takes minutes on a machine that is not idle."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_backward_pass_is_left():
    """In the middle of one, autograd keeps it and its error on the thread until the process ends, and crashes there."""
    yield
    assert torch._C._current_graph_task_id() == -1


@pytest.fixture
def watched():
    """A wrapped model, and the list of what its forward has come by."""
    from small_models import Stack

    from nnsight_eager import NNsight

    module, events = Stack(), []
    for name, each in module.named_modules():
        each.register_forward_pre_hook(lambda *a, name=name: events.append(f"into {name}"))
        each.register_forward_hook(lambda *a, name=name: events.append(f"out of {name}"))
    return NNsight(module), events
