"""The logit lens: what each layer would answer at every token if the model ended there.

Each layer's output goes through the final norm and the output matrix (nostalgebraist, "interpreting GPT: the logit lens",
2020). The demo model's early and middle layers answer with punctuation; what follows from grammar comes up in the last third
(" of" after "city"), what has to be known in the last two (" Paris"). `python -m nnsight_eager` shows one position as a table.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

import torch

from nnsight_eager import LanguageModel, plot
from nnsight_eager.examples.command import parser, run


@torch.no_grad()
def answers(model: LanguageModel, prompt: str) -> torch.Tensor:
    """What each layer would answer at each position, as logits `[layer, position, vocabulary]`."""
    with model.trace(prompt):
        logits = [model.lm_head(model.model.norm(layer.hidden))[0] for layer in model.model.layers]
    return torch.stack(logits)


def experiment(model: LanguageModel, options: Namespace) -> plot.Plot:
    """The heat map of all layers and positions, with the tokens written in it."""
    logits, decode = answers(model, options.prompt), model.tokenizer.decode
    ids = logits[:, -1].argmax(-1)
    first = next(layer for layer in range(len(ids)) if (ids[layer:] == ids[-1]).all())
    print(f"{decode(ids[-1])!r} is the likeliest token at the last position from layer {first} on.")
    return plot.logit_lens(logits, plot.tokens(model, options.prompt), decode)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment as a command."""
    options = parser("logit_lens", __doc__ or "")
    options.add_argument("--prompt", default="The Eiffel Tower is in the city of", help="the text (default: %(default)s)")
    return run(experiment, options, arguments)


if __name__ == "__main__":
    sys.exit(main())
