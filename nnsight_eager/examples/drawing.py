"""How the figures look."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def axes(title: str, across: str, up: str, size: tuple[float, float]) -> "tuple[Figure, Axes]":
    """One empty plot with its title and the names of its axes; `size` is in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    plot = figure.add_subplot()
    plot.set_title(title, fontsize=11)
    plot.set_xlabel(across)
    plot.set_ylabel(up)
    plot.spines[["top", "right"]].set_visible(False)
    return figure, plot


def heat_map(plot: "Axes", values: torch.Tensor, tokens: Sequence[str], label: str, **colours: Any) -> None:
    """Values `[layer, position]`, the first layer at the bottom, above the tokens of the prompt; `label` names the colour."""
    image = plot.imshow(values.numpy(), origin="lower", aspect="auto", **colours)
    plot.set_xticks(range(len(tokens)), [shown(token) for token in tokens], rotation=45, ha="right", parse_math=False)
    plot.set_yticks(range(len(values) - 1, -1, -1 - len(values) // 16))
    plot.figure.colorbar(image, ax=plot, label=label)


def shown(token: str) -> str:
    """A token as text of a figure: without the space it begins with, control characters spelled out."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in token.removeprefix(" ")) or "␣"
