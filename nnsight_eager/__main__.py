"""The command line: a logit lens over every layer of a model, and serving a model to others.

python -m nnsight_eager "The Eiffel Tower is in the city of" --top 3
python -m nnsight_eager serve openai-community/gpt2 --name gpt2
"""

import argparse
import os
import sys
from collections.abc import Sequence

from .errors import InputError, NnsightEagerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and answer with the exit status; what goes wrong is one sentence on standard error."""
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    serves = given[:1] == ["serve"] and len(given) > 1
    options = None if serves else parser().parse_args(given)
    try:
        if options is None:
            return serve(given[1:])
        print_lens(options)
    except NnsightEagerError as error:
        print(f"nnsight_eager: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        print(f"nnsight_eager: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def serve(arguments: Sequence[str]) -> int:
    """`python -m nnsight_eager serve --help` says what it takes."""
    from .remote.command import serve

    return serve([*arguments])


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(
        prog="python -m nnsight_eager",
        description="What each layer of a language model would answer: its likeliest token, and the rank of the final answer.",
    )
    made.add_argument("prompt", help='the text to go on with, such as "The Eiffel Tower is in the city of"')
    made.add_argument("--model", help="a model's name or folder; a small real model is fetched once when none is given")
    made.add_argument("--top", type=int, default=1, help="how many tokens to show for each layer (default: 1)")
    made.add_argument("--position", type=int, default=-1, help="the token to look at (default: -1, the last)")
    return made


def print_lens(options: argparse.Namespace) -> None:
    """Run the lens and print it as a table."""
    if options.top < 1:
        raise InputError(f"`--top {options.top}` shows nothing.", "Give 1 or more.")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from . import demo
    from .language import LanguageModel
    from .lens import logit_lens

    console = Console()
    model = LanguageModel(options.model or demo.folder())
    if model.tokenizer is None:
        raise InputError(f"`{options.model}` has no tokenizer.", "Name a folder that a tokenizer was saved into as well.")
    layers = logit_lens(model, options.prompt, top=options.top, position=options.position)
    table = Table(title=Text(options.prompt), title_justify="left")
    table.add_column("layer", justify="right")
    for place in range(len(layers[0].tokens)):
        table.add_column("top token" if place == 0 else f"{place + 1}.")
        table.add_column("probability" if place == 0 else "", justify="right")
    table.add_column("rank of the final answer", justify="right")
    for layer in layers:
        shown = [
            cell
            for token, probability in zip(layer.tokens, layer.probabilities, strict=True)
            for cell in (Text(repr(token)), f"{probability:.3f}")
        ]
        table.add_row(str(layer.index), *shown, str(layer.rank), style="green" if layer.rank == 1 else None)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
