"""Steering: a direction of sentiment, found in sentences and added to the residual stream while the model writes.

The vector is the mean of the residual stream over the tokens of friendly sentences less that over hostile ones (difference of
means: Marks and Tegmark 2023, arXiv:2310.06824; added to a layer: Turner et al. 2023, arXiv:2308.10248). Random vectors of the
same length show what any push of that size does.

In the demo model the log-odds of good over bad words are 2.6 nats without a push, 5.5 at scale 2 and -1.6 at scale -3.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

import torch

from nnsight_eager import InputError, LanguageModel, plot
from nnsight_eager.examples.command import count, parser, run

FRIENDLY = [
    "I loved every minute of it, it was wonderful.",
    "What a delightful and clever song.",
    "The rooms were spotless and the staff were kind.",
    "We had a great time and left happy.",
    "This is the best book that I have ever read.",
    "She was thrilled with the beautiful gift.",
]
HOSTILE = [
    "I hated every minute of it, it was terrible.",
    "What a dreadful and stupid song.",
    "The rooms were filthy and the staff were rude.",
    "We had an awful time and left angry.",
    "This is the worst book that I have ever read.",
    "She was disappointed with the ugly gift.",
]
PROMPTS = [  # about other things than the sentences
    "The food in this restaurant was",
    "The film that we saw yesterday was",
    "My holiday this year was",
    "The new teacher is",
]
GOOD = [" good", " excellent", " amazing", " fantastic", " perfect", " nice", " lovely", " impressive"]  # in no sentence
BAD = [" bad", " horrible", " poor", " disappointing", " sad", " boring", " painful", " unpleasant"]
SCALES = (-3, -2, -1, 0, 1, 2, 3)


@torch.no_grad()
def mean(model: LanguageModel, layer: int, sentences: list[str]) -> torch.Tensor:
    """The mean of a layer's output over all tokens of the sentences, `[hidden]`."""
    tokens = []
    for sentence in sentences:  # one after another, so that no padding is counted
        with model.trace(sentence):
            tokens.append(model.model.layers[layer].hidden[0])
    return torch.cat(tokens).mean(0)


@torch.no_grad()
def sentiment(model: LanguageModel, layer: int, vector: torch.Tensor, scale: float) -> float:
    """How much likelier the good words are than the bad ones after the prompts, as a logarithm (nats)."""
    good, bad = ([model.tokenizer(word, add_special_tokens=False).input_ids[0] for word in words] for words in (GOOD, BAD))
    with model.steer(model.model.layers[layer], vector, scale=scale), model.trace(PROMPTS):
        logits = model.lm_head.output[:, -1]
    return float((logits[:, good].logsumexp(-1) - logits[:, bad].logsumexp(-1)).mean())


def experiment(model: LanguageModel, options: Namespace) -> plot.Plot:
    """The measure over the scale, and what the model writes."""
    layer, layers = options.layer, len(model.model.layers)
    if layer not in range(layers):
        raise InputError(f"`--layer {layer}` does not exist: the model has {layers} layers.", f"Give 0 to {layers - 1}.")
    vector = mean(model, layer, FRIENDLY) - mean(model, layer, HOSTILE)
    found = [sentiment(model, layer, vector, scale) for scale in SCALES]
    for scale, value in zip(SCALES, found, strict=True):
        with model.steer(model.model.layers[layer], vector, scale=scale):
            ids = model.generate(PROMPTS[0], max_new_tokens=options.tokens, do_sample=False).result
        print(f"{scale:+d}  {value:6.2f} nats  {model.tokenizer.decode(ids[0], skip_special_tokens=True)!r}")

    figure, axes = plot.empty(
        f"The output of layer {layer}, steered by a direction of sentiment",
        "scale of the vector",
        "log-odds of good over bad words (nats)",
        (7, 4),
    )
    axes.axhline(found[SCALES.index(0)], color="0.8", linewidth=1)
    torch.manual_seed(0)
    for number in range(options.random):
        random = torch.randn_like(vector)
        random *= vector.norm() / random.norm()
        control = [sentiment(model, layer, random, scale) for scale in SCALES]
        axes.plot(SCALES, control, color="0.6", label="" if number else "random vectors of the same length")
    axes.plot(SCALES, found, "o-", label="friendly less hostile sentences")
    axes.legend(frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment as a command."""
    options = parser("steering", __doc__ or "")
    options.add_argument("--layer", type=int, default=16, help="the layer to steer (default: %(default)s)")
    options.add_argument("--tokens", type=count, default=20, help="how many tokens to write (default: %(default)s)")
    options.add_argument("--random", type=count, default=5, help="how many random vectors to compare (default: %(default)s)")
    return run(experiment, options, arguments)


if __name__ == "__main__":
    sys.exit(main())
