"""What does a sweep of activation patching cost? Layers by positions, each patched alone, on a small real model.

python benchmarks/patching.py [--quick]

The baseline runs the model anew for each patch, with a plain hook. A fork begins where the layer has its output: one run goes
up through the layers, and every patch computes only what is above its own.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from models import word_tokenizer
from question import PEER, Asked, Case, answer
from timing import Ways

from nnsight_eager import LanguageModel, demo

if PEER == "nnsight":
    import nnsight

CONTEXT = "Then, Mary and John were working at the store. After a while, Mary and John went to the park, and "
CLEAN, CORRUPT = (f"{CONTEXT}{name} gave a drink to" for name in ("John", "Mary"))
OPTIONS = {"use_cache": False, "logits_to_keep": 1}  # what every way is called with: only the last token's logits are wanted


def cases(asked: Asked) -> Iterator[Case]:
    """What is measured."""
    if asked.quick:
        model, count = tiny(), 2
        ids = [torch.arange(start, start + 4)[None] for start in (0, 10)]
    else:
        wrapped = LanguageModel(demo.folder(), dispatch=True)
        model, count = wrapped._module, 6
        ids = [wrapped.tokenizer(text, return_tensors="pt")["input_ids"] for text in (CLEAN, CORRUPT)]
    step = len(model.model.layers) // count
    layers = list(range(step // 2, len(model.model.layers), step))
    name = f"{type(model).__name__} of {len(model.model.layers)} layers, {model.config.hidden_size} wide"
    positions = range(1, ids[0].shape[1], 3)
    title = f"{len(layers)} layers by {len(positions)} positions patched one by one, {name}, {ids[0].shape[1]} tokens"
    yield Case(title, ways(model, *ids, layers, positions), asked.rounds(5), twice=False)


def tiny() -> Any:
    """A model of the same kind, for a short run."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=100,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def ways(model: Any, clean: torch.Tensor, corrupt: torch.Tensor, layers: list[int], positions: range) -> Ways:
    """The ways to put the clean run's residual stream into the corrupt one; what follows, `[layer * position, vocabulary]`."""
    modules = [model.model.layers[number] for number in layers]
    source: dict[int, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda module, args, output, number=number: source.__setitem__(number, output))
        for number, module in zip(layers, modules, strict=True)
    ]
    model(clean, **OPTIONS)
    for handle in handles:
        handle.remove()

    def hooked() -> torch.Tensor:
        found = []
        for number, module in zip(layers, modules, strict=True):
            for position in positions:
                handle = module.register_forward_hook(patching(source[number], position))
                found.append(model(corrupt, **OPTIONS).logits[0, -1])
                handle.remove()
        return torch.stack(found)

    if PEER:
        peer = nnsight.LanguageModel(model, tokenizer=word_tokenizer(["word"]))

        def theirs() -> torch.Tensor:
            found = []
            for number in layers:
                for position in positions:
                    with peer.trace(input_ids=corrupt, **OPTIONS):
                        peer.model.layers[number].output[:, position] = source[number][:, position]
                        last = nnsight.save(peer.lm_head.output[0, -1])
                    found.append(last)
            return torch.stack(found)

        return {"plain hooks": hooked, "nnsight": theirs}
    twin = LanguageModel(model)

    def forks() -> torch.Tensor:
        found = []
        with twin.trace(input_ids=corrupt, **OPTIONS, keep=True) as tracer:
            for number in layers:
                _ = twin.model.layers[number].output
                for position in positions:
                    with tracer.fork(keep=False) as other:
                        other.model.model.layers[number].output[:, position] = source[number][:, position]
                        found.append(other.finish().logits[0, -1])
            tracer.stop()
        return torch.stack(found)

    def traces() -> torch.Tensor:
        found = []
        for number in layers:
            for position in positions:
                with twin.trace(input_ids=corrupt, **OPTIONS):
                    twin.model.layers[number].output[:, position] = source[number][:, position]
                    found.append(twin.lm_head.output[0, -1])
        return torch.stack(found)

    for way in (forks, traces):
        assert torch.allclose(way(), hooked(), atol=1e-4), "the ways do not agree"
    return {"plain hooks": hooked, "nnsight_eager, a fork each": forks, "nnsight_eager, a trace each": traces}


def patching(source: torch.Tensor, position: int) -> Callable[..., None]:
    """A hook that puts one position of another run into this one."""

    def hook(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        output[:, position] = source[:, position]

    return hook


if __name__ == "__main__":
    answer(__doc__, cases, apart=("nnsight",))
