"""What does looking cost? Added time of a trace over the bare model, beside plain forward hooks and nnsight.

python benchmarks/overhead.py [--rounds N]

Every round runs each way in random order, so that a slow moment of the machine hits all of them, and twice, of which the
second is timed; the table gives medians. `of bare` is the ratio of totals, `of hooks` the ratio of added times. nnsight takes
part where it is installed (`pip install nnsight==0.8.1`), in a process of its own with the same baselines: where it was
imported and traced, a bare forward took 12 % longer and our reads 30 %.
"""

import os
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"

import tokenizers
import torch
import transformers
from timing import PEER, Ways, arguments, print_header, print_table, run_peer

from nnsight_eager import LanguageModel, NNsight

LAYERS = 12
TOKENS = 20

if PEER:
    import nnsight


def with_hooks(layers: list[torch.nn.Module], run: Callable[[], object]) -> list[object]:
    """What plain forward hooks see of the layers while `run` runs; registered before, removed after."""
    seen: list[object] = []
    handles = [layer.register_forward_hook(lambda module, args, output: seen.append(output)) for layer in layers]
    run()
    for handle in handles:
        handle.remove()
    return seen


def forward_ways(module: torch.nn.Module, path: str, **inputs: object) -> Ways:
    """The ways to read every layer's output in one forward pass."""
    args = (inputs.pop("x"),) if "x" in inputs else ()
    layers = list(module.get_submodule(path))
    twin = NNsight(module)
    envoys = list(twin[path] if path else twin)

    def bare() -> object:
        return module(*args, **inputs)

    def empty() -> None:
        with twin.trace(*args, **inputs):
            pass

    def ours() -> list[object]:
        with twin.trace(*args, **inputs):
            return [envoy.output for envoy in envoys]

    ways: Ways = {"bare forward": bare, "plain hooks": lambda: with_hooks(layers, bare)}
    if PEER:
        peer = nnsight.NNsight(module)
        peers = list(peer.get(path) if path else peer)

        def peer_empty() -> None:
            with peer.trace(*args, **inputs):
                pass

        def peer_reads() -> None:
            with peer.trace(*args, **inputs):
                for envoy in peers:
                    envoy.output.save()

        return ways | {"nnsight, empty trace": peer_empty, "nnsight": peer_reads}
    return ways | {"wrapped, idle": bare, "nnsight_eager, empty trace": empty, "nnsight_eager": ours}


def generation_ways(module: torch.nn.Module) -> Ways:
    """The ways to read every layer's output at every step of a generation."""
    ids = torch.arange(10)[None]
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    twin = LanguageModel(module)
    envoys = list(twin.transformer.h)

    def bare() -> object:
        return module.generate(ids, attention_mask=torch.ones_like(ids), **options)

    def ours() -> list[object]:
        with twin.generate(ids, attention_mask=torch.ones_like(ids), **options) as tracer:
            return [envoy.output for _ in tracer.iter[:] for envoy in envoys]

    ways: Ways = {"bare generation": bare, "plain hooks": lambda: with_hooks(list(module.transformer.h), bare)}
    if PEER:
        peer = nnsight.LanguageModel(module, tokenizer=any_tokenizer())
        peers = list(peer.transformer.h)

        def peer_reads() -> object:
            with peer.generate(ids, attention_mask=torch.ones_like(ids), **options) as tracer:
                seen = nnsight.save([])
                for _ in tracer.iter[:TOKENS]:
                    for envoy in peers:
                        seen.append(envoy.output)
            return seen

        return ways | {"nnsight": peer_reads}
    return ways | {"nnsight_eager": ours}


def any_tokenizer() -> object:
    """A tokenizer of two words, for a peer that will not do without one."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "word": 1}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")


def main() -> None:
    """Print the tables."""
    rounds = arguments(__doc__, rounds=2000)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print_header()
    mlp = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(LAYERS)]).eval()
    config = transformers.GPT2Config(n_layer=LAYERS, n_embd=768, n_head=12, vocab_size=50257)
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        title = f"Every layer's output of an MLP of {LAYERS} layers, 64 wide, batch 1"
        print_table(title, forward_ways(mlp, "", x=torch.randn(1, 64)), rounds)
        title = f"Every layer's output of GPT-2, {LAYERS} layers, 768 wide, random weights, 10 tokens"
        print_table(title, forward_ways(gpt2, "transformer.h", input_ids=torch.arange(10)[None]), max(rounds // 40, 3))
        title = f"Every layer's output at each of {TOKENS} generated tokens of the same GPT-2"
        print_table(title, generation_ways(gpt2), max(rounds // 200, 3))
    run_peer(__file__, rounds)


if __name__ == "__main__":
    main()
