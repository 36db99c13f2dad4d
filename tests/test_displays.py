"""What is shown: alike as text and as HTML, whatever it is called, and without going on with the run."""

import html
import io
import re
import threading

import pytest
import torch
from small_models import X4, Stack

from nnsight_eager import NNsight, summary
from nnsight_eager.shown import Column, Grid, Line, Shown

HOSTILE = "<script>alert('&')</script>"


@pytest.fixture
def held(watched):
    """A run held in the second of three blocks, after an edit and one that changed nothing."""
    model, events = watched
    run = model.trace(X4).start()
    run.to("h.0.lin")
    model.h[0].lin.output *= 2
    run.to("h.0")
    model.h[0].output = model.h[0].output.clone()
    run.to("h.1.lin")
    yield model, run, events
    run.close()


def displays(model, run):
    """Everything that is shown of a model and a run, by name."""
    with torch.random.fork_rng():
        another = NNsight(Stack())
    return {
        "model": model,
        "layer": model.h[1],
        "run": run,
        "its model": run.model,
        "where": run.where(),
        "edits": run.edits,
        "locals": run.locals(),
        "cache": another.cache(X4, modules=["h.*", "head"]),
        "cached": another.cache(X4, modules=["h.*", "head"])["h.1"],
        "map": another.map(X4),
        "summary": summary(X4),
        "summary of several": summary({"one": X4, "other": (X4, 1)}),
    }


NAMES = [
    "model",
    "layer",
    "run",
    "its model",
    "where",
    "edits",
    "locals",
    "cache",
    "cached",
    "map",
    "summary",
    "summary of several",
]


def said(text):
    """The words of a display: without tags, without the lines and marks that its form adds."""
    return re.sub(r"[│├└─✓▶●…]+|\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", text))).split()


@pytest.fixture
def columns(monkeypatch):
    """Sets how wide the terminal is."""
    return lambda width: monkeypatch.setenv("COLUMNS", str(width))


def test_every_display_is_tested(held):
    model, run, _ = held
    assert [*displays(model, run)] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_display_says_in_html_what_it_says_as_text(held, name, columns):
    columns(1000)
    model, run, _ = held
    shown = displays(model, run)[name]
    assert said(shown._repr_html_()) == said(repr(shown))
    assert len(said(repr(shown))) > 3


@pytest.mark.parametrize("name", NAMES)
def test_a_display_leaves_the_run_where_it_is(held, shell, name):
    from rich.console import Console

    model, run, events = held
    at, before, random = run._run.at, list(events), torch.get_rng_state()
    versions = [each._version for each in (at.value, *model.parameters())]
    shown = displays(model, run)[name]
    repr(shown), str(shown), shown._repr_html_(), shell.display_formatter.format(shown)
    Console(file=io.StringIO()).print(shown)
    assert events == before
    assert run._run.at is at
    assert versions == [each._version for each in (at.value, *model.parameters())]
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [20, 40, 80, 160])
def test_no_line_is_wider_than_the_terminal(held, name, width, columns):
    columns(width)
    model, run, _ = held
    assert max(map(len, repr(displays(model, run)[name]).splitlines())) <= width


@pytest.mark.parametrize("name", NAMES)
def test_a_display_of_a_run_that_has_ended_is_one_still(held, name):
    model, run, _ = held
    run.finish()
    shown = displays(model, run)[name]
    assert "cannot be shown" not in repr(shown)
    assert shown._repr_html_()


# Where it is paused


def test_the_tree_shows_where_the_run_is_paused_what_has_run_and_the_last_shapes(held, columns):
    columns(80)
    model, run, _ = held
    expected = [
        "… model            Stack",
        "├── … h            ModuleList",
        "│   ├── ✓ 0        Block                                          [1, 4] float32",
        "│   │   └── ✓ lin  Linear(in_features=4, out_features=4, bias=T…  [1, 4] float32",
        "│   ├── … 1        Block",
        "│   │   └── ▶ lin  Linear(in_features=4, out_features=4, bias=T…  [1, 4] float32",
        "│   └──   2        Block",
        "│       └──   lin  Linear(in_features=4, out_features=4, bias=T…",
        "├──   head         Linear(in_features=4, out_features=4, bias=T…",
        "└──   unused       Linear(in_features=4, out_features=4, bias=T…",
    ]
    assert repr(model).splitlines() == repr(run.model).splitlines() == expected
    run.finish()
    assert repr(model).splitlines()[0] == "✓ model            Stack                                          [1, 4] float32"
    assert "▶" not in repr(model)


def test_what_has_run_is_told_of_the_step_that_a_generation_is_in():
    model = NNsight(Stack())
    run = model.trace(X4, fn="generate").start()
    marks = lambda: [repr(each)[0] for each in (model, model.h[0], model.head)]  # noqa: E731
    run.to("h.1")
    assert marks() == ["…", "✓", "h"]  # `head`, without a mark
    run.to(model)
    assert marks() == ["▶", "✓", "✓"]
    run.step()
    assert marks() == ["▶", "0", "h"]
    run.finish()
    assert marks() == ["✓", "✓", "✓"]


def test_where_opens_the_modules_in_which_the_run_is_and_no_others(held, columns):
    columns(80)
    _, run, _ = held
    assert repr(run.where()).splitlines()[-8:] == [
        "… model            Stack",
        "├── … h            ModuleList",
        "│   ├── ✓ 0        Block       [1, 4] float32",
        "│   ├── … 1        Block",
        "│   │   └── ▶ lin  Linear      [1, 4] float32",
        "│   └──   2        Block",
        "├──   head         Linear",
        "└──   unused       Linear",
    ]


def test_a_fork_shows_its_own_place(held):
    model, run, _ = held
    other = run.fork()
    other.to("head")
    paused = lambda shown: next(line for line in repr(shown).splitlines() if "▶" in line)  # noqa: E731
    assert "head" in paused(other.model)
    assert "lin" in paused(model)
    other.close()


def test_the_tree_shows_where_a_block_has_paused_the_model():
    model = NNsight(Stack())
    with model.trace(X4):
        model.h[1].lin.output
        (line,) = [line for line in repr(model).splitlines() if "▶" in line]
        assert line.startswith("│       └── ▶ lin") or "▶ lin" in line
    assert "▶" not in repr(model)


def test_many_modules_are_folded_in_a_notebook_but_for_those_in_which_the_run_is():
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.ModuleDict({name: torch.nn.ModuleDict({"deep": Stack()}) for name in "abcdefgh"})

        def forward(self, x):
            for each in self.inner.values():
                x = each["deep"](x)
            return x

    model = NNsight(Wide())
    opened = lambda: re.findall(r"<details open>.*?<span[^>]*>[^<]*?(\w+)</span>", model._repr_html_())  # noqa: E731
    assert opened() == ["model", "inner"]
    run = model.trace(X4).start().to("inner.c.deep.h.1.lin")
    assert opened() == ["model", "inner", "c", "deep", "h", "1"]
    run.close()


def test_a_closed_run_keeps_its_receipt_and_shows_where_it_was_left(held):
    _, run, _ = held
    run.step()
    run.model.h[1].output *= 2
    before = repr(run.edits)
    run.close()
    assert repr(run.edits) == before
    assert "model.h[1].output " in before
    assert repr(run) == "forward of Stack: closed"
    assert repr(run.locals()) == "no frame of the model is paused"
    assert "│   ├── … 1 " in repr(run.where())


def test_the_model_can_be_shown_from_within_its_forward_and_from_another_thread(watched, held):
    model, run, _ = held
    shown = []

    def show(*_):
        shown.extend([*map(repr, (model, run, run.where(), run.edits)), run._repr_html_(), model._repr_html_()])

    handle = model.h[2].register_forward_hook(show)
    run.until(lambda tensor: show())
    handle.remove()
    thread = threading.Thread(target=show)
    thread.start()
    thread.join()
    assert len(shown) > 6
    assert not any(each is None or "cannot be shown" in each for each in shown)


def test_colours_are_for_terminals_that_have_them(held):
    from rich.console import Console

    model, _, _ = held
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=100)
    console.print(model)
    assert re.search(r"\x1b\[1;7m[^\x1b]*▶ lin", console.file.getvalue())


# Whatever it is called


class Named(torch.nn.Module):
    """Modules, options, a class and a value with names of a kind that nobody should choose."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, torch.nn.Linear(4, 4))
        self.lin = torch.nn.Linear(4, 4)
        self.lin.extra_repr = lambda: name

    def forward(self, x):
        prompt = self.name
        return self._modules[prompt](self.lin(x))


def shown_of(name):
    """Every display of a model in which everything is called so."""
    kind = type(name, (Named,), {}) if name.isascii() else Named  # Python has classes of names in UTF-8 only
    model = NNsight(kind(name))
    run = model.trace(X4).start()
    run.to("lin")
    model.lin.output *= 2
    run.to(model._tree.root._modules[name])
    model[name].output *= 2
    found = [model, run, run.where(), run.locals(), run.edits, model.map(X4), summary({name: name}), model.cache(X4)]
    texts, pages = [*map(repr, found)], [each._repr_html_() for each in found]
    run.close()
    return texts, pages


def test_names_are_escaped_in_html(columns):
    columns(1000)
    texts, pages = shown_of(HOSTILE)
    for text, page in zip(texts, pages, strict=True):
        assert HOSTILE in text
        assert "<script" not in page
        assert html.escape(HOSTILE) in page
        assert re.findall(r"<(\w+)", page)
        assert set(re.findall(r"</?(\w+)", page)) <= {
            "div",
            "span",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "details",
            "summary",
        }


@pytest.mark.parametrize("name", ["\x1b[31mred\x1b[0m", "two\nlines", "\u202eback", "\udc80"])
def test_what_a_terminal_would_obey_is_spelled_out(name, columns):
    columns(1000)
    for text in [each for both in shown_of(name) for each in both]:
        assert name not in text
        assert repr(name)[1:-1] in html.unescape(text)


@pytest.mark.parametrize("name", ["[bold]x[/bold]", "[/]", ":smile:"])
def test_what_rich_would_take_for_markup_is_shown(name, columns):
    columns(1000)
    assert all(name in each for both in shown_of(name) for each in both)


def test_wide_signs_are_aligned():
    rows = [*Grid([Column("a"), Column("b")], [("日本", "x"), ("abcd", "x")]).lines(80)]
    assert [row.plain for row in rows[2:]] == ["日本  x", "abcd  x"]


# What goes wrong


class Broken(Shown):
    """A display that fails."""

    def _parts(self):
        yield Line("so far")
        raise ValueError("<b>no</b>")


def test_a_display_that_fails_is_a_line_in_the_cell(shell, capsys):
    from rich.console import Console

    assert Broken()._repr_html_() is None
    data, _ = shell.display_formatter.format(Broken())
    assert data == {"text/plain": "<Broken, which cannot be shown: ValueError: <b>no</b>>"}
    console = Console(width=80)
    console.print(Broken())
    assert capsys.readouterr().out == "<Broken, which cannot be shown: ValueError: <b>no</b>>\n"


def test_a_module_that_cannot_be_shown_fails_no_cell(shell):
    class Shy(torch.nn.Linear):
        def extra_repr(self):
            raise RuntimeError("not now")

    model = NNsight(torch.nn.Sequential(Shy(4, 4)))
    run = model.trace(X4).start()
    for shown in (model, run, run.where(), run.edits):
        assert "text/plain" in shell.display_formatter.format(shown)[0]
    run.close()


def test_a_local_that_cannot_be_shown_does_not_hide_the_others():
    class Shy(torch.nn.Module):
        def forward(self, x):
            class Odd:
                def __repr__(self):
                    raise ZeroDivisionError

            odd, after = Odd(), x + 1  # noqa: F841
            return self.lin(x)

        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(4, 4)

    run = NNsight(Shy()).trace(X4).start().to("lin")
    assert re.search(r"^odd +<Odd", repr(run.locals()), re.MULTILINE)
    assert re.search(r"^after +\[1, 4\] float32", repr(run.where()), re.MULTILINE)
    run.close()


def test_locals_that_nobody_wanted_are_not_shown():
    class Unpacking(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(4, 4)

        def forward(self, x):
            hidden, _, __ = x * 2, None, None
            return self.lin(hidden)

    run = NNsight(Unpacking()).trace(X4).start().to("lin")
    assert re.search(r"^hidden +\[1, 4\] float32", repr(run.where()), re.MULTILINE)
    assert not re.search(r"^_+ ", repr(run.where()), re.MULTILINE)
    assert run.locals()["_"] is None  # it can be looked up
    run.close()


# A tensor in one line


def test_a_tensor_is_one_line():
    values = torch.tensor([[1.0, 2.0], [float("nan"), -3.0], [float("inf"), 8.0]], requires_grad=True)
    finite = [1.0, 2.0, -3.0, 8.0]
    mean = sum(finite) / 4
    deviation = (sum((each - mean) ** 2 for each in finite) / 4) ** 0.5
    line = f"[3, 2] float32  cpu  mean {mean:.4g} ± {deviation:.4g}  range -3 … 8  1 NaN  1 infinite  grad"
    assert str(summary(values)) == line
    assert str(summary(values * 1)) == f"{line}: MulBackward0"


@pytest.mark.filterwarnings("ignore")  # torch's own, of kinds of tensors that it is giving up
@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: torch.tensor(3), "[] int64  cpu  range 3 … 3"),
        (lambda: torch.tensor([True, False, True]), "[3] bool  cpu  2 of 3 true"),
        (lambda: torch.empty(0, 4), "[0, 4] float32  cpu"),
        (lambda: torch.tensor([float("nan")] * 2), "[2] float32  cpu  2 NaN"),
        (lambda: torch.tensor([3 + 4j, 0]), "[2] complex64  cpu  mean 2.5 ± 2.5  range 0 … 5"),
        (lambda: torch.tensor([1, 3]).bfloat16(), "[2] bfloat16  cpu  mean 2 ± 1  range 1 … 3"),
        (lambda: torch.tensor([1.0, 3.0]).to(torch.float8_e4m3fn), "[2] float8_e4m3fn  cpu  mean 2 ± 1  range 1 … 3"),
        (lambda: torch.empty(2, device="meta"), "[2] float32  meta"),
        (lambda: torch.eye(2).to_sparse(), "[2, 2] float32  cpu  no statistics"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "[2] qint8  cpu  no statistics"),
        (lambda: None, "None"),
        (lambda: "<b>", "'<b>'"),
    ],
    ids=str,
)
def test_every_kind_of_value_is_one_line(make, line):
    assert str(summary(make())) == line


def test_an_output_of_several_values_is_a_line_for_each(columns):
    columns(80)
    assert str(summary((torch.ones(2), {"a": torch.ones(1)}, 3))).splitlines() == [
        "0  [2] float32  cpu  mean 1 ± 0  range 1 … 1",
        "1  dict",
        "2  3",
    ]
    assert str(summary(list(range(50)))).splitlines()[-2:] == ["39  39", "and 10 more"]


# Caches and maps


def test_a_cache_shows_layers_of_which_the_same_was_kept_as_one_line(columns):
    columns(80)
    cache = NNsight(Stack()).cache(X4)
    assert repr(cache).splitlines() == [
        "8 modules, 8 visits, 0.0 MB",
        "module     output",
        "─────────  ──────────────",
        "h.0…2.lin  [1, 4] float32",
        "h.0…2      [1, 4] float32",
        "head       [1, 4] float32",
        '""         [1, 4] float32',
    ]


def test_a_table_says_which_columns_it_has_no_room_for(columns):
    found = NNsight(Stack()).map(X4)
    columns(50)
    assert repr(found).splitlines()[0].split() == ["module", "input", "output"]
    assert repr(found).splitlines()[-1] == "too narrow for: type"
    columns(80)
    assert repr(found).splitlines()[0].split() == ["module", "type", "input", "output"]
    assert "too narrow" not in repr(found)


def test_a_place_in_a_cache_shows_each_visit(columns):
    columns(80)
    model = NNsight(Stack())
    with model.trace(X4, fn="generate") as tracer:
        cache = tracer.cache(modules=["h.*"])
    lines = repr(cache["h.1"]).splitlines()
    assert lines[0] == "cached of model.h[1]: 3 visits"
    assert [line.split()[:4] for line in lines[3:]] == [[str(step), "[1,", "4]", "float32"] for step in range(3)]
    assert repr(cache["h"]) == "cached of model.h: 0 visits, 3 modules below it"
