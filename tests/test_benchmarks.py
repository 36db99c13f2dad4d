"""The benchmarks run, and print and write what they say; no times are looked at."""

import json
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SHARED = ("models", "plots", "question", "report", "summary", "timing")
SCRIPTS = ("batches", "cache", "extraction", "generation", "overhead", "patching", "startup", "stepping")

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def shared(monkeypatch):
    """What the scripts import, found as when they are run, and without the peers, which have processes of their own."""
    import importlib.util

    find = importlib.util.find_spec
    peers = ("nnsight", "transformer_lens", "pyvene", "torchlens")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in peers else find(name, *rest))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in SHARED:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_prints_its_tables_and_writes_them(script, shared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / f"{script}.py"), "--quick", f"--out={tmp_path}"])
    with warnings.catch_warnings():
        runpy.run_path(sys.argv[0], run_name="__main__")
    printed = capsys.readouterr().out
    tables = json.loads((tmp_path / f"{script}.json").read_text())["tables"]
    assert tables
    assert (tmp_path / f"{script}.png").read_bytes().startswith(b"\x89PNG")
    for table in tables:
        assert table["title"] in printed
        ways = [row["way"] for row in table["rows"]]
        assert len(ways) == len({(row["way"], row["at"]) for row in table["rows"]})
        assert any(way.startswith("nnsight_eager") for way in ways[1:])
        assert not ways[0].startswith("nnsight_eager")  # the baseline comes first
        assert all(row["seconds"] > 0 and row["baseline"] > 0 for row in table["rows"])
    assert script == "stepping" or "is not installed and left out" in printed


def test_all_of_them_are_run_by_the_package(shared):
    assert set(SCRIPTS) == set(runpy.run_path(str(BENCHMARKS / "__main__.py"))["NAMES"])


def test_what_a_way_needs_is_what_torch_has_allocated(shared):
    from timing import memory

    def way():
        kept = torch.ones(1000)
        return {"kept": [kept, kept[:10]], "beside": str(torch.ones(500).sum())}

    assert memory(way).kept == 4000
    assert 6000 <= memory(way).peak < 6100


def test_the_readme_has_the_bars_and_the_costs(shared):
    from report import Row, Table
    from summary import summary

    def row(way, seconds, baseline):
        return Row(way, seconds, baseline, 2e-6, None, None)

    theirs = row("nnsight", 11e-6, 3e-6)  # in a process of its own, where the baseline takes longer
    rows = [row("bare", 1e-6, 1e-6), row("plain hooks", 2e-6, 1e-6), row("nnsight_eager", 3e-6, 1e-6), theirs]
    shown = summary({"overhead": [Table("Read 12 layers, an MLP", "", 5, rows)]})
    assert "| Read 12 layers, an MLP | 1.0 µs | 1.0 µs (2.00 x) | 2.0 µs (3.00 x) | 8.0 µs (3.67 x) |  |" in shown
    assert "| Read 12 layers, an MLP | plain hooks, added time | 2.000 | ≤ 0.8 |" in shown
    assert "| Read 12 layers, an MLP | nnsight, added time | 0.250 | ≤ 0.2 |" in shown
