"""What is said of the shipped policy is said of the one that is shipped."""

import re
from pathlib import Path

import pytest

from booster_soccer.store import checkpoints
from booster_soccer.tracking import video

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = checkpoints.load(ROOT / "assets" / "policies" / "final")


@pytest.mark.parametrize("document", ["README.md", "README.zh-TW.md", "docs/results.md"])
def test_results_name_the_shipped_checkpoint(document):
    """A hash of 16 digits beside the path of the shipped policy is its own, and every document names it."""
    text = (ROOT / document).read_text()
    assert SHIPPED.hash in text
    beside = re.findall(r"assets/policies/final`?\W{1,4}(?:checkpoint|hash)?\W{0,3}([0-9a-f]{16})\b", text)
    assert set(beside) <= {SHIPPED.hash}


@pytest.mark.parametrize("document", ["README.md", "README.zh-TW.md"])
def test_the_animated_picture_is_of_the_shipped_policy(document):
    """It stands in both READMEs with the checkpoint's hash; `make picture` makes it again."""
    [(hash_, file)] = re.findall(
        r"!\[[^\]]*?([0-9a-f]{16})[^\]]*\]\((docs/figures/play\.\w+)\)", (ROOT / document).read_text()
    )
    assert hash_ == video.mark_of(ROOT / file) == SHIPPED.hash
    assert (ROOT / file).stat().st_size < 3_000_000


def test_the_shipped_policy_comes_from_committed_code_and_names_its_ancestors():
    assert SHIPPED.manifest["code"]["dirty"] is False
    on_disk = {checkpoints.load(path.parent).hash for path in (ROOT / "assets" / "policies").glob("*/manifest.json")}
    assert {ancestor["hash"] for ancestor in SHIPPED.manifest["lineage"]} <= on_disk
    assert [parent["stage"] for parent in SHIPPED.manifest["parents"]] == ["converted"]
