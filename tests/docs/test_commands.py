"""The documentation's commands, run as they stand, on what the demo leaves behind.

A block with the comment `run: bucket` has a server of S3.
One with `run: demo` before it is run, page by page and in order, in a
folder that looks like a checkout in which the demo has just finished; `run: ci` is what
.ci/run runs, and `not run: ...` says why not. Longer runs are cut to a few steps. Of one
run the guide to a healthy run shows the first and the last lines.
"""

import os
import re
import sys
from pathlib import Path

import fsspec
import pytest

from mora_ds.common.files import read_json
from tests.helpers.gloo import free_port
from tests.helpers.pages import PAGES, ROOT
from tests.helpers.tools import called

pytestmark = [pytest.mark.heavy(seconds=120), pytest.mark.timeout(1200)]

BLOCK = re.compile(r"<!-- run: demo -->\n```(bash|python)\n(.*?)```", re.DOTALL)
WITH_COMMANDS = [page for page in PAGES if BLOCK.search(page.read_text())]

AT_BUCKETS = re.compile(r"<!-- run: bucket -->\n```bash\n(.*?)```", re.DOTALL)

PRINTED = re.compile(
    r"<!-- run: terminal -->\n```bash\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL
)
"""A run's command, and its first and last `SHOWN` lines."""
SHOWN = 10
VARIES = re.compile(r"[\d,.]+ (tok/s|GiB)|\d+:\d\d:\d\d")
"""What the machine decides."""
DECIMAL = re.compile(r"\d+\.\d+")

DEMO = "deepspeed --num_gpus 2 launch/pretrain.py --deepspeed configs/zero3.json --max_steps 24 --merge_every 8"
DEMO += " --restart_warmup_steps 2 --warmup_steps 2 --eval_steps 12 --save_steps 12"


def run(folder, script, language="bash"):
    """Runs one block in `folder` and returns what it printed."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    command = (
        ["bash", "-euc", script]
        if language == "bash"
        else [sys.executable, "-c", script]
    )
    done = called(command, cwd=folder, env=environment)
    assert done.returncode == 0, (
        f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with links to the repository's own, in which a short demo has run."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("mora_ds", "launch", "tools", "configs", "LICENSE"):
        (folder / name).symlink_to(ROOT / name)
    run(folder, DEMO)
    return folder


@pytest.mark.parametrize(
    "page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_commands_of_a_page_run(checkout, page):
    for language, script in BLOCK.findall(page.read_text()):
        run(checkout, re.sub(r"--max_steps \d+", "--max_steps 6", script), language)


def test_the_commands_for_buckets_run(user, s3, tmp_path):
    store = fsspec.filesystem("s3")
    store.mkdir("bucket")
    inputs = {
        "model": user.model,
        "corpus/a.jsonl": user.train,
        "held.txt": user.held,
    }
    for name, path in inputs.items():
        store.put(str(path), f"bucket/{name}", recursive=True)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    page = (ROOT / "docs/guides/buckets.md").read_text()
    (script,) = AT_BUCKETS.findall(page)
    script = script.replace("--num_gpus 2", f"--num_gpus 2 --master_port {free_port()}")
    run(tmp_path, re.sub(r"--max_steps \d+", "--max_steps 4", script))
    assert (tmp_path / "merged/model.safetensors").is_file()


def test_a_run_prints_what_the_page_shows(checkout):
    page = (ROOT / "docs/guides/healthy-run.md").read_text()
    ((command, shown),) = PRINTED.findall(page)
    printed = run(checkout, command).splitlines()
    lines = "\n".join([*printed[:SHOWN], "...", *printed[-SHOWN:], ""])
    words, numbers = words_and_numbers(lines)
    shown_words, shown_numbers = words_and_numbers(shown)
    assert shown_words == words, f"for the page:\n{lines}"
    assert shown_numbers == pytest.approx(numbers, rel=0.05), f"for the page:\n{lines}"


def words_and_numbers(text):
    """A text without its decimals, and these, which other processors round differently."""
    steady = VARIES.sub("#", text)
    return DECIMAL.sub("#", steady), [
        float(number) for number in DECIMAL.findall(steady)
    ]


@pytest.mark.heavy(seconds=1)
def test_the_notebook_has_the_commands_of_its_page():
    page = ROOT / "docs/tutorials/first-run.md"
    blocks = re.findall(
        r"<!-- run: (?:demo|ci) -->\n```(bash|python)\n(.*?)```",
        page.read_text(),
        re.DOTALL,
    )
    commands = [
        f"%%bash\n{script}" if language == "bash" else script
        for language, script in blocks
    ]
    cells = read_json(page.with_suffix(".ipynb"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code == ["%cd ../..", *(command.rstrip() for command in commands)]
