"""The short cut of `tests/long/secrets_search.py`, and whether its search finds a key that is there."""

import base64
import gzip
import io
import zipfile

import pytest

from tests.long import secrets_search

NAME, KEY = next(iter(secrets_search.KEYS.items()))


def archive(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("data/member", content)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        KEY.encode(),
        b'{"headers": {"X-API-Key": "' + KEY.encode() + b'"}}',
        KEY.upper().encode(),
        KEY.encode().hex().upper().encode(),
        KEY.replace("/", "%2F").replace("+", "%2B").encode(),
        base64.b64encode(b"user:" + KEY.encode()),
        base64.b64encode(b"api:" + KEY.encode() + b"\n"),
        base64.urlsafe_b64encode(b"key " + KEY.encode()),
        gzip.compress(b"x" * 100 + KEY.encode(), mtime=0),
        archive(b"\0" * 100 + KEY.encode()),
        archive(gzip.compress(KEY.encode(), mtime=0)),
    ],
)
def test_the_search_finds_a_key(tmp_path, content):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(
        b"before" + content if content[:2] not in (b"\x1f\x8b", b"PK") else content
    )
    assert NAME in secrets_search.in_files(tmp_path)[0]


def test_the_search_finds_a_key_in_a_name_and_nothing_where_none_is(tmp_path):
    (tmp_path / "file").write_bytes(b"SAI_API_KEY is set" + bytes(1000))
    assert secrets_search.in_files(tmp_path) == []
    (tmp_path / KEY.replace("/", "-")).touch()
    assert secrets_search.in_files(tmp_path) == []
    (tmp_path / KEY).parent.mkdir()
    (tmp_path / KEY).touch()
    assert len(secrets_search.in_files(tmp_path)) >= 1


def test_no_script_tells_a_key(tmp_path):
    """Scripts that run and scripts that fail; the whole chain is for the drill."""
    assert secrets_search.run_and_search(tmp_path, ("evaluate", "mistakes")) == []
