"""The models that are measured, and what plain hooks do with them."""

from collections.abc import Callable, Iterable
from typing import Any

import tokenizers
import torch
import transformers

transformers.logging.set_verbosity_error()


def mlp(layers: int, width: int) -> torch.nn.Sequential:
    """Linear layers one after another."""
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(layers)]).eval()


def gpt2(width: int, layers: int = 12, vocabulary: int = 50257) -> Any:
    """A GPT-2 with random weights; of 768 wide it has the shapes of GPT-2 small."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=width, n_head=width // 32 if width < 768 else width // 64, vocab_size=vocabulary,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def word_tokenizer(texts: Iterable[str]) -> Any:
    """A tokenizer of the words in these texts."""
    words = ["<pad>", *dict.fromkeys(" ".join(texts).split())]
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def with_hooks(modules: Iterable[torch.nn.Module], run: Callable[[], object]) -> list[Any]:
    """What plain forward hooks see of the modules while `run` runs; registered before, removed after."""
    seen: list[Any] = []
    handles = [module.register_forward_hook(lambda module, args, output: seen.append(output)) for module in modules]
    run()
    for handle in handles:
        handle.remove()
    return seen


class Recorded:
    """The idea of baukit's `TraceDict`, as a reference: a block in which named modules keep what they give.

    with Recorded(model, ["0", "1"]) as recorded:
        model(x)
    recorded.outputs["0"]
    """

    def __init__(self, model: torch.nn.Module, names: Iterable[str]) -> None:
        self.outputs: dict[str, Any] = {}
        self._modules = {name: model.get_submodule(name) for name in names}

    def __enter__(self) -> "Recorded":
        self._handles = [module.register_forward_hook(self._keep(name)) for name, module in self._modules.items()]
        return self

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            self.outputs[name] = output

        return hook

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
