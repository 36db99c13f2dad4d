"""Attribution patching: all patches at once from one backward pass, and how far that can be trusted.

To first order a patch changes the corrupt run by (clean - corrupt) · gradient, summed over the hidden dimension: two forward
passes and one backward pass estimate every layer and position (Nanda 2023, "Attribution Patching"; Syed et al. 2023,
arXiv:2310.10348). The scatter plot has each estimate beside the patch itself, for the residual stream and for what the
attention and the MLP of each layer add to it.

In the demo model the estimates are good for attention (correlation 0.93) and for the last position. They are far too low for
the residual stream at the subject and for the first MLP there (correlations 0.59 and 0.48): a patch of the whole token goes
further than the gradient sees, as Nanda found.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

import torch

from nnsight_eager import Envoy, LanguageModel, plot
from nnsight_eager.examples.activation_patching import recovered
from nnsight_eager.examples.command import count, parser, run
from nnsight_eager.examples.indirect_objects import Prompts, prompts

PARTS: dict[str, Callable[[Envoy], Envoy]] = {
    "residual stream": lambda layer: layer,
    "attention": lambda layer: layer.self_attn,
    "MLP": lambda layer: layer.mlp,
}


def estimated(model: LanguageModel, given: Prompts, part: Callable[[Envoy], Envoy]) -> torch.Tensor:
    """What each patch is expected to recover of the preference for the right name, `[layer, position]`."""
    parts = [part(layer) for layer in model.model.layers]
    with torch.no_grad(), model.trace(given.clean):
        clean = [each.hidden for each in parts]
        best = given.preference(model.lm_head.output)

    with model.trace(given.corrupt) as tracer:
        corrupt = [each.hidden for each in parts]
        worst = given.preference(model.lm_head.output)
        with tracer.backward(worst):
            gradients = [each.output_grad for each in reversed(parts)][::-1]  # gradients come last layer first

    effects = [((a - b) * gradient).sum((0, 2)) for a, b, gradient in zip(clean, corrupt, gradients, strict=True)]
    return (torch.stack(effects) / (best - worst)).detach()


def experiment(model: LanguageModel, options: Namespace) -> plot.Plot:
    """The scatter plot of estimates and patches, a point for each layer and position."""
    given = prompts(model, options.scenes)
    figure, axes = plot.empty(
        "Attribution patching beside activation patching",
        "recovered logit difference, estimated from the gradient",
        "recovered logit difference, by the patch",
        (6, 5),
    )
    for name, part in PARTS.items():
        # Before the subject nothing differs, and both are exactly 0.
        guess = estimated(model, given, part)[:, given.subject :].flatten()
        patch = recovered(model, given, part)[:, given.subject :].flatten()
        correlation = torch.corrcoef(torch.stack((guess, patch)))[0, 1]
        axes.scatter(guess, patch, s=14, alpha=0.7, label=f"{name} (r = {correlation:.2f})")

        off = int((guess - patch).abs().argmax())
        layer, position = divmod(off, len(given.tokens) - given.subject)
        token = given.tokens[given.subject + position]
        print(f"{name}: correlation {correlation:.3f} over {len(guess)} patches")
        print(f"  furthest off at layer {layer}, {token!r}: estimated {guess[off]:.2f}, recovered {patch[off]:.2f}")
    axes.axline((0, 0), slope=1, color="0.7", linewidth=1, zorder=0)
    axes.legend(frameon=False, loc="lower right")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment as a command."""
    options = parser("attribution_patching", __doc__ or "")
    options.add_argument("--scenes", type=count, default=4, help="how many pairs of names, of 8 (default: %(default)s)")
    return run(experiment, options, arguments)


if __name__ == "__main__":
    sys.exit(main())
