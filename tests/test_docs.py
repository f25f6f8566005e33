"""Documents: links lead somewhere, so do messages, the two READMEs agree, and the scripts of commands exist."""

import ast
import re
from pathlib import Path

import pytest

import submit
from booster_soccer import errors
from booster_soccer.errors import More
from cloud import environment

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
SOURCES = {path: path.read_text() for place in (".", "booster_soccer", "booster_soccer/*", "benchmarks", "cloud")
           for path in sorted(ROOT.glob(f"{place}/*.py"))}  # fmt: skip


def sections(file: Path) -> dict[str, str]:
    """What stands under each of a Markdown file's headings, by the anchors that GitHub makes of them."""
    text = re.sub(r"^```.*?^```", lambda block: block[0].replace("\n#", "\n #"), file.read_text(), flags=re.M | re.S)
    parts = re.split(r"^#+ (.*)$", text, flags=re.M)
    titles = (re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title).strip().lower()) for title in parts[1::2])
    return dict(zip((title.replace(" ", "-") for title in titles), parts[2::2]))


def anchors(file: Path) -> set[str]:
    """The anchors in a Markdown file."""
    return set(sections(file))


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


# --- what messages point to -------------------------------------------------------------------------------


def quoted(paragraph: str) -> set[str]:
    """The pieces of messages in a paragraph's code, cut where `...` stands for what differs; a word or two is none."""
    code = re.findall(r"```(.*?)```|`([^`]+)`", paragraph, flags=re.S)
    pieces = (piece for spans in code for piece in re.split(r"\.\.\.|[:;] ", " ".join("".join(spans).split())))
    return {piece.strip(" ,;:") for piece in pieces if len(piece.split()) > 2}


def said_in(source: str) -> str:
    """The strings in a source file, one a line, an f-string with `...` for what is put in."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        lines.append("".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts))
    return "\n".join(lines)


@pytest.mark.parametrize("more", More, ids=lambda more: more.name)
def test_what_a_message_points_to_is_there_and_quotes_it(more):
    file, anchor = more.value.removeprefix("more: ").split("#")
    assert anchor.isascii() and anchor in anchors(ROOT / file)
    users = [source for source in SOURCES.values() if f"{{More.{more.name}}}" in source]
    assert users, "no message ends with it"
    texts = "\n".join(map(said_in, users))
    assert any(piece in texts for piece in quoted(sections(ROOT / file)[anchor]))


def test_messages_point_to_guides_by_that_one_list():
    """What no test would find otherwise: a paragraph written by hand."""
    by_hand = re.compile(r"docs/\S+\.md#|more: ")
    found = {path.name for path, source in SOURCES.items() if by_hand.search(source)}
    assert found == {"errors.py", "checkpoints.py", "environment.py"}  # the list; cuts one off; must not import it
    assert environment.More.ENVIRONMENT == More.ENVIRONMENT


def test_an_error_ends_with_the_paragraph_in_its_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(submit.KEY_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as ended:
        errors.run(submit.main, submit.Config(tmp_path / "checkpoint", tmp_path / "out", yes=True))
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: no API key: set SAI_API_KEY to your account's key, or leave out --yes; "
        "more: docs/03-finetuning-submission.md#submission-refused\n"
    )


# --- the two READMEs, and commands ------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["README.md", "README.zh-TW.md"])
def test_what_the_readme_says_lies_in_assets_is_there(name):
    """The table names runs, not paths: their metrics, and nothing else, lie in `assets/training`."""
    (row,) = (line for line in (ROOT / name).read_text().splitlines() if line.startswith("| `assets/training/`"))
    there = {path.name.split(".")[0] for path in (ROOT / "assets/training").iterdir()}
    assert there == set(re.findall(r"(?<![A-Za-z`])[a-z]\d(?!\d)", row))
