"""The README: its blocks run, and its commands are the ones that are checked."""

import builtins
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_runs(block, folder, tmp_path, monkeypatch, capsys):
    script = tmp_path / "block.py"
    names = {"openai-community/gpt2": "gpt2", "meta-llama/Llama-3.1-8B": "llama", "llava-hf/llava-1.5-7b-hf": "llava"}
    for name, kind in names.items():
        block = block.replace(name, str(folder(kind))) if name in block else block
    script.write_text(block)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))


def test_the_gate_is_the_command_of_the_readme():
    gate = "ruff format --check . && ruff check . && mypy && pytest"
    assert gate in README
    assert gate in (ROOT / ".ci" / "run").read_text()


def test_the_readme_names_only_errors_that_exist():
    import nnsight_eager

    for name in set(re.findall(r"`(\w+Error)`", README)) - {"WithBlockNotFoundError", *vars(builtins)}:
        assert hasattr(nnsight_eager, name), name
