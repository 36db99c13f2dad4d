"""What do several prompts in one pass cost? Each is patched at a place of its own and read at its last token.

python benchmarks/batches.py [--quick]

All ways begin with the text. The baseline tokenizes the prompts together, pads them and runs the bare model; plain hooks patch
the rows of that batch, one hook a prompt, registered before and removed after.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from models import gpt2, word_tokenizer
from question import PEER, Asked, Case, answer
from timing import Ways

from nnsight_eager import LanguageModel

if PEER == "nnsight":
    import nnsight

LAYERS = 12
PROMPTS = [f"The tower is in the city of {'the ' * (number % 4)}north" for number in range(64)]


def cases(asked: Asked) -> Iterator[Case]:
    """What is measured."""
    tokenizer = word_tokenizer(PROMPTS)
    model = gpt2(64, LAYERS, len(tokenizer))
    for prompts in (1, 4) if asked.quick else (1, 2, 4, 8, 16, 32, 64):
        found = ways(model, tokenizer, PROMPTS[:prompts])
        rounds = asked.rounds(400 // prompts**0.5 // 1)
        yield Case("Prompts in one pass of GPT-2, 64 wide, each patched and read", found, int(rounds), prompts, "prompts")


def ways(model: Any, tokenizer: Any, prompts: list[str]) -> Ways:
    """The ways to patch each prompt's residual stream at one layer and read its last logits."""
    layers, patch = list(model.transformer.h), torch.randn(model.config.n_embd)

    def bare() -> Any:
        batch = tokenizer(prompts, padding=True, return_tensors="pt")
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return model(**batch, position_ids=positions).logits

    def hooked() -> list[Any]:
        handles = [layers[row % LAYERS].register_forward_hook(patching(row, patch)) for row in range(len(prompts))]
        logits = bare()
        for handle in handles:
            handle.remove()
        return [row[-1] for row in logits]

    found: Ways = {"bare": bare, "plain hooks": hooked}
    if PEER:
        peer = nnsight.LanguageModel(model, tokenizer=tokenizer)

        def theirs() -> list[Any]:
            with peer.trace() as tracer:
                last = nnsight.save([])
                for number, prompt in enumerate(prompts):
                    with tracer.invoke(prompt):
                        peer.transformer.h[number % LAYERS].output[:, -2] = patch
                        last.append(peer.lm_head.output[0, -1])
            return last

        return found | {"nnsight": theirs}
    twin = LanguageModel(model, tokenizer=tokenizer)

    def blocks() -> list[Any]:
        last = []
        with twin.trace() as tracer:
            for number, prompt in enumerate(prompts):
                with tracer.invoke(prompt):
                    twin.transformer.h[number % LAYERS].output[:, -2] = patch
                    last.append(twin.lm_head.output[0, -1])
        return last

    def functions() -> list[Any]:
        with twin.trace() as tracer:
            invokes = [tracer.invoke(prompt, patched(number)) for number, prompt in enumerate(prompts)]
        return [invoke.result for invoke in invokes]

    def patched(number: int) -> Callable[[], torch.Tensor]:
        def body() -> torch.Tensor:
            twin.transformer.h[number % LAYERS].output[:, -2] = patch
            return twin.lm_head.output[0, -1]

        return body

    for way in (blocks, functions):
        assert torch.allclose(torch.stack(way()), torch.stack(hooked()), atol=1e-4), "the ways do not agree"
    return found | {"nnsight_eager": blocks, "nnsight_eager, functions": functions}


def patching(row: int, patch: torch.Tensor) -> Callable[..., None]:
    """A hook that replaces one row's second to last position."""

    def hook(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        output[row, -2] = patch

    return hook


if __name__ == "__main__":
    answer(__doc__, cases, apart=("nnsight",))
