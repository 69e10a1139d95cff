"""The README and docs/: every example that can run is run, and every page is current."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import examples  # noqa: E402
import make  # noqa: E402

WRITTEN = [page for page in examples.PAGES if page not in examples.GENERATED]
NOT_RUN = 8


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_examples_run_and_print_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    environment = examples.prepare(tmp_path)
    for block in examples.blocks(page):
        if block.runs:
            assert examples.run(block, tmp_path, environment) == block.body, f"{block}\nrun python docs/make.py"


def test_few_examples_are_not_run_and_each_says_why() -> None:
    blocks = [block for page in WRITTEN for block in examples.blocks(page)]
    assert sum(block.language in examples.RUN for block in blocks) > 40
    assert len([block for block in blocks if block.reason]) == NOT_RUN
    assert {block.language for block in blocks} <= {*examples.RUN, "bash", "text", "toml", "{toctree}", "{include}", ""}


def test_the_command_reference_is_current() -> None:
    assert (examples.DOCS / "reference.md").read_text(encoding="utf-8") == make.reference(), "run python docs/make.py"


def test_the_picture_shows_what_is_printed(tmp_path: Path) -> None:
    environment = examples.prepare(tmp_path)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", make.printed(tmp_path, environment))
    drawn = ElementTree.parse(examples.DOCS / "inspect.svg").getroot()
    text = "".join("".join(element.itertext()) for element in drawn.iter("{http://www.w3.org/2000/svg}text"))
    assert re.sub(r"\s+", "", printed) in re.sub(r"\s+", "", text), "run python docs/make.py"
    svg = (examples.DOCS / "inspect.svg").read_text(encoding="utf-8")
    assert not re.search(r"(?:href|src|url)\s*[=(]\s*[\"']?https?:", svg)  # a page loads nothing from elsewhere


def anchors(page: Path) -> Iterator[str]:
    """What a heading can be linked by, as GitHub and MyST have it."""
    for title in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
        yield re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("page", examples.PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        path, _, anchor = link.partition("#")
        if link.startswith("https://"):  # of the world outside, which is not asked
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in set(anchors(target)), link


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (examples.DOCS / "index.md").read_text(encoding="utf-8")
    listed = re.search(r"```\{toctree\}\n(.*?)```", index, re.S)
    assert listed
    pages = {line for line in listed[1].splitlines() if line and not line.startswith(":")}
    assert pages == {page.stem for page in examples.DOCS.glob("*.md")} - {"index"}


def test_the_readme_is_short_and_names_every_format() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 120
    assert "Linux" in readme
    assert "macOS" in readme
