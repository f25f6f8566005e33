"""The replay buffer: a ring of transitions in memory, and on disk as append-only segments.

    <segments>/000000000000-000000065536.safetensors    rows [first, last), counted since the run's start

A save writes only the rows added since the one before. Segments carry no completion marker of their own: the
index (first, last and SHA-256 of each) lies in the checkpoint that needs them, and is written after they are
flushed. A file that no checkpoint lists is a leftover of a killed save, and is written over or deleted.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from booster_soccer.errors import UserError
from booster_soccer.store.atomic import OTHER_PLACE, os_errors, sync_directory

SEGMENT_ROWS = 1 << 16  # at most: bounds the memory that reading one needs
_SEGMENT = re.compile(r"[0-9]{12,}-[0-9]{12,}\.safetensors", re.ASCII)
REFILL = "give --resume-buffer refill to go on with an empty buffer"


class Rows(Protocol):
    """What `Segments.write` reads of a ring: rows are counted since the start."""

    added: int  # rows ever
    capacity: int

    def __len__(self) -> int: ...

    def rows(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Rows [first, last), which lie side by side in the ring."""


class Replay:
    """Rows of named float32 arrays in a ring in host memory."""

    def __init__(self, capacity: int, shapes: Mapping[str, tuple[int, ...]]):
        """`shapes` of one row, by name."""
        self.arrays = {name: np.zeros((capacity, *shape), np.float32) for name, shape in shapes.items()}
        self.capacity = capacity
        self.added = 0  # rows ever; row r lies at r modulo the capacity

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, **rows: np.ndarray) -> None:
        """Append B rows, each array with a leading axis B."""
        count = len(next(iter(rows.values())))
        where = np.arange(self.added, self.added + count) % self.capacity
        for name, values in rows.items():
            self.arrays[name][where] = values
        self.added += count

    def sample(self, rng: np.random.Generator, shape: int | tuple[int, ...]) -> dict[str, np.ndarray]:
        """Rows drawn uniformly, with leading axes `shape`."""
        where = rng.integers(0, len(self), shape)
        return {name: values[where] for name, values in self.arrays.items()}

    def rows(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Views of rows [first, last), counted since the start, which lie side by side in the ring."""
        start = first % self.capacity
        return {name: values[start : start + last - first] for name, values in self.arrays.items()}

    def put(self, first: int, rows: Mapping[str, np.ndarray]) -> None:
        """Write rows (N, ...) to where rows [first, first + N) lie."""
        where = np.arange(first, first + len(next(iter(rows.values())))) % self.capacity
        for name, values in rows.items():
            self.arrays[name][where] = values


class Segments:
    """The rows of a ring on disk. Tables list segments: `first` and `last` (N,) int64, `sha256` (N, 32) uint8."""

    def __init__(self, directory: Path, remedy: str = REFILL):
        """`remedy` is what to do where rows are missing or damaged."""
        if os.path.lexists(directory) and not directory.is_dir():
            raise UserError(f"{directory} is needed for the replay buffer: move it away, or choose another output")
        self.directory, self._remedy = directory, remedy
        self._table: dict[str, np.ndarray] = {"first": np.zeros(0, np.int64), "last": np.zeros(0, np.int64),
                       "sha256": np.zeros((0, 32), np.uint8)}  # fmt: skip

    def write(self, replay: Rows) -> dict[str, np.ndarray]:
        """Write, flushed to disk, what was added since the last call; returns the table of all that is needed."""
        oldest = replay.added - len(replay)
        written = self._table["last"][-1] if len(self._table["last"]) else 0
        new = []
        with os_errors(f"write replay segments into {self.directory}", OTHER_PLACE):
            os.makedirs(self.directory, exist_ok=True)
            first = max(int(written), oldest)
            while first < replay.added:
                end_of_ring = first - first % replay.capacity + replay.capacity
                last = min(first + SEGMENT_ROWS, replay.added, end_of_ring)
                new.append((first, last, self._write_one(first, last, replay.rows(first, last))))
                first = last
            if new:
                sync_directory(self.directory)
        needed = self._table["last"] > oldest
        self._table = {
            "first": np.append(self._table["first"][needed], [np.int64(first) for first, _, _ in new]).astype(np.int64),
            "last": np.append(self._table["last"][needed], [np.int64(last) for _, last, _ in new]).astype(np.int64),
            "sha256": np.concatenate([self._table["sha256"][needed], *(d[None] for _, _, d in new)]),
        }
        return dict(self._table)

    def _write_one(self, first: int, last: int, rows: dict[str, np.ndarray]) -> np.ndarray:
        path, digest = self.directory / _name(first, last), hashlib.sha256()
        path.unlink(missing_ok=True)  # a killed save's
        try:
            with open(path, "xb") as file:
                for part in _safetensors(rows):
                    file.write(part)
                    digest.update(part)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)  # on a full disk the room is needed
            raise
        return np.frombuffer(digest.digest(), np.uint8)

    def read(self, table: Mapping[str, np.ndarray], replay: Replay, added: int) -> None:
        """Fill `replay` with the rows of a table, as of when `added` rows had been added."""
        oldest = max(0, added - replay.capacity)
        self._check(table, oldest, added)
        for first, last, digest in zip(table["first"].tolist(), table["last"].tolist(), table["sha256"]):
            rows = self._read_one(first, last, digest, replay)
            skip = max(0, oldest - first)
            replay.put(first + skip, {name: values[skip:] for name, values in rows.items()})
        replay.added = added
        self._table = {name: np.array(values) for name, values in table.items()}

    def _read_one(self, first: int, last: int, digest: np.ndarray, replay: Replay) -> dict[str, np.ndarray]:
        path = self.directory / _name(first, last)
        with os_errors(f"read replay segment {path}", self._remedy):
            if not path.is_file():
                raise UserError(f"replay segment {path} is missing: {self._remedy}")
            content = path.read_bytes()
        if hashlib.sha256(content).digest() != digest.tobytes():
            raise UserError(f"replay segment {path} is damaged: {self._remedy}")
        try:
            rows = safetensors.numpy.load(content)
        except (SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"replay segment {path} is no safetensors file: {self._remedy}") from error
        expected = {name: (last - first, *values.shape[1:]) for name, values in replay.arrays.items()}
        if {name: values.shape for name, values in rows.items()} != expected or any(
            values.dtype != np.float32 for values in rows.values()
        ):
            raise UserError(f"replay segment {path} holds other arrays than this run's buffer: {self._remedy}")
        return rows

    def _check(self, table: Mapping[str, np.ndarray], oldest: int, added: int) -> None:
        """Raise `UserError` unless the table lists rows [oldest, added) without a gap."""
        kinds = {name: (values.dtype, values.shape[1:], values.ndim) for name, values in table.items()}
        if kinds == {name: (values.dtype, values.shape[1:], values.ndim) for name, values in self._table.items()}:
            first, last = table["first"], table["last"]
            if len(first) == len(last) == len(table["sha256"]):
                whole = np.array_equal(first[1:], last[:-1]) and bool((last - first <= SEGMENT_ROWS).all())
                if added == 0 and len(first) == 0:
                    return
                if whole and len(first) and 0 <= first[0] <= oldest and last[-1] == added and (first < last).all():
                    return
        raise UserError(f"the list of replay segments in {self.directory} is not whole: {self._remedy}")

    def delete_all_but(self, *tables: Mapping[str, np.ndarray]) -> None:
        """Delete the segments that none of the tables lists, and the directory if it is then empty."""
        needed = {_name(int(start), int(end)) for table in tables for start, end in zip(table["first"], table["last"])}
        with os_errors(f"delete replay segments in {self.directory}", OTHER_PLACE):
            if self.directory.is_dir():
                for path in self.directory.iterdir():
                    if _SEGMENT.fullmatch(path.name) and path.name not in needed:
                        path.unlink()
                if not any(self.directory.iterdir()):
                    self.directory.rmdir()


def _safetensors(rows: Mapping[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of float32 arrays, without a copy of them: a save costs half as much."""
    header, end = {}, 0
    for name, values in rows.items():
        start, end = end, end + values.nbytes
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for values in rows.values():
        yield np.ascontiguousarray(values).data.cast("B")


def _name(first: int, last: int) -> str:
    return f"{first:012d}-{last:012d}.safetensors"
