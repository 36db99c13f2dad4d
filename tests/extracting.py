"""Extract in processes of their own that are killed.

    python extracting.py FOLDER SEED

Writes `FOLDER/whole` and `FOLDER/timed`, which nobody interrupted, and `FOLDER/0` to `FOLDER/9`, each killed in the middle of
writing, then at a random moment, and then let go. `FOLDER/half_written` says how many of the first kills left a file that was
not yet in its place; not standard output, where a slow machine shows progress.
"""

import itertools
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers

from nnsight_eager import LanguageModel


def tiny():
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return LanguageModel(transformers.GPT2LMHeadModel(config).eval())


def rows():
    draw = random.Random(0)
    return [[draw.randrange(1, 320) for _ in range(draw.randrange(1, 40))] for _ in range(40)]


def extract(model, folder):
    model.extract(rows(), ["transformer.h.*", model.transformer.wte], folder, batch_tokens=80, shard_bytes=40_000)


def begun(model, folder, deadly=None):
    """Extract in a process that was forked, where files take their time to be written; its id.

    The process dies in the middle of writing its file number `deadly`.
    """
    child = os.fork()
    if child:
        return child
    files = itertools.count()

    def slow_or_deadly(file):  # in the place of the disk, whose own time to flush a file may be anything
        if next(files) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.005)

    os.fsync = slow_or_deadly
    try:
        extract(model, folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(child):
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status


def main(folder, seed):
    torch.set_num_threads(1)  # no threads, which a fork would lose
    model, draw, half_written = tiny(), random.Random(seed), 0
    extract(model, folder / "whole")  # in this process, so that the others have imported all and write most of their time
    start = time.monotonic()
    ended(begun(model, folder / "timed"))
    whole = time.monotonic() - start
    for number in range(10):
        ended(begun(model, folder / str(number), deadly=number))
        half_written += any((folder / str(number)).glob("*.part"))
        child = begun(model, folder / str(number))
        time.sleep(draw.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        ended(child)
        ended(begun(model, folder / str(number)))
    (folder / "half_written").write_text(str(half_written))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
