"""The logit lens: what each layer would answer at every token if the model ended there.

Each layer's output goes through the final norm and the output matrix (nostalgebraist, "interpreting GPT: the logit lens",
2020). The demo model's early and middle layers answer with punctuation; what follows from grammar comes up in the last third
(" of" after "city"), what has to be known in the last two (" Paris"). `python -m nnsight_eager` shows one position as a table.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from nnsight_eager import LanguageModel
from nnsight_eager.examples.command import parser, run
from nnsight_eager.examples.drawing import axes, heat_map, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def answers(model: LanguageModel, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest token of each layer and position and its probability, both `[layer, position]`."""
    with model.trace(prompt):
        logits = torch.stack([model.lm_head(model.model.norm(layer.hidden))[0] for layer in model.model.layers])
    best = logits.softmax(-1).max(-1)
    return best.indices, best.values


def experiment(model: LanguageModel, options: Namespace) -> "Figure":
    """The heat map of all layers and positions, with the tokens written in it."""
    decode = model.tokenizer.decode
    ids, probabilities = answers(model, options.prompt)
    final = ids[-1, -1]
    first = next(layer for layer in range(len(ids)) if (ids[layer:, -1] == final).all())
    print(f"{decode(final)!r} is the likeliest token at the last position from layer {first} on.")

    tokens = [decode(token) for token in model.tokenizer(options.prompt).input_ids]
    title = "The likeliest next token, read from the output of each layer"
    figure, plot = axes(title, "position (tokens of the prompt)", "layer", (2 + 0.8 * len(tokens), 1.5 + 0.2 * len(ids)))
    heat_map(plot, probabilities, tokens, "probability of the token", cmap="Blues", vmin=0, vmax=1)
    for (layer, position), token in zip(
        torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist(), ids.flatten(), strict=True
    ):
        colour = "white" if probabilities[layer, position] > 0.6 else "black"
        text = shown(decode(token))[:10]
        plot.text(position, layer, text, ha="center", va="center", fontsize=8.5, color=colour, parse_math=False, clip_on=True)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment as a command."""
    options = parser("logit_lens", __doc__ or "")
    options.add_argument("--prompt", default="The Eiffel Tower is in the city of", help="the text (default: %(default)s)")
    return run(experiment, options, arguments)


if __name__ == "__main__":
    sys.exit(main())
