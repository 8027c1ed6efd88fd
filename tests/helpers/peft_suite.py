"""PEFT's own tests, run on MoRA with LoRA next to it: its generic matrix.

They come from the source distribution of the installed PEFT, which pip downloads. Each
table of theirs that lists methods lists these two instead. Models of the Hub are tiny
ones, with random weights, in a cache that this module fills.

    python -m tests.helpers.peft_suite        a few minutes; prints what LoRA passes and MoRA does not

The second half of the module is a plugin of the pytest that `run` starts.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from collections import Counter
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import yaml

_TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
MODULES = _TABLES["modules"]
MODELS = _TABLES["models"]

METHOD = re.compile(r"(Mora|Lora)Config-config_kwargs\d+")
"""What the name of a test says of its method."""


def download(folder):
    """Unpack PEFT's tests into the package `folder`/peft_suite. Raises
    `subprocess.CalledProcessError` where they cannot be had."""
    sdist = f"peft=={version('peft')}"
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
    patience = ("--retries", "1", "--timeout", "20")
    source_only = ("--no-binary", ":all:", "--no-build-isolation", "--dest", folder)
    subprocess.run([*command, *patience, *source_only, sdist], check=True)
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (unpacked,) = folder.glob("peft-*/tests")
    shutil.copytree(unpacked, folder / "peft_suite")
    (folder / "peft_suite" / "__init__.py").touch()


def fill_cache(cache):
    """Write the models as `huggingface_hub` keeps downloaded ones."""
    import torch
    import transformers

    revision = "0" * 40
    for name, (class_name, settings) in MODELS.items():
        model_class = getattr(transformers, class_name)
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**settings))
        folder = cache / f"models--{name.replace('/', '--')}"
        model.save_pretrained(folder / "snapshots" / revision)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(revision)


def run(folder):
    """Test -> (outcome with MoRA, with LoRA) of PEFT's generic matrix: passed, failed or
    skipped."""
    download(folder)
    fill_cache(folder / "cache")
    results = folder / "results.json"
    environment = os.environ | {
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PEFT_SUITE_RESULTS": str(results),
    }
    files = [f"{folder}/peft_suite/{name}.py" for name in MODULES]
    options = ("-q", "-n", "0", "-p", "tests.helpers.peft_suite", "--tb=line")
    apart = ("-c", os.devnull, "--rootdir", folder, "-p", "no:cacheprovider")
    chosen = ("-k", "MoraConfig or LoraConfig")
    command = [sys.executable, "-m", "pytest", *options, *apart, *chosen, *files]
    finished = subprocess.run(command, env=environment, cwd=folder, check=False)
    # 1: some tests have failed
    assert finished.returncode in (0, 1), finished
    outcomes = {}
    for test, outcome in json.loads(results.read_text()).items():
        method = METHOD.search(test)
        if method:
            by_method = outcomes.setdefault(METHOD.sub("", test), {})
            by_method[method[1]] = outcome
    return {
        test: (by_method["Mora"], by_method["Lora"])
        for test, by_method in outcomes.items()
        if len(by_method) == 2
    }


def gaps(outcomes):
    """ "name of a test: outcome with MoRA" -> how often, where LoRA passes it and MoRA
    does not."""
    return Counter(
        f"{test.partition('[')[0].rpartition('::')[2]}: {mora}"
        for test, (mora, lora) in outcomes.items()
        if lora == "passed" and mora != "passed"
    )


def main():
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(Path(folder))
    for index, method in enumerate(("MoRA", "LoRA")):
        print(method, dict(Counter(pair[index] for pair in outcomes.values())))
    for name, count in sorted(gaps(outcomes).items()):
        print(f"{count:4}  {name}")


# -- the plugin ------------------------------------------------------------------------

RESULTS = {}
"""Test -> its outcome."""


def pytest_sessionstart(session):
    """Replace PEFT's tables of methods before the tests are collected."""
    from peft import LoraConfig

    from mora_ds.peft import MoraConfig

    sys.path.insert(0, str(session.config.rootpath))
    # PEFT's helpers import it for models of images, which these modules do not have
    diffusers = types.ModuleType("diffusers")
    diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules.setdefault("diffusers", diffusers)
    utils = importlib.import_module("peft_suite.testing_utils")
    # It would look for every model on the Hub once
    utils.hub_online_once = nullcontext
    for name, settings in MODULES.items():
        module = importlib.import_module(f"peft_suite.{name}")
        if not settings:
            module.TEST_CASES[:] = [
                (f"MLP {number}", "MLP", config, of_mlp)
                for number, of_mlp in enumerate(_TABLES["mlps"])
                for config in (MoraConfig, LoraConfig)
            ]
            continue
        module.ALL_CONFIGS[:] = [(MoraConfig, settings), (LoraConfig, settings)]


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        RESULTS[report.nodeid] = report.outcome


def pytest_sessionfinish(session):
    Path(os.environ["PEFT_SUITE_RESULTS"]).write_text(json.dumps(RESULTS))


if __name__ == "__main__":
    main()
