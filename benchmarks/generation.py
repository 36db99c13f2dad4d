"""What does looking at every step of a generation cost? Every layer read and one edited at each token.

python benchmarks/generation.py [--quick]
"""

from collections.abc import Iterator
from typing import Any

import torch
from models import gpt2, with_hooks, word_tokenizer
from question import PEER, Asked, Case, answer
from timing import Ways

from nnsight_eager import LanguageModel

if PEER == "nnsight":
    import nnsight

EDITED = 6


def cases(asked: Asked) -> Iterator[Case]:
    """What is measured."""
    for width, tokens, rounds in ((64, 10, 2),) if asked.quick else ((64, 50, 40), (768, 50, 8)):
        title = f"{tokens} tokens of GPT-2, {width} wide: 12 layers read and one edited at each"
        yield Case(title, ways(gpt2(width), tokens), asked.rounds(rounds))


def ways(model: Any, tokens: int) -> Ways:
    """The ways to look at every step."""
    ids = torch.arange(10)[None]
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    inputs = {"attention_mask": torch.ones_like(ids), **options}
    layers = list(model.transformer.h)

    def bare() -> Any:
        return model.generate(ids, **inputs)

    def hooked() -> list[Any]:
        with editing(layers[EDITED]):
            return with_hooks(layers, bare)

    found: Ways = {"bare": bare, "plain hooks": hooked}
    if PEER:
        peer = nnsight.LanguageModel(model, tokenizer=word_tokenizer(["word"]))
        envoys = list(peer.transformer.h)

        def theirs() -> list[Any]:
            with peer.generate(ids, **inputs) as tracer:
                seen = nnsight.save([])
                for _ in tracer.iter[:tokens]:
                    for number, envoy in enumerate(envoys):
                        if number == EDITED:
                            envoy.output = envoy.output * 0.5
                        seen.append(envoy.output)
            return seen

        return found | {"nnsight": theirs}
    twin = LanguageModel(model)
    ours_at = list(twin.transformer.h)

    def ours() -> list[Any]:
        seen = []
        with twin.generate(ids, **inputs) as tracer:
            for _ in tracer.iter[:]:
                for number, envoy in enumerate(ours_at):
                    if number == EDITED:
                        envoy.output = envoy.output * 0.5
                    seen.append(envoy.output)
        return seen

    return found | {"nnsight_eager": ours}


class editing:
    """A block in which a plain hook halves what a layer gives."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._layer = layer

    def __enter__(self) -> None:
        self._handle = self._layer.register_forward_hook(lambda module, args, output: output * 0.5)

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


if __name__ == "__main__":
    answer(__doc__, cases, apart=("nnsight",))
