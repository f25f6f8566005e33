"""Documents: links lead somewhere, the two READMEs agree, and the flags that guides name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


def anchors(file: Path) -> set[str]:
    """A Markdown file's headings as GitHub makes anchors of them."""
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title).strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document):
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def rows(readme: str) -> list[list[str]]:
    """The numbers in the lines of a README's result tables, and how many rows each other table has."""
    lines = [line for line in (ROOT / readme).read_text().splitlines() if line.startswith("|")]
    return [re.findall(r"[+-]\d+\.\d+|\d+ %", line) for line in lines]


def test_the_two_readmes_have_the_same_tables_and_numbers():
    english, chinese = rows("README.md"), rows("README.zh-TW.md")
    assert english == chinese and sum(map(bool, english)) > 8


def test_the_two_readmes_have_as_many_sections_and_the_same_code():
    texts = [(ROOT / name).read_text() for name in ("README.md", "README.zh-TW.md")]
    assert len({len(re.findall(r"^## ", text, flags=re.M)) for text in texts}) == 1
    blocks = [re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S) for text in texts]
    commands = [[re.sub(r"\s+#.*", "", line).split() for block in of_one[1:] for line in block.splitlines()]
                for of_one in blocks]  # fmt: skip
    assert commands[0] == commands[1]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_script_of_a_command_exists(document):
    named = re.findall(r"\.venv/bin/python (?:-m ([\w.]+)|([\w/]+\.py))", document.read_text())
    for module, script in named:
        path = ROOT / (script or module.replace(".", "/") + ".py")
        is_ours = bool(script) or module.split(".")[0] in ("benchmarks", "booster_soccer", "cloud", "tests")
        assert path.exists() or not is_ours or module.endswith("NAME"), f"{document.name}: {path.name}"
