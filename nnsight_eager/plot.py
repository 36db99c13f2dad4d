"""Figures of what was read: `pip install 'nnsight_eager[plot]'` brings matplotlib.

from nnsight_eager import plot

tokens = plot.tokens(model, "The Eiffel Tower is in the city of")
plot.logit_lens(logits, tokens, model.tokenizer.decode).save("lens.png")
plot.attention(model.transformer.h[5].attn.pattern, tokens)      # in a notebook, the last line of a cell is shown
plot.patching(recovered, tokens).figure.axes[0].set_title("…")   # what it is made of is matplotlib's
"""

import io
import warnings
from collections.abc import Callable, Sequence
from math import ceil
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Final

import torch

from .errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .language import LanguageModel

LABELS: Final = 60
"""How many tokens can be read along an axis; of more, every second or third is written."""

WRITTEN: Final = 10
"""How many signs of a token are written into a field."""

PANELS: Final = 4
"""How many heads stand beside each other."""


class Plot:
    """A figure: a notebook shows it, `save` writes it, and `figure` is matplotlib's, to go on with."""

    def __init__(self, figure: "Figure") -> None:
        self.figure = figure

    def save(self, path: str | PathLike[str], dpi: int = 100) -> None:
        """Write the figure: a `.png`, or whatever else matplotlib can write, such as `.svg` and `.pdf`."""
        _write(self.figure, fspath(path), dpi)

    def _repr_png_(self) -> bytes:
        written = io.BytesIO()
        _write(self.figure, written, 100)
        return written.getvalue()

    def __repr__(self) -> str:
        titles = [text for each in self.figure.axes if (text := each.get_title())]
        return f"<Plot {', '.join(titles[:1])!r}: `.save(path)` writes it, `.figure` is matplotlib's>"


def logit_lens(logits: torch.Tensor, tokens: Sequence[str], decode: Callable[[int], str], title: str = "") -> Plot:
    """The likeliest token of each layer at each position, its probability as the colour.

        with torch.no_grad(), model.trace(prompt):
            layers = [model.lm_head(model.transformer.ln_f(layer.hidden))[0] for layer in model.transformer.h]
        plot.logit_lens(torch.stack(layers), plot.tokens(model, prompt), model.tokenizer.decode).save("lens.png")

    `logits` are `[layer, position, vocabulary]`. The first layer is at the bottom.
    """
    _check(logits, "logits", "[layer, position, vocabulary]", {1: len(tokens)})
    best = logits.detach().float().softmax(-1).max(-1)
    size = 2 + 0.8 * len(tokens), 1.5 + 0.2 * len(logits)
    plot, axes = empty(title or "The likeliest next token, read from the output of each layer", POSITION, "layer", size)
    heat_map(axes, best.values, tokens, "probability of the token", cmap="Blues", vmin=0, vmax=1)
    for layer, (ids, probabilities) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
        for position, (token, probability) in enumerate(zip(ids, probabilities, strict=True)):
            colour = "white" if probability > 0.6 else "black"
            text = shown(decode(token))[:WRITTEN]
            axes.text(
                position, layer, text, ha="center", va="center", fontsize=8.5, color=colour, parse_math=False, clip_on=True
            )
    return plot


def attention(pattern: torch.Tensor, tokens: Sequence[str], heads: Sequence[int] | None = None, title: str = "") -> Plot:
    """How much each token attends to each, a panel for each head: rows are queries, columns keys.

        with model.trace(prompt):
            pattern = model.transformer.h[5].attn.pattern
        plot.attention(pattern, plot.tokens(model, prompt), heads=[0, 1]).save("attention.png")

    `pattern` is `[head, query, key]`, or `[1, head, query, key]` as `.pattern` gives it for one prompt. One scale of colours,
    from 0 to 1, holds for all heads.
    """
    if pattern.dim() == 4 and len(pattern) == 1:
        pattern = pattern[0]
    _check(pattern, "pattern", "[head, query, key] of one prompt", {1: len(tokens), 2: len(tokens)})
    chosen = range(len(pattern)) if heads is None else heads
    if not chosen or not all(0 <= head < len(pattern) for head in chosen):
        raise InputError(f"`heads={heads}` are not heads of the pattern.", f"It has {len(pattern)}: 0 to {len(pattern) - 1}.")
    across = min(PANELS, len(chosen))
    down, side = ceil(len(chosen) / across), 1.2 + min(len(tokens), LABELS) * 0.16
    figure = _figure(1.6 + side * across, 1.2 + side * down)
    every = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, head in zip(every, chosen, strict=False):
        image = axes.imshow(_numbers(pattern[head]), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"head {head}", fontsize=10)
    for axes in every[len(chosen) :]:
        axes.set_visible(False)
    for number, axes in enumerate(every[: len(chosen)]):
        _label(axes, tokens, "x")
        _label(axes, tokens, "y")
        lowest, first = number + across >= len(chosen), number % across == 0  # of its column, of its row
        axes.tick_params(bottom=lowest, labelbottom=lowest, left=first, labelleft=first)
    figure.suptitle(title or "Attention pattern", fontsize=11)
    figure.supxlabel("key", fontsize=10)
    figure.supylabel("query", fontsize=10)
    figure.colorbar(image, ax=list(every), label="attention", shrink=0.8)
    return Plot(figure)


def patching(
    recovered: torch.Tensor,
    tokens: Sequence[str],
    title: str = "",
    label: str = "recovered logit difference (0: corrupt, 1: clean)",
) -> Plot:
    """What a patch at each layer and position recovers: white is nothing, blue all of it, red less than nothing.

        plot.patching(recovered, plot.tokens(model, prompt)).save("patching.png")

    `recovered` is `[layer, position]`, and the first layer is at the bottom.
    """
    _check(recovered, "recovered", "[layer, position]", {1: len(tokens)})
    size = max(4.0, 2 + 0.43 * len(tokens)), max(2.5, 2 + 0.1 * len(recovered))
    plot, axes = empty(title or "What a patch recovers", POSITION, "layer", size)
    low, high = (each.item() for each in recovered.detach().float().aminmax())
    if low < -0.1 * max(1.0, high):
        most = max(1.0, high, -low)
        heat_map(axes, recovered, tokens, label, cmap="RdBu", vmin=-most, vmax=most)
    else:
        heat_map(axes, recovered, tokens, label, cmap="Blues", vmin=min(0.0, low), vmax=max(1.0, high))
    return plot


def tokens(model: "LanguageModel", prompt: str) -> list[str]:
    """The tokens of a prompt, as they stand along an axis."""
    return [str(model.tokenizer.decode([token])) for token in model.tokenizer(prompt).input_ids]


# What figures are made of

POSITION: Final = "position (tokens of the prompt)"


def empty(title: str, across: str, up: str, size: tuple[float, float]) -> "tuple[Plot, Axes]":
    """An empty plot with its title and the names of its axes, and what to draw into; `size` is in inches."""
    figure = _figure(*size)
    made = figure.add_subplot()
    made.set_title(title, fontsize=11)
    made.set_xlabel(across)
    made.set_ylabel(up)
    made.spines[["top", "right"]].set_visible(False)
    return Plot(figure), made


def heat_map(axes: "Axes", values: torch.Tensor, tokens: Sequence[str], label: str, **colours: Any) -> None:
    """Values `[layer, position]`, the first layer at the bottom, above the tokens of the prompt; `label` names the colour."""
    image = axes.imshow(_numbers(values), origin="lower", aspect="auto", **colours)
    _label(axes, tokens, "x")
    axes.set_yticks(range(len(values) - 1, -1, -1 - len(values) // 16))
    axes.figure.colorbar(image, ax=axes, label=label)


def shown(token: str) -> str:
    """A token as text of a figure: without the space it begins with, control characters spelled out."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in token.removeprefix(" ")) or "␣"


def _label(axes: "Axes", tokens: Sequence[str], side: str) -> None:
    """Write the tokens along an axis."""
    places = range(0, len(tokens), 1 + (len(tokens) - 1) // LABELS)
    texts = [shown(tokens[place]) for place in places]
    if side == "x":
        axes.set_xticks(places, texts, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    else:
        axes.set_yticks(places, texts, parse_math=False)


def _numbers(values: torch.Tensor) -> Any:
    return values.detach().float().cpu().numpy()


def _check(values: torch.Tensor, name: str, form: str, sizes: dict[int, int]) -> None:
    """Refuse what is not of the form that a figure shows."""
    if values.dim() != form.count(",") + 1 or any(values.shape[place] != size for place, size in sizes.items()):
        count = next(iter(sizes.values()))
        raise InputError(
            f"`{name}` is {list(values.shape)}, and there are {count} tokens.",
            f"Give `{form}`, with the tokens of its positions.",
        )


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        sentence = "Figures need the package `matplotlib`.\nRun `pip install 'nnsight_eager[plot]'`."
        raise ModuleNotFoundError(sentence, name=error.name) from None
    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: "Figure", file: Any, dpi: int) -> None:
    """A sign that the font has not is a box in the figure, and no warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, dpi=dpi)
