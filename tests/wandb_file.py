"""Reads what an offline W&B run left on disk, for tests: the format is LevelDB's log of protocol buffers."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER, _FIRST = 32768, 7, 7  # bytes of a block, of a chunk's header, and of the file's own header


def records(file: Path) -> Iterator[Record]:
    """All records of a `.wandb` file."""
    content, at, parts = file.read_bytes(), _FIRST, b""
    while at + _HEADER <= len(content):
        if _BLOCK - at % _BLOCK < _HEADER:  # too little is left of a block for a header
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (1, 4):  # whole, or the last of several
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Points (step, value) of each metric, in order."""
    points: dict[str, list[tuple[int, float]]] = {}
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                if not name.startswith("_"):
                    points.setdefault(name, []).append((record.history.step.num, value))
    return points
