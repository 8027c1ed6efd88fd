"""What the documentation promises: pages equal the code, links lead somewhere, commands are
marked.
"""

import re
from functools import lru_cache

import pytest

from mora_ds.common.version import __version__
from tests.helpers.pages import FENCE, PAGES, ROOT, prose
from tools import docs
from tools.docs_matrix import COLUMNS, OPTIONS, why_refused

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page):
    """What the titles of a page are called in links, as GitHub and mkdocs make it of
    them.
    """
    names = set()
    for title in re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower().replace("`", "")
        names.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return names


def links():
    for page in PAGES:
        for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
            if not re.match(r"https?:", target):
                yield page, target


def test_every_relative_link_leads_to_a_file_and_a_title():
    broken = []
    for page, target in links():
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (
            anchor and path.suffix == ".md" and anchor not in anchors(path)
        ):
            broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


GENERATED = ["cli.md", "api.md", "support-matrix.md"]


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_page_is_what_the_code_says(name):
    (path,) = (path for path in written() if path.name == name)
    assert path.read_text() == written()[path], "run tools/docs.py"


@lru_cache
def written():
    """All generated pages, made once."""
    return docs.pages()


def test_the_support_matrix_asks_the_checks_of_a_run():
    lora = OPTIONS["`--adapter lora`"]
    full = OPTIONS["`--adapter full`"]
    assert "--tensor_parallel_size 2" in (
        why_refused(lora, COLUMNS["tensor parallel"]) or ""
    )
    assert "--merge_every" in (why_refused(full, COLUMNS["ReMoRA merges"]) or "")
    assert (
        why_refused(OPTIONS["`--operator share`"], COLUMNS["tensor parallel"]) is None
    )
    assert (
        why_refused(OPTIONS["`--tensor_parallel_size`"], COLUMNS["ZeRO 1"]) is not None
    )


def test_the_readme_is_one_screen_of_reading():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 1000


def test_every_block_of_commands_says_whether_it_is_run():
    unmarked = []
    for page in PAGES:
        lines = page.read_text().splitlines()
        for number, line in enumerate(lines):
            if line.strip() == "```bash" and page.parent != ROOT / "tools":
                mark = lines[number - 1]
                if (
                    not re.fullmatch(
                        r"<!-- (run: (demo|ci|terminal|bucket)|not run: .+) -->", mark
                    )
                    and page.name != "CONTRIBUTING.md"
                ):
                    unmarked.append(f"{page.relative_to(ROOT)}:{number + 1}")
    assert not unmarked


def test_commands_are_not_cut_off():
    wide = []
    for page in (ROOT / "docs").rglob("*.md"):
        for block in re.findall(
            r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
        ):
            wide += [
                f"{page.relative_to(ROOT)}: {line}"
                for line in block.splitlines()
                if len(line) > 75
            ]
    assert not wide


def test_the_pages_can_be_read_in_an_afternoon():
    assert (
        sum(len(page.read_text().split()) for page in (ROOT / "docs").rglob("*.md"))
        <= 25_500
    )


def test_what_the_check_of_a_landing_runs_is_what_the_pages_say():
    script = (ROOT / ".ci/run").read_text()
    for page in (ROOT / "README.md", ROOT / "docs/quickstart.md"):
        (block,) = re.findall(
            r"<!-- run: ci -->\n```bash\n(.*?)```", page.read_text(), flags=re.DOTALL
        )
        (demo,) = re.findall(r"deepspeed (--num_gpus.*)", block)
        assert f"deepspeed {demo}" in script


def test_the_pages_of_the_site_are_all_in_its_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = {
        str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")
    }
    assert pages == set(re.findall(r": (\S+\.md)$", navigation, flags=re.MULTILINE))


def test_the_citation_names_this_version():
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


OTHERS = """
--num_gpus --hostfile --include --exclude --no_ssh --node_rank --master_addr
--master_port --nnodes --nproc_per_node --nodes --signal --stop --strict --relora
--help --logdir --module --no --enable --lora --max --rdzv --standalone --env
--local --model_args
"""
"""Flags of other programs: launchers, sbatch, SkyPilot, hf, mkdocs, vLLM, ReLoRA's own code."""


def test_every_flag_that_a_page_names_exists():
    folders = (ROOT / "tools", ROOT / "mora_ds/research")
    programs = [
        ROOT / "docs/reference/cli.md",
        *(path for folder in folders for path in folder.rglob("*.py")),
    ]
    texts = [path.read_text() for path in programs]
    known = {flag for text in (*texts, OTHERS) for flag in re.findall(r"--\w+", text)}
    unknown = {}
    for page in PAGES:
        text = page.read_text()
        code = " ".join(
            [*FENCE.findall(text), *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]
        )
        named = set(re.findall(r"(?<![\w-])--[a-z]\w+", code)) - known
        if named and page.name != "CONTRIBUTING.md":
            unknown[str(page.relative_to(ROOT))] = named
    assert not unknown
