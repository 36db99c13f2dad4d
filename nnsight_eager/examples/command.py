"""What makes an experiment a command: its arguments, the model, the file of its figure, one sentence for what goes wrong.

def main(arguments=None):
    return run(experiment, parser("logit_lens", __doc__), arguments)
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nnsight_eager import InputError, LanguageModel, NnsightEagerError, demo, plot

Experiment = Callable[[LanguageModel, argparse.Namespace], plot.Plot]


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every experiment takes."""
    made = argparse.ArgumentParser(prog=f"python -m nnsight_eager.examples.{name}", description=description.splitlines()[0])
    made.add_argument("--model", help="the name or folder of a model built like Llama (default: a small one, fetched once)")
    made.add_argument("--out", type=file_of_a_figure, default=f"{name}.png", help="the figure's file (default: %(default)s)")
    return made


def run(experiment: Experiment, parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Run the experiment, save its figure and answer with the exit status."""
    options = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401  # asked for before the model is loaded, since the figure comes last

        experiment(loaded(options.model or demo.folder()), options).save(options.out)
    except ModuleNotFoundError as error:
        return refused(f"The figures need the package `{error.name}`.\nRun `pip install 'nnsight_eager[examples]'`.")
    except NnsightEagerError as error:
        return refused(str(error))
    except OSError as error:
        return refused(f"`{options.out}` cannot be written: {error.strerror or error}.")
    except KeyboardInterrupt:
        return 130
    print(f"The figure is in {options.out}.")
    return 0


def loaded(name: str | Path) -> LanguageModel:
    """The model, with the parts that every experiment names."""
    model = LanguageModel(name, dtype=torch.float32)
    if model.tokenizer is None:
        raise InputError(f"`{name}` has no tokenizer.", "Name a folder that a tokenizer was saved into as well.")
    if not all(path in dict(model.named_modules()) for path in ("model.layers", "model.norm", "lm_head")):
        raise InputError(
            f"`{name}` has no `model.layers`, `model.norm` and `lm_head`.", "Name a model that is built like Llama."
        )
    return model


def refused(sentence: str) -> int:
    """Say what is wrong on standard error; the exit status that goes with it."""
    print(f"nnsight_eager: {sentence}", file=sys.stderr)
    return 1


def file_of_a_figure(name: str) -> Path:
    """An `--out` that can be written, as far as can be told before the experiment."""
    path = Path(name)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"`{name}` does not end in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder `{path.parent}` to write `{path.name}` into")
    return path


def count(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"`{text}` is not a number from 1 on")
    return int(text)
