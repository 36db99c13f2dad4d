"""A run held across the cells of a notebook, through a real kernel, and its displays in a real browser."""

import base64
import re

import pytest
import torch
from notebook import BROWSER, in_browser, kernel, page_of

PROMPT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module")
def notebook(folder, tmp_path_factory):
    with kernel(tmp_path_factory.mktemp("kernel")) as started:
        started.run(
            "import torch\n"
            "from nnsight_eager import LanguageModel, NNsight, has_nan, plot, summary\n"
            f"model = LanguageModel({str(folder('gpt2'))!r}, dispatch=True)\n"
            f"PROMPT = {PROMPT!r}\n"
            "%load_ext nnsight_eager"
        )
        yield started


@pytest.fixture
def held(notebook):
    """The kernel with a run in it, held at the MLP of the second layer."""
    notebook.run("run = model.trace(PROMPT).start()")
    notebook.run("run.to(model.transformer.h[1].mlp)")
    yield notebook
    notebook.run("run.close()")


def test_a_run_is_started_in_one_cell_read_and_edited_in_the_next(held, gpt2):
    assert held.run("model.transformer.h[1].mlp.output.shape").text == "torch.Size([1, 14, 32])"
    held.run("model.transformer.h[1].mlp.output[:, -1] = 0")
    assert re.search(r"^model\.transformer\.h\[1\]\.mlp\.output +0 +\d", held.run("run.edits").text, re.MULTILINE)
    found = held.run("print(run.finish().logits[0, -1].tolist())").printed

    gpt2.dispatch()
    module = gpt2._module

    def zero(_, args, output):
        output[:, -1] = 0

    handle = module.transformer.h[1].mlp.register_forward_hook(zero)
    with torch.no_grad():
        logits = module(**gpt2.tokenizer(PROMPT, return_tensors="pt")).logits
    handle.remove()
    torch.testing.assert_close(torch.tensor(eval(found)), logits[0, -1], atol=1e-4, rtol=1e-4)


def test_a_nan_is_found_where_it_comes_up_and_one_can_go_back_and_finish(notebook):
    notebook.run(
        "inner = model._module.transformer.h[1].attn.c_proj\n"
        "spoil = lambda module, args, output: output.masked_fill(output == output.max(), torch.nan)\n"
        "handle = inner.register_forward_hook(spoil)"
    )
    notebook.run("run = model.trace(PROMPT).start()")
    found = notebook.run("run.until(has_nan)").text
    assert found.splitlines()[0] == "paused at model.transformer.h[1].attn.c_proj.output (Conv1D), step 0"
    assert "  1 NaN  " in found
    assert notebook.run("run.back_to(model.transformer.h[0])").text.startswith("paused at model.transformer.h[0].output ")
    assert notebook.run("bool(has_nan(model.transformer.h[0].output))").text == "False"
    notebook.run("handle.remove()")
    assert notebook.run("run.finish().logits.isnan().any()").text == "tensor(False)"


def test_each_call_is_a_magic(notebook):
    assert notebook.run("%trace model PROMPT").text.startswith("paused at model.input ")
    assert notebook.run("%step 2").text.startswith("paused at model.transformer.wte.input ")
    assert notebook.run("%to transformer.h.1.mlp input").text.startswith("paused at model.transformer.h[1].mlp.input ")
    assert notebook.run("%over").text.startswith("paused at model.transformer.h[1].mlp.output ")
    notebook.run("model.transformer.h[1].mlp.output *= 2")
    assert notebook.run("%out").text.startswith("paused at model.transformer.h[1].output ")
    assert "model.transformer.h[1].mlp.output" in notebook.run("%edits").html
    assert "paused at model.transformer.h[1].output" in notebook.run("%where").html
    assert notebook.run("%back transformer.h.0").text.startswith("paused at model.transformer.h[0].output ")
    assert notebook.run("%until lambda value: value.shape[-1] == 128").text.splitlines()[0] == (
        "paused at model.transformer.h[1].mlp.c_fc.output (Conv1D), step 0"
    )
    assert "transformer.h.1.mlp" in notebook.complete("%to transformer.h.1.m")
    assert notebook.run("%finish").text == "forward of GPT2LMHeadModel: finished"
    cell = "%%trace model PROMPT\nhidden = model.transformer.h[1].hidden\nhidden.shape"
    assert notebook.run(cell).error == ""
    assert notebook.run("hidden.shape").text == "torch.Size([1, 14, 32])"
    assert "No run is held" not in notebook.try_("%where").error


@pytest.mark.parametrize(
    "shown",
    [
        "model",
        "model.transformer.h[1]",
        "run",
        "run.where()",
        "run.edits",
        "run.locals()",
        "run.model",
        "summary(model.output)",
    ],
)
def test_a_display_has_both_forms_and_leaves_the_run_where_it_is(held, shown):
    if shown == "summary(model.output)":
        shown = "summary(run.locals())"  # reading `model.output` would go on to it
    before = held.run("run").text
    bundle = held.run(shown).shown[-1]
    assert set(bundle) == {"text/plain", "text/html"}
    assert held.run("run").text == before


def test_tab_and_shift_tab_leave_the_run_where_it_is(held):
    before = held.run("run").text
    assert any(each.endswith("output") for each in held.complete("model.transformer.h[2]."))
    held.inspect("model.transformer.h[2]")
    held.inspect("model.transformer.h[2].output")
    assert held.run("run").text == before


def test_a_figure_is_shown_as_the_value_of_a_cell(notebook):
    notebook.run("with model.trace(PROMPT):\n    pattern = model.transformer.h[1].attn.pattern")
    bundle = notebook.run("plot.attention(pattern, plot.tokens(model, PROMPT))").shown[-1]
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")


# In a browser

AMBER = (255, 231, 178), (88, 63, 12)
"""The colour behind the paused place, on white and on black."""

needs_a_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here: `apt-get install chromium`")


def bands(picture, colour):
    """The stripes of a colour in a picture: how high each is, how wide, and how much of it is something else: text."""
    same = (picture - torch.tensor(colour)).abs().amax(-1) <= 2
    rows = same.sum(-1)
    stripes, row = [], 0
    while row < len(rows):
        end = row
        while end < len(rows) and rows[end] > 100:
            end += 1
        if end > row:
            box = same[row:end]
            across = box.any(0).nonzero().flatten()
            stripes.append((end - row, int(across[-1] - across[0]), 1 - box[:, across[0] : across[-1]].float().mean().item()))
        row = end + 1
    return stripes


def screenshot(page, path):
    """The page as a picture, `[row, column, colour]`."""
    from PIL import Image

    in_browser(page, f"--screenshot={path}", "--window-size=1700,1600")
    with Image.open(path) as image:
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        return pixels.reshape(image.height, image.width, 3).int()


@needs_a_browser
def test_the_tree_and_the_paused_place_are_seen_in_a_browser(held, tmp_path):
    tree, run, where = (held.run(each).html for each in ("model", "run", "run.where()"))
    paused = screenshot(page_of(tree, run, where), tmp_path / "paused.png")
    for colour in AMBER:  # the module in the tree, the source line and the module in `where`
        found = bands(paused, colour)
        assert len(found) == 3
        for height, width, text in found:
            assert 12 < height < 30
            assert width > 300
            assert 0.01 < text < 0.5

    dom = in_browser(page_of(tree, run, where), "--dump-dom")
    seen = re.sub(r"<[^>]*>", " ", dom)
    assert "paused at model.transformer.h[1].mlp.output (GPT2MLP), step 0" in seen
    assert len(re.findall(r"● mlp\s+GPT2MLP\s+\[1, 14, 32\] float32", seen)) == 4  # in two trees, on white and on black
    assert re.search(r"✓ 0\s+GPT2Block\s+\[1, 14, 32\] float32", seen)

    held.run("run.finish()")
    finished = screenshot(page_of(held.run("model").html), tmp_path / "finished.png")
    assert bands(finished, AMBER[0]) == bands(finished, AMBER[1]) == []


@needs_a_browser
def test_what_a_module_or_a_prompt_is_called_does_not_run_in_a_browser(notebook):
    evil = "<script>document['title']='owned'</script><img src=x onerror=\"document['title']='owned'\">"
    notebook.run(
        f"evil = {evil!r}\n"
        "class Evil(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.add_module(evil, torch.nn.Linear(2, 2))\n"
        "    def forward(self, x, prompt=evil):\n"
        "        return self._modules[evil](x)\n"
        "evil_model = NNsight(Evil())\n"
        "run = evil_model.trace(torch.ones(1, 2)).start()\n"
        "_ = run.to(evil_model[evil])\n"
        "evil_model[evil].output *= 2"
    )
    cells = (
        "evil_model",
        "run",
        "run.where()",
        "run.edits",
        "run.locals()",
        "evil_model.map(torch.ones(1, 2))",
        "summary({evil: evil})",
    )
    page = page_of(*(notebook.run(each).html for each in cells))
    dom = in_browser(page, "--dump-dom")
    notebook.run("run.close()")
    assert "<title>as it was</title>" in dom
    assert "&lt;script&gt;document[" in dom
    assert "<title>owned</title>" in in_browser(page + evil, "--dump-dom")  # as it would be otherwise
