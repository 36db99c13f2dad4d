"""Activation patching: where in the residual stream the model keeps which name to say.

A prompt and its corrupt twin differ in one token, the subject (S2), and so in the answer. The residual stream of the clean run
is put into the corrupt run at one layer and one position, and what that recovers of the clean run's preference for the right
name is measured: 0 is nothing, 1 all of it (Meng et al. 2022, arXiv:2202.05262; Wang et al. 2022, arXiv:2211.00593).

It is as the literature has it. In the demo model of 30 layers a patch at the subject recovers all of it in the early layers and
more than half up to layer 21; one at the last position nothing in the early layers, and more than half from layer 23 on.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

import torch

from nnsight_eager import Envoy, LanguageModel, plot
from nnsight_eager.examples.command import count, parser, run
from nnsight_eager.examples.indirect_objects import Prompts, prompts


@torch.no_grad()
def recovered(model: LanguageModel, given: Prompts, part: Callable[[Envoy], Envoy] = lambda layer: layer) -> torch.Tensor:
    """The part of the preference that a patch recovers, `[layer, position]`; `part` chooses what of a layer is patched.

    Nothing differs at the positions before the subject, and they are left at 0.
    """
    parts = [part(layer) for layer in model.model.layers]
    with model.trace(given.clean):
        clean = [each.hidden for each in parts]
        best = given.preference(model.lm_head.output)
    with model.trace(given.corrupt):
        worst = given.preference(model.lm_head.output)

    preferences = torch.full((len(parts), len(given.tokens)), worst.item())
    for layer, patched in enumerate(parts):
        with model.trace(logits_to_keep=1) as tracer:  # one forward pass, in which each position has rows of its own
            for position in range(given.subject, len(given.tokens)):
                with tracer.invoke(given.corrupt):
                    patched.hidden[:, position] = clean[layer][:, position]
                    preferences[layer, position] = given.preference(model.lm_head.output)
    return (preferences - worst) / (best - worst)


def experiment(model: LanguageModel, options: Namespace) -> plot.Plot:
    """The heat map of all layers and positions."""
    given = prompts(model, options.scenes)
    found = recovered(model, given)
    print(f"{len(given.clean)} prompts; patching recovers, of the preference for the right name:")
    for position in (given.subject, -1):
        crossed = [layer for layer, value in enumerate(found[:, position].tolist()) if value > 0.5]
        print(f"  at {given.tokens[position]!r}: most of it in layers {crossed}, at most {found[:, position].max():.3f}")

    labels = [*given.tokens]
    labels[given.subject] += " (S2)"
    title = f"One position of the residual stream, put from the clean into the corrupt run ({len(given.clean)} prompts)"
    return plot.patching(found, labels, title)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment as a command."""
    options = parser("activation_patching", __doc__ or "")
    options.add_argument("--scenes", type=count, default=8, help="how many pairs of names, of 8 (default: %(default)s)")
    return run(experiment, options, arguments)


if __name__ == "__main__":
    sys.exit(main())
