"""What do several prompts in one pass cost? 32 prompts, each patched at a place of its own, read at the last token.

python benchmarks/invokes.py [--rounds N]

All ways begin with the text. The baseline tokenizes the prompts together, pads them and runs the bare model; plain hooks patch
the rows of that batch, one hook a prompt, registered before and removed after. Every round runs each way in random order and
twice, of which the second is timed; the table gives medians. nnsight takes part where it is installed, in a process of its own.
"""

import os
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"

import tokenizers
import torch
import transformers
from timing import PEER, Ways, arguments, print_header, print_table, run_peer

from nnsight_eager import LanguageModel

if PEER:
    import nnsight

LAYERS = 12
PROMPTS = [f"The tower is in the city of {'the ' * (number % 4)}north" for number in range(32)]
WORDS = ["<pad>", *dict.fromkeys(" ".join(PROMPTS).split())]


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<pad>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def ways(module: torch.nn.Module) -> Ways:
    """The ways to patch each prompt's residual stream at one layer and read its last logits."""
    tokenizer = word_tokenizer()
    layers = list(module.transformer.h)
    patch = torch.randn(module.config.n_embd)

    def bare() -> torch.Tensor:
        batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return module(**batch, position_ids=positions).logits

    def hooks() -> list[torch.Tensor]:
        handles = [layers[row % LAYERS].register_forward_hook(patching(row, patch)) for row in range(len(PROMPTS))]
        logits = bare()
        for handle in handles:
            handle.remove()
        return [row[-1] for row in logits]

    def blocks() -> list[torch.Tensor]:
        last = []
        with model.trace() as tracer:
            for number, prompt in enumerate(PROMPTS):
                with tracer.invoke(prompt):
                    model.transformer.h[number % LAYERS].output[:, -2] = patch
                    last.append(model.lm_head.output[0, -1])
        return last

    def functions() -> list[torch.Tensor]:
        with model.trace() as tracer:
            invokes = [tracer.invoke(prompt, patched(number)) for number, prompt in enumerate(PROMPTS)]
        return [invoke.result for invoke in invokes]

    def patched(number: int) -> Callable[[], torch.Tensor]:
        def body() -> torch.Tensor:
            model.transformer.h[number % LAYERS].output[:, -2] = patch
            return model.lm_head.output[0, -1]

        return body

    def traces() -> list[torch.Tensor]:
        last = []
        for number, prompt in enumerate(PROMPTS):
            with model.trace(prompt):
                model.transformer.h[number % LAYERS].output[:, -2] = patch
                last.append(model.lm_head.output[0, -1])
        return last

    if PEER:
        peer = nnsight.LanguageModel(module, tokenizer=tokenizer)

        def peer_blocks() -> list[torch.Tensor]:
            with peer.trace() as tracer:
                last = nnsight.save([])
                for number, prompt in enumerate(PROMPTS):
                    with tracer.invoke(prompt):
                        peer.transformer.h[number % LAYERS].output[:, -2] = patch
                        last.append(peer.lm_head.output[0, -1])
            return last

        return {"bare batch": bare, "plain hooks": hooks, "nnsight, one trace": peer_blocks}
    model = LanguageModel(module, tokenizer=tokenizer)
    found = {
        "bare batch": bare,
        "plain hooks": hooks,
        "nnsight_eager, `with` blocks": blocks,
        "nnsight_eager, functions": functions,
        "nnsight_eager, 32 traces": traces,
    }
    for way in (blocks, functions, traces):
        assert torch.allclose(torch.stack(way()), torch.stack(hooks()), atol=1e-4), "the ways do not agree"
    return found


def patching(row: int, patch: torch.Tensor) -> Callable[..., None]:
    """A hook that replaces one row's second to last position."""

    def hook(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        output[row, -2] = patch

    return hook


def main() -> None:
    """Print the tables."""
    rounds = arguments(__doc__, rounds=200)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print_header()
    with torch.no_grad():
        for width, share in ((64, 1), (768, 20)):
            config = transformers.GPT2Config(
                n_layer=LAYERS, n_embd=width, n_head=width // 32, vocab_size=len(WORDS), bos_token_id=0, eos_token_id=0
            )
            module = transformers.GPT2LMHeadModel(config).eval()
            title = f"32 prompts, each patched once, on GPT-2 of {LAYERS} layers, {width} wide, random weights"
            print_table(title, ways(module), max(rounds // share, 3))
    run_peer(__file__, rounds)


if __name__ == "__main__":
    main()
