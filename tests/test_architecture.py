"""The layout: which module may import which, and where the two dangerous things are done."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nnsight_eager"

MAY_IMPORT = {
    "errors": set(),
    "nested": set(),
    "order": set(),
    "torch_state": set(),
    "fence": set(),
    "compat": set(),
    "coroutine": {"errors", "fence", "torch_state"},
    "taps": {"coroutine"},
    "visits": {"coroutine", "errors", "nested", "order", "taps", "torch_state"},
    "inside": set(),
    "paths": {"inside"},
    "aliases": {"errors", "paths"},
    "attention": {"errors", "inside", "paths", "taps"},
    "ears": {"aliases", "errors", "inside", "order", "paths", "taps", "visits"},
    "missed": {"ears", "errors", "inside", "paths", "visits"},
    "changes": {"coroutine", "nested"},
    "run": {"changes", "coroutine", "ears", "errors", "inside", "missed", "nested", "paths", "visits"},
    "cache": {"errors", "nested", "paths", "visits"},
    "current": {"changes", "coroutine", "errors", "run"},
    "rewriting": set(),
    "texts": set(),
    "entering": {"texts"},
    "backward": {"compat", "coroutine", "entering", "errors", "nested"},
    "blocks": {"errors", "rewriting", "texts"},
    "operations": {"errors", "rewriting", "texts"},
    "calls": {"coroutine", "errors", "inside", "operations", "paths", "taps", "visits"},
    "source": {"calls", "ears", "errors", "operations", "paths", "points", "run", "taps", "visits"},
    "skipping": set(),
    "names": {"blocks", "rewriting"},
    "batching": {"errors", "nested"},
    "bodies": {"batching", "coroutine", "errors", "paths", "visits"},
    "waiting": {"bodies", "visits"},
    "lending": {"batching", "bodies", "errors", "nested", "visits"},
    "shared": {"batching", "bodies", "coroutine", "ears", "errors", "lending", "paths", "run", "visits", "waiting"},
    "captured": {"blocks", "errors", "names", "skipping"},
    "invokes": {"batching", "blocks", "bodies", "captured", "coroutine", "errors", "names", "paths", "run", "visits"},
    "edits": {"blocks", "bodies", "captured", "errors", "names", "paths", "shared"},
    "points": {"attention", "backward", "errors", "nested", "paths", "run", "visits", "waiting"},
    "tree": {"aliases", "coroutine", "current", "ears", "errors", "paths", "points", "run", "source", "visits"},
    "steps": {"errors", "run"},
    "trace": {
        "backward",
        "batching",
        "bodies",
        "cache",
        "changes",
        "compat",
        "coroutine",
        "current",
        "entering",
        "errors",
        "interactive",  # lazily, to begin one
        "invokes",
        "paths",
        "run",
        "shared",
        "steps",
        "tree",
        "visits",
    },
    "scan": {"errors", "nested", "paths", "run", "shown", "trace", "tree", "visits"},
    "constants": {"cache", "errors", "nested", "shared", "tree"},
    "model": {
        "aliases",
        "batching",
        "cache",
        "constants",
        "ears",
        "edits",
        "errors",
        "interactive",
        "invokes",
        "paths",
        "run",
        "scan",
        "trace",
        "tree",
    },
    "padding": {"errors"},
    "inputs": {"errors", "padding"},
    "loading": {"errors"},
    "activations": {"errors", "paths"},
    "dataset": {"errors"},
    "progress": set(),
    "shown": set(),
    "extraction": {
        "activations",
        "batching",
        "dataset",
        "errors",
        "model",
        "nested",
        "paths",
        "progress",
        "visits",
    },
    "language": {
        "activations",
        "aliases",
        "batching",
        "dataset",
        "errors",
        "extraction",
        "inputs",
        "invokes",
        "loading",
        "model",
        "padding",
        "run",
        "scan",
        "trace",
        "tree",
    },
    "lens": {"errors", "language", "tree"},
    "demo": {"errors"},
    "__main__": {"demo", "errors", "language", "lens"},
}


def modules() -> dict[str, ast.Module]:
    return {path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py")}


def imports_of_ours(tree: ast.Module) -> set[str]:
    return {
        node.module.split(".")[0] if node.module else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }


def imported(tree: ast.Module) -> set[str]:
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}


@pytest.mark.parametrize("name", sorted(set(modules()) - {"__init__"}))
def test_a_module_imports_only_what_the_layout_allows(name):
    assert imports_of_ours(modules()[name]) <= MAY_IMPORT[name]


def test_the_layout_names_no_module_that_is_gone():
    assert set(MAY_IMPORT) <= set(modules())


def test_one_module_imports_greenlet():
    assert {name for name, tree in modules().items() if "greenlet" in imported(tree)} == {"coroutine"}


def test_one_module_changes_a_torch_module():
    """Only `taps` writes a `forward` or registers a hook."""
    changes = ('own["forward"]', '"forward", tap', "register_forward", "register_full")
    assert {path.stem for path in PACKAGE.glob("*.py") if any(change in path.read_text() for change in changes)} == {"taps"}


def test_modules_stay_readable():
    too_long = {path.name: n for path in PACKAGE.glob("*.py") if (n := len(path.read_text().splitlines())) > 400}
    assert not too_long


def test_importing_the_package_imports_neither_ipython_nor_transformers():
    code = (
        "import sys, nnsight_eager; print([m for m in ('IPython', 'transformers', 'accelerate', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
