"""What does looking cost? A trace over the bare model, beside plain forward hooks and the other tools, and how it grows.

python benchmarks/overhead.py [--quick]
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from models import Recorded, gpt2, mlp, with_hooks
from question import PEER, Asked, Case, answer
from timing import Ways

from nnsight_eager import NNsight

if PEER == "nnsight":
    import nnsight

LAYERS = 12
MLP = "an MLP of 12 layers, 64 wide, batch 1"


def cases(asked: Asked) -> Iterator[Case]:
    """What is measured."""
    yield from on_an_mlp(asked)
    width = 64 if asked.quick else 768
    model, inputs = gpt2(width), {"input_ids": torch.arange(10)[None]}
    yield Case(
        f"Read 12 layers, GPT-2 of 12 layers, {width} wide, 10 tokens",
        reading(asked, model, list(model.transformer.h), inputs),
        asked.rounds(50),
    )
    yield Case(
        "Read 12 operations, GPT-2 of 12 layers, 64 wide, 10 tokens", operations(asked, gpt2(64), inputs), asked.rounds(500)
    )
    for modules in (10, 100) if asked.quick else (10, 100, 1000, 10_000):
        yield from growing(asked, modules)


def on_an_mlp(asked: Asked) -> Iterator[Case]:
    """The smallest model: what is added shows."""
    model, inputs = mlp(LAYERS, 64), {"input": torch.randn(1, 64)}
    rounds = asked.rounds(2000)
    if not PEER:
        twin = NNsight(model)
        bare = called(model, inputs)
        yield Case(f"Wrapped and not traced, {MLP}", {"bare": bare, "nnsight_eager": called(twin._module, inputs)}, rounds)
    yield Case(f"An empty trace, {MLP}", empty(asked, model, inputs), rounds)
    yield Case(f"Read 12 layers, {MLP}", reading(asked, model, list(model), inputs), rounds)
    yield Case(f"Replace 12 layers' outputs, {MLP}", replacing(asked, model, inputs), rounds)


def growing(asked: Asked, modules: int) -> Iterator[Case]:
    """How costs grow with the model."""
    model, inputs = mlp(modules, 4), {"input": torch.randn(1, 4)}
    rounds = asked.rounds(max(3, 5000 // modules))
    yield Case(
        "Read the last layer of as many", reading(asked, model, [model[-1]], inputs), rounds, modules, "layers", memory=False
    )
    yield Case("Read every layer", reading(asked, model, list(model), inputs), rounds, modules, "layers", memory=False)


def called(model: torch.nn.Module, inputs: dict[str, Any]) -> Callable[[], Any]:
    """The bare forward pass."""
    return lambda: model(**inputs)


def empty(asked: Asked, model: torch.nn.Module, inputs: dict[str, Any]) -> Ways:
    """A trace with nothing in it."""
    ways: Ways = {"bare": called(model, inputs)}
    if PEER:
        peer = nnsight.NNsight(model)

        def theirs() -> None:
            with peer.trace(**inputs):
                pass

        return ways | {"nnsight": theirs}
    twin = NNsight(model)

    def ours() -> None:
        with twin.trace(**inputs):
            pass

    return ways | {"nnsight_eager": ours}


def reading(asked: Asked, model: torch.nn.Module, modules: list[torch.nn.Module], inputs: dict[str, Any]) -> Ways:
    """The outputs of these modules."""
    bare = called(model, inputs)
    ways: Ways = {"bare": bare, "plain hooks": lambda: with_hooks(modules, bare)}
    names = {id(module): path for path, module in model.named_modules()}
    paths = [names[id(module)] for module in modules]
    if PEER:
        peer = nnsight.NNsight(model)
        envoys = [peer.get(path) for path in paths]

        def theirs() -> list[Any]:
            with peer.trace(**inputs):
                seen = nnsight.save([])
                for envoy in envoys:
                    seen.append(envoy.output)
            return seen

        return ways | {"nnsight": theirs}
    twin = NNsight(model)
    ours_at = [twin[path] for path in paths]

    def recorded() -> dict[str, Any]:
        with Recorded(model, paths) as seen:
            bare()
        return seen.outputs

    def ours() -> list[Any]:
        with twin.trace(**inputs):
            return [envoy.output for envoy in ours_at]

    ways |= {"baukit's way": recorded, "nnsight_eager": ours}
    return ways | with_pyvene(model, paths, inputs) if asked.has("pyvene") and hasattr(model, "config") else ways


def with_pyvene(model: torch.nn.Module, paths: list[str], inputs: dict[str, Any]) -> Ways:
    """The same by pyvene's collecting interventions."""
    import pyvene

    wanted = [{"component": f"{path}.output", "intervention": pyvene.CollectIntervention()} for path in paths]
    collecting = pyvene.IntervenableModel(wanted, model=model)
    return {"pyvene": lambda: collecting(inputs)[0][1]}


def replacing(asked: Asked, model: torch.nn.Sequential, inputs: dict[str, Any]) -> Ways:
    """Every layer gives a constant."""
    bare, constant = called(model, inputs), torch.ones(1, 64)

    def hooked() -> Any:
        handles = [layer.register_forward_hook(lambda module, args, output: constant) for layer in model]
        result = bare()
        for handle in handles:
            handle.remove()
        return result

    ways: Ways = {"bare": bare, "plain hooks": hooked}
    if PEER:
        peer = nnsight.NNsight(model)
        envoys = list(peer)

        def theirs() -> None:
            with peer.trace(**inputs):
                for envoy in envoys:
                    envoy.output = constant

        return ways | {"nnsight": theirs}
    twin = NNsight(model)
    ours_at = list(twin)

    def ours() -> None:
        with twin.trace(**inputs):
            for envoy in ours_at:
                envoy.output = constant

    return ways | {"nnsight_eager": ours}


def operations(asked: Asked, model: Any, inputs: dict[str, Any]) -> Ways:
    """What the attention function gives, inside each layer's forward."""
    ways: Ways = {"bare": called(model, inputs)}
    if PEER:
        peer = nnsight.NNsight(model)
        envoys = list(peer.transformer.h)

        def theirs() -> list[Any]:
            with peer.trace(**inputs):
                seen = nnsight.save([])
                for envoy in envoys:
                    seen.append(envoy.attn.source.attention_interface_1.output)
            return seen

        return ways | {"nnsight": theirs}
    twin = NNsight(model)
    ours_at = list(twin.transformer.h)

    def ours() -> list[Any]:
        with twin.trace(**inputs):
            return [envoy.attn.source.attention_interface_1.output for envoy in ours_at]

    return ways | {"nnsight_eager": ours}


if __name__ == "__main__":
    answer(__doc__, cases, apart=("nnsight",), within=("pyvene",))
