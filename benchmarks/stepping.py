"""What does going through a model step by step cost? Every point of GPT-2, with `run.step()`, to the end.

python benchmarks/stepping.py [--quick]

A held run keeps what completed modules gave, so that it can go back and be forked; `keep=False` keeps nothing. No peer pauses
outside a block, so the baseline is a forward pass, and plain hooks that see every module's input and output.
"""

from collections.abc import Iterator
from typing import Any

import torch
from models import gpt2
from question import Asked, Case, answer
from timing import Ways

from nnsight_eager import LanguageModel


def cases(asked: Asked) -> Iterator[Case]:
    """What is measured."""
    for width, rounds in ((64, 2),) if asked.quick else ((64, 30), (768, 20)):
        model, ids = gpt2(width), torch.arange(10)[None]
        run = LanguageModel(model).trace(input_ids=ids).start()
        steps = 0
        while run._run.open:
            run.step()
            steps += 1
        title = f"{steps} steps through GPT-2 of 12 layers, {width} wide, 10 tokens"
        yield Case(title, ways(model, ids), asked.rounds(rounds), memory=False)


def ways(model: Any, ids: torch.Tensor) -> Ways:
    """The ways to come by every point."""
    twin = LanguageModel(model)

    def bare() -> Any:
        return model(ids)

    def hooked() -> int:
        seen = []
        handles = [module.register_forward_pre_hook(lambda module, args: seen.append(module)) for module in model.modules()]
        handles += [
            module.register_forward_hook(lambda module, args, output: seen.append(module)) for module in model.modules()
        ]
        bare()
        for handle in handles:
            handle.remove()
        return len(seen)

    def stepped(keep: bool) -> None:
        run = twin.trace(input_ids=ids).start(keep=keep)
        while run._run.open:
            run.step()

    return {
        "bare": bare,
        "plain hooks": hooked,
        "nnsight_eager": lambda: stepped(True),
        "nnsight_eager, keep=False": lambda: stepped(False),
    }


if __name__ == "__main__":
    answer(__doc__, cases)
