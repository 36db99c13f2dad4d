"""The layout: which module may import which, and where the two dangerous things are done."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nnsight_eager"

MAY_IMPORT = {
    "errors": set(),
    "nested": set(),
    "snapshots": set(),
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
    "compiled": {"changes", "taps"},
    "fast_paths": {"coroutine", "inside", "taps", "visits"},
    "ears": {
        "aliases",
        "compiled",
        "distributed.first",
        "distributed.spread",
        "errors",
        "fast_paths",
        "inside",
        "order",
        "paths",
        "taps",
        "visits",
    },
    "distributed.__init__": set(),
    "distributed.first": set(),
    "distributed.ranks": {"errors"},
    "distributed.shards": {"distributed.ranks"},
    "distributed.twin": set(),
    "distributed.layouts": {
        "aliases",
        "distributed.ranks",
        "distributed.shards",
        "distributed.twin",
        "ears",
        "errors",
        "inside",
        "nested",
        "paths",
        "run",
        "scan",
        "visits",
    },
    "distributed.shown": {"distributed.layouts", "distributed.ranks", "distributed.shards", "errors", "nested"},
    "distributed.writing": {"activations", "dataset", "distributed.ranks", "errors", "extraction"},
    "distributed.spread": {
        "distributed.layouts",
        "distributed.ranks",
        "distributed.shown",
        "distributed.writing",  # lazily, where an extraction is written
        "nested",
        "paths",
        "visits",
    },
    "missed": {"ears", "errors", "inside", "paths", "visits"},
    "changes": {"coroutine", "nested", "paths"},
    "run": {"changes", "coroutine", "ears", "errors", "inside", "missed", "nested", "paths", "visits"},
    "shown": set(),
    "folding": set(),
    "outline": {"shown"},
    "summaries": {"nested", "shown"},
    "cache": {"errors", "folding", "nested", "paths", "shown", "snapshots", "summaries", "visits"},
    "current": {"changes", "coroutine", "errors", "run"},
    "rewriting": set(),
    "texts": set(),
    "entering": {"texts"},
    "signatures": set(),
    "backward": {"compat", "coroutine", "entering", "errors", "nested", "snapshots", "tracebacks"},
    "blocks": {"errors", "rewriting", "texts"},
    "operations": {"errors", "rewriting", "texts"},
    "peeling": {"errors", "operations", "texts"},
    "calls": {"attention", "coroutine", "errors", "inside", "operations", "paths", "peeling", "taps", "visits"},
    "source": {"calls", "ears", "errors", "further", "operations", "paths", "peeling", "points", "run", "taps", "visits"},
    "skipping": set(),
    "names": {"blocks", "rewriting"},
    "batching": {"errors", "nested"},
    "bodies": {"batching", "coroutine", "errors", "paths", "signatures", "visits"},
    "waiting": {"bodies", "visits"},
    "lending": {"batching", "bodies", "errors", "nested", "snapshots", "visits"},
    "share": {"bodies", "visits"},
    "shared": {
        "batching",
        "bodies",
        "coroutine",
        "current",
        "ears",
        "errors",
        "lending",
        "paths",
        "run",
        "share",
        "tuples",
        "visits",
        "waiting",
    },
    "captured": {"blocks", "errors", "names", "skipping"},
    "invokes": {"batching", "blocks", "bodies", "captured", "errors", "names", "paths", "run", "tracebacks", "visits"},
    "edits": {"blocks", "bodies", "captured", "errors", "names", "paths", "shared"},
    "tuples": {"errors", "nested", "paths", "run", "visits"},
    "points": {"attention", "backward", "errors", "nested", "paths", "run", "tracebacks", "tuples", "visits"},
    "further": {"errors", "paths", "points", "run", "visits"},
    "tree": {
        "aliases",
        "compiled",
        "current",
        "ears",
        "errors",
        "further",
        "nested",
        "outline",
        "paths",
        "points",
        "run",
        "source",
        "tracebacks",
        "visits",
    },
    "steps": {"changes", "errors", "run"},
    "tracebacks": {"coroutine"},
    "trace": {
        "backward",
        "batching",
        "bodies",
        "cache",
        "changes",
        "compat",
        "current",
        "distributed.first",
        "entering",
        "errors",
        "interactive.held",  # lazily, to begin one
        "invokes",
        "paths",
        "run",
        "shared",
        "steps",
        "tracebacks",
        "tree",
        "tuples",
        "visits",
    },
    "scan": {"aliases", "errors", "folding", "nested", "paths", "run", "shown", "trace", "tree", "visits"},
    "constants": {"cache", "errors", "nested", "shared", "tree"},
    "model": {
        "aliases",
        "batching",
        "cache",
        "compiled",
        "constants",
        "ears",
        "edits",
        "errors",
        "interactive.kept",  # lazily, to make one
        "invokes",
        "paths",
        "points",
        "run",
        "scan",
        "signatures",
        "trace",
        "tracebacks",
        "tree",
    },
    "padding": {"errors"},
    "inputs": {"errors", "padding"},
    "loading": {"errors"},
    "activations": {"errors", "paths"},
    "dataset": {"errors"},
    "shard": {"activations", "errors"},
    "plot": {"errors", "language"},
    "progress": set(),
    "digests": {"names", "peeling", "tree"},
    "extraction": {
        "activations",
        "batching",
        "dataset",
        "digests",
        "errors",
        "model",
        "nested",
        "paths",
        "progress",
        "shard",
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
        "remote.workers",  # lazily, where they are wanted
        "run",
        "scan",
        "signatures",
        "trace",
        "tree",
    },
    "vision": {"batching", "errors", "inputs", "language", "loading", "padding", "trace"},
    "lens": {"errors", "language", "tree"},
    "interactive.__init__": set(),
    "interactive.frozen": {"snapshots"},
    "interactive.random_numbers": set(),
    "interactive.predicates": {"errors"},
    "interactive.into": {"coroutine", "run", "visits"},
    "interactive.journal": {"inside", "interactive.random_numbers", "interactive.frozen", "nested", "snapshots", "visits"},
    "interactive.display": {
        "changes",
        "coroutine",
        "interactive.journal",
        "nested",
        "outline",
        "paths",
        "shown",
        "summaries",
        "tracebacks",
        "visits",
    },
    "interactive.recording": {
        "interactive.random_numbers",
        "changes",
        "errors",
        "inside",
        "interactive.frozen",
        "interactive.journal",
        "nested",
        "paths",
        "run",
        "snapshots",
        "visits",
    },
    "interactive.left_behind": {"changes", "paths", "run"},
    "interactive.pointing": {"errors", "paths", "run", "source", "tree", "visits"},
    "interactive.held": {
        "interactive.random_numbers",
        "cache",
        "compat",
        "current",
        "errors",
        "interactive.display",
        "interactive.into",
        "interactive.journal",
        "interactive.left_behind",
        "interactive.pointing",
        "interactive.predicates",
        "interactive.recording",
        "nested",
        "outline",
        "paths",
        "run",
        "shown",
        "summaries",
        "trace",
        "tracebacks",
        "tree",
        "visits",
    },
    "interactive.kept": {"errors", "interactive.held", "interactive.recording", "run", "trace", "tracebacks", "visits"},
    "interactive.magics": {
        "errors",
        "interactive.display",
        "interactive.held",
        "interactive.predicates",
        "paths",
        "trace",
        "tracebacks",
        "visits",
    },
    "remote.__init__": {"remote.model"},
    "remote.addresses": {"attention", "calls", "errors", "visits"},
    "remote.room": set(),
    "remote.packing": {"errors", "nested", "remote.room"},
    "remote.wire": {"remote.addresses", "remote.packing"},
    # The server's side
    "remote.turns": set(),
    "remote.lanes": set(),
    "remote.holding": {"nested", "run"},
    "remote.pictures": {"interactive.display", "shown"},
    "remote.served": {
        "attention",
        "cache",
        "coroutine",
        "current",
        "edits",
        "errors",
        "interactive.held",
        "interactive.random_numbers",
        "model",
        "nested",
        "remote.addresses",
        "remote.holding",
        "remote.packing",
        "remote.pictures",
        "remote.wire",
        "run",
        "source",
        "trace",
        "visits",
    },
    "remote.sessions": {"errors", "model", "nested", "remote.holding", "remote.lanes", "remote.served"},
    "remote.passes": {"batching", "invokes", "model", "nested", "run", "trace"},
    "remote.ranks": {"errors", "remote.packing", "remote.turns"},
    "remote.functions": {
        "errors",
        "language",
        "progress",
        "remote.packing",
        "remote.passes",
        "remote.ranks",
        "remote.served",
        "remote.sessions",
        "visits",
    },
    "remote.serving": {
        "errors",
        "interactive.held",
        "language",
        "remote.addresses",
        "remote.functions",
        "remote.holding",
        "remote.lanes",
        "remote.packing",
        "remote.ranks",
        "remote.served",
        "remote.sessions",
        "remote.wire",
        "visits",
    },
    "remote.together": {"remote.cluster", "remote.ranks", "remote.serving", "remote.sessions"},
    "remote.cluster": {"errors"},
    "remote.command": {"errors", "remote.cluster", "remote.serving", "remote.sessions", "remote.together"},
    "remote.workers": {
        "activations",
        "errors",
        "extraction",
        "loading",
        "remote.addresses",
        "remote.cluster",
        "remote.packing",
        "remote.served",
    },
    # The client's
    "remote.line": {"errors", "remote.cluster", "remote.wire"},
    "remote.visits": {"nested", "remote.addresses", "remote.packing", "remote.wire", "visits"},
    "remote.refs": {"remote.line", "remote.packing"},
    "remote.jobs": {"errors", "remote.line", "remote.packing"},
    "remote.runs": {
        "changes",
        "errors",
        "inside",
        "paths",
        "remote.addresses",
        "remote.line",
        "remote.packing",
        "remote.refs",
        "remote.visits",
        "remote.wire",
        "run",
        "visits",
    },
    "remote.traces": {
        "cache",
        "errors",
        "invokes",
        "remote.held",
        "remote.jobs",
        "remote.packing",
        "remote.runs",
        "run",
        "trace",
        "tree",
    },
    "remote.held": {
        "compat",
        "current",
        "errors",
        "outline",
        "paths",
        "remote.pictures",
        "remote.runs",
        "remote.traces",
        "shown",
        "source",
        "tracebacks",
        "tree",
        "visits",
    },
    "remote.extracting": {"activations", "errors", "progress", "remote.jobs"},
    "remote.model": {
        "errors",
        "invokes",
        "language",
        "loading",
        "remote.addresses",
        "remote.cluster",
        "remote.extracting",
        "remote.jobs",
        "remote.line",
        "remote.packing",
        "remote.refs",
        "remote.runs",
        "remote.traces",
        "remote.wire",
        "run",
        "trace",
        "tree",
        "visits",
    },
    "demo": {"errors"},
    "__main__": {"demo", "errors", "language", "lens", "remote.command"},
}


@cache
def sources() -> dict[str, str]:
    """The text of every module, by its name in the package: `errors`, `examples.command`."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text() for path in PACKAGE.rglob("*.py")}


@cache
def modules() -> dict[str, ast.Module]:
    return {name: ast.parse(text) for name, text in sources().items()}


def imports_of_ours(name: str) -> set[str]:
    """What the module imports of the package: modules by their names, and names that the package has for everybody."""
    found = set()
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = ["nnsight_eager", *name.split(".")][: -node.level] if node.level else []
            start = ".".join([*parents, *filter(None, [node.module])])
            found |= {f"{start}.{alias.name}" for alias in node.names} if node.module in (None, "nnsight_eager") else {start}
    return {each.removeprefix("nnsight_eager.") for each in found if f"{each}.".startswith("nnsight_eager.")}


def imported(tree: ast.Module) -> set[str]:
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}


def stub():
    """What the package has for everybody, each name imported where it is first used."""
    return ast.parse((PACKAGE / "__init__.pyi").read_text())


EXAMPLES = {name for name in modules() if name.startswith("examples.")}


@pytest.mark.parametrize("name", sorted(set(modules()) - EXAMPLES - {"__init__"}))
def test_a_module_imports_only_what_the_layout_allows(name):
    assert imports_of_ours(name) <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_imports_only_what_users_can_and_other_examples(name):
    public = {alias.asname for node in stub().body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imports_of_ours(name) <= public | EXAMPLES | {"demo"}  # the model that the command line fetches


def test_the_layout_names_no_module_that_is_gone():
    assert set(MAY_IMPORT) <= set(modules())


def test_the_readme_names_every_module_where_it_says_how_to_read_the_source():
    readme = (PACKAGE.parent / "README.md").read_text()
    section = readme.partition("## Reading the source")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+/?)`", section))
    packages = {f"{name.partition('.')[0]}/" for name in modules() if "." in name}
    assert named == packages | {name for name in modules() if "." not in name and not name.startswith("__")}


def test_one_module_imports_greenlet():
    assert {name for name, tree in modules().items() if "greenlet" in imported(tree)} == {"coroutine"}


def test_one_module_joins_a_cluster():
    assert {name for name, text in sources().items() if "        import ray\n" in text} == {"remote.cluster"}
    assert {name for name, text in sources().items() if "from ray import cloudpickle" in text} == {
        "remote.jobs",
        "remote.packing",
    }


def test_one_module_changes_a_torch_module():
    """Only `taps` writes a `forward` or registers a hook."""
    changes = ('own["forward"]', '"forward", tap', "register_forward", "register_full")
    assert {name for name, text in sources().items() if any(change in text for change in changes)} == {"taps"}


def test_modules_stay_readable():
    too_long = {name: n for name, text in sources().items() if (n := len(text.splitlines())) > 400}
    assert not too_long


def printed_by(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout.strip()


def test_what_the_package_has_for_everybody_imports_neither_ipython_nor_transformers():
    names = ("IPython", "transformers", "accelerate", "rich", "ray")
    code = f"import sys; from nnsight_eager import *; LanguageModel; print([name for name in {names} if name in sys.modules])"
    assert printed_by(code) == "[]"


def test_a_module_of_the_package_is_an_attribute_of_it_without_an_import_of_its_own():
    assert printed_by("import nnsight_eager as n; print(n.errors.EditError is n.EditError)") == "True"
    code = "import nnsight_eager as n; print([hasattr(n, name) for name in ('errrors', '_x', '__wrapped__', 'Trace')])"
    assert printed_by(code) == "[False, False, False, True]"


def test_importing_the_package_imports_what_is_used_and_no_more():
    ours = "sorted(name for name in sys.modules if name.startswith('nnsight_eager'))"
    assert printed_by(f"import sys, nnsight_eager; print({ours})") == "['nnsight_eager', 'nnsight_eager.compat']"
    assert "nnsight_eager.extraction" not in printed_by(f"import sys; from nnsight_eager import NNsight; print({ours})")
