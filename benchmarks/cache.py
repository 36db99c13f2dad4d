"""What does it cost to keep what every module gives? One forward pass of GPT-2; time, and memory over what is kept.

python benchmarks/cache.py [--quick]

Plain hooks copy what they keep, and our cache does where somebody writes it; the others keep references, which a model's later
edits in place would change. transformer-lens runs GPT-2 by modules of its own, which have more places; torchlens keeps every
operation.
"""

from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import torch
from models import Recorded, gpt2
from question import PEER, Asked, Case, answer
from timing import Ways

from nnsight_eager import NNsight

if PEER == "nnsight":
    import nnsight
elif PEER == "torchlens":
    import torchlens
elif PEER == "transformer_lens":
    from transformer_lens.model_bridge import TransformerBridge


def cases(asked: Asked) -> Iterator[Case]:
    """What is measured."""
    for width, tokens in ((64, 8),) if asked.quick else ((768, 10), (768, 128)):
        title = f"Keep every module's output, GPT-2 of 12 layers, {width} wide, {tokens} tokens"
        yield Case(title, ways(gpt2(width), torch.arange(tokens)[None]), asked.rounds(50 if tokens < 100 else 10))


def ways(model: Any, ids: torch.Tensor) -> Ways:
    """The ways to keep all outputs."""
    paths = [path for path, _ in model.named_modules()]

    def bare() -> Any:
        return model(ids)

    def hooked() -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def keep(path: str) -> Any:
            return lambda module, args, output: seen.__setitem__(path, copied(output))

        handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
        bare()
        for handle in handles:
            handle.remove()
        return seen

    found: Ways = {"bare": bare, "plain hooks": hooked}
    if PEER:
        return found | {PEER: globals()[f"with_{PEER}"](model, ids)}
    twin = NNsight(model)

    def ours() -> Any:
        return twin.cache(input_ids=ids)

    def recorded() -> Any:
        with Recorded(model, paths) as seen:
            bare()
        return seen.outputs

    return found | {"baukit's way": recorded, "nnsight_eager": ours}


def copied(output: Any) -> Any:
    """A copy of each tensor of what a module gives: a tensor, a tuple of them, a model output; not of a key/value cache."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    if isinstance(output, dict):
        return {key: copied(each) for key, each in output.items()}
    return tuple(map(copied, output)) if isinstance(output, tuple) else output


def with_nnsight(model: Any, ids: torch.Tensor) -> Any:
    """nnsight's cache."""
    peer = nnsight.NNsight(model)

    def theirs() -> Any:
        with peer.trace(input_ids=ids) as tracer:
            cache = nnsight.save(tracer.cache())
        return cache

    return theirs


def with_transformer_lens(model: Any, ids: torch.Tensor) -> Any:
    """`run_with_cache`, of a bridge to a model of the same form."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=gpt2(model.config.n_embd))
    return lambda: dict(bridge.run_with_cache(ids)[1].items())


def with_torchlens(model: Any, ids: torch.Tensor) -> Any:
    """A log of every operation of the forward pass."""

    def theirs() -> Any:
        log = torchlens.trace(model, ids)
        return [log[number].out for number in range(len(log))]

    return theirs


if __name__ == "__main__":
    answer(__doc__, cases, apart=("nnsight", "transformer_lens", "torchlens"))
