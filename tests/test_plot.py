"""Figures: what is drawn is what was given, whatever the tokens are, and they need neither a window nor pyplot."""

import subprocess
import sys

import pytest
import torch
from small_models import FOLDER

from nnsight_eager import InputError, plot

TOKENS = ["When", " Mary", "\n", " $x$", " <b>", "日"]


def colours(axes):
    """The numbers behind the colours of a panel."""
    return torch.tensor(axes.images[0].get_array())


def labels(axis):
    return [each.get_text() for each in axis.get_ticklabels()]


def words(axes):
    return {(round(x), round(y)): each.get_text() for each in axes.texts for x, y in [each.get_position()]}


def test_a_logit_lens_shows_the_likeliest_token_and_its_probability():
    logits = torch.randn(3, len(TOKENS), 7, requires_grad=True)
    (axes, bar) = plot.logit_lens(logits, TOKENS, lambda token: f" <{token}>").figure.axes
    probabilities = torch.softmax(logits.detach(), -1)
    torch.testing.assert_close(colours(axes), probabilities.amax(-1))
    best = probabilities.argmax(-1)
    assert words(axes) == {(x, y): f"<{best[y, x]}>" for x in range(len(TOKENS)) for y in range(3)}
    assert labels(axes.xaxis) == ["When", "Mary", "\\n", "$x$", "<b>", "日"]
    assert bar.get_ylabel() == "probability of the token"
    assert axes.get_ylim()[0] < axes.get_ylim()[1]  # the first layer is at the bottom


def test_an_attention_pattern_has_a_panel_for_each_head_and_tokens_on_both_axes(gpt2):
    prompt = "The Eiffel Tower"
    with gpt2.trace(prompt):
        pattern = gpt2.transformer.h[1].attn.pattern
    tokens = plot.tokens(gpt2, prompt)
    assert "".join(tokens) == prompt
    *panels, _ = plot.attention(pattern, tokens).figure.axes
    assert [each.get_title() for each in panels] == ["head 0", "head 1", "head 2", "head 3"]
    for head, axes in enumerate(panels):
        torch.testing.assert_close(colours(axes), pattern[0, head].detach())
        assert labels(axes.xaxis) == [plot.shown(each) for each in tokens]
        assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first query is at the top
        assert axes.images[0].get_clim() == (0, 1)
    assert labels(panels[0].yaxis) == [plot.shown(each) for each in tokens]
    assert labels(panels[1].yaxis) == []  # it stands beside


def test_heads_can_be_chosen_and_stand_in_rows_of_four():
    pattern = torch.rand(9, len(TOKENS), len(TOKENS))
    drawn = plot.attention(pattern, TOKENS, heads=[8, 2, 3, 4, 5])
    panels = [each for each in drawn.figure.axes if each.get_title()]
    assert [each.get_title() for each in panels] == ["head 8", "head 2", "head 3", "head 4", "head 5"]
    torch.testing.assert_close(colours(panels[0]), pattern[8])
    drawn._repr_png_()
    assert [bool(labels(each.xaxis)) for each in panels] == [False, True, True, True, True]  # the lowest of each column


@pytest.mark.parametrize(
    ("lowest", "colour", "limits"), [(0.0, "Blues", (0, 1)), (-0.05, "Blues", (-0.05, 1)), (-0.5, "RdBu", (-1, 1))]
)
def test_a_patching_grid_has_another_colour_for_what_makes_it_worse(lowest, colour, limits):
    recovered = torch.rand(4, len(TOKENS))
    recovered[1, 2] = lowest
    axes = plot.patching(recovered, TOKENS).figure.axes[0]
    torch.testing.assert_close(colours(axes), recovered)
    assert axes.images[0].get_cmap().name == colour
    assert axes.images[0].get_clim() == pytest.approx(limits)


def test_a_figure_is_saved_by_one_call_and_shown_in_a_notebook(tmp_path, shell):
    figure = plot.patching(torch.rand(4, len(TOKENS)), TOKENS, title="Patched")
    figure.save(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    figure.save(tmp_path / "grid.svg")
    assert "<svg" in (tmp_path / "grid.svg").read_text()
    data, _ = shell.display_formatter.format(figure)
    assert data["image/png"].startswith(b"\x89PNG")
    assert data["text/plain"] == "<Plot 'Patched': `.save(path)` writes it, `.figure` is matplotlib's>"


def test_labels_of_long_prompts_are_thinned_out():
    axes = plot.patching(torch.rand(4, 200), [f" {number}" for number in range(200)]).figure.axes[0]
    assert labels(axes.xaxis) == [str(number) for number in range(0, 200, 4)]


def test_a_token_is_shown_without_its_space_and_control_characters_spelled_out():
    assert [plot.shown(token) for token in (" Paris", "\n", " ", "é")] == ["Paris", "\\n", "␣", "é"]


@pytest.mark.parametrize(
    ("draw", "sentence"),
    [
        (lambda: plot.patching(torch.rand(4, 3), TOKENS), "`recovered` is [4, 3], and there are 6 tokens."),
        (lambda: plot.attention(torch.rand(2, 4, 6, 6), TOKENS), "`pattern` is [2, 4, 6, 6], and there are 6 tokens."),
        (lambda: plot.attention(torch.rand(4, 6, 6), TOKENS, heads=[4]), "`heads=[4]` are not heads of the pattern."),
        (lambda: plot.logit_lens(torch.rand(6, 9), TOKENS, str), "`logits` is [6, 9], and there are 6 tokens."),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(draw, sentence):
    with pytest.raises(InputError) as caught:
        draw()
    assert str(caught.value).splitlines()[0] == sentence


def test_without_matplotlib_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        plot.patching(torch.rand(1, 1), ["a"])
    assert str(caught.value) == "Figures need the package `matplotlib`.\nRun `pip install 'nnsight_eager[plot]'`."


def test_pyplot_is_not_needed():
    code = (
        "import sys, torch; from nnsight_eager import plot; assert 'matplotlib' not in sys.modules\n"
        "plot.patching(torch.rand(2, 1), ['a'])._repr_png_(); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=FOLDER, check=True, timeout=120)
