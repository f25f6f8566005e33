"""A local directory kept on a volume, which is no disk: no rename, no append, no write in the middle, slow small files.

    <volume>/files/<sha256>             contents, each written once from beginning to end
    <volume>/snapshots/<number>.json    a state of the directory: path -> checksum and size; written last, with a
                                        checksum of its own: what has no such file was never finished

The run itself works on the local disk alone. `Mirror.save` copies what is new while it goes on; a save that is killed
leaves the snapshot before. `Mirror.restore` takes the newest snapshot of which every byte is there. Standard library
only: this runs in the platform's own Python.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

_CHUNK = 8 << 20
_KEPT = 2  # snapshots: should the newest be damaged, there is one before


class VolumeError(Exception):
    """In one line, what a volume refused."""


class Entry(NamedTuple):
    """A file of the directory as it was listed."""

    inode: int
    size: int
    mtime_ns: int


def _sha256(path: Path, size: int) -> str:
    """Of the first `size` bytes: a log may have grown since it was listed."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (chunk := file.read(min(_CHUNK, size))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()


def copy_file(source: Path, target: Path, size: int | None = None) -> None:
    """Write a new file on a volume from beginning to end; what stood there goes first."""
    left = source.stat().st_size if size is None else size
    target.unlink(missing_ok=True)
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while left > 0 and (chunk := reader.read(min(_CHUNK, left))):
            writer.write(chunk)
            left -= len(chunk)


def listing(directory: Path) -> dict[str, Entry]:
    """The files below a directory, by relative path; what vanishes meanwhile is left out."""
    found = {}
    for place, _, names in os.walk(directory):
        for name in names:
            path = Path(place) / name
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                found[str(path.relative_to(directory))] = Entry(status.st_ino, status.st_size, status.st_mtime_ns)
    return found


class Mirror:
    """`local`, kept on `volume`. One process at a time may save into the same place of a volume."""

    def __init__(self, local: Path, volume: Path):
        self.local, self.volume = Path(local), Path(volume)
        self._files, self._snapshots = self.volume / "files", self.volume / "snapshots"
        self._marker = self.local.parent / f"{self.local.name}.snapshot"  # which one `local` was saved as, or came from
        self._linked = self.local.parent / f"{self.local.name}.linked"
        self._digests: dict[Entry, str] = {}
        self._saved: dict[str, Entry] | None = None

    # --- saving -----------------------------------------------------------------------------------------

    def save(self) -> bool:
        """Copy the directory as it is now; False if it is on the volume already."""
        state = self._link()
        try:
            if state == self._saved:
                return False
            self._files.mkdir(parents=True, exist_ok=True)
            self._snapshots.mkdir(parents=True, exist_ok=True)
            there = {path.name: path.stat().st_size for path in self._files.iterdir()}
            files = {}
            for name, entry in sorted(state.items()):
                digest = self._digests.get(entry) or _sha256(self._linked / name, entry.size)
                self._digests[entry] = digest
                files[name] = [digest, entry.size]
                if there.get(digest) != entry.size:
                    copy_file(self._linked / name, self._files / digest, entry.size)
                    there[digest] = entry.size
            number = max(self._numbers(), default=0) + 1
            content = _manifest_bytes(files)
            with open(self._snapshot(number), "wb") as file:
                file.write(content)
            self._saved = state
            self._marker.write_text(str(number))
            self._prune()
            return True
        finally:
            shutil.rmtree(self._linked, ignore_errors=True)

    def _link(self) -> dict[str, Entry]:
        """Hard links to the directory's files as they are at one moment: the run may go on meanwhile.

        Files are never written twice under one inode, but for logs, which only grow.
        """
        while True:
            shutil.rmtree(self._linked, ignore_errors=True)
            self._linked.mkdir(parents=True)
            before = listing(self.local)
            try:
                for name in before:
                    (self._linked / name).parent.mkdir(parents=True, exist_ok=True)
                    os.link(self.local / name, self._linked / name)
            except FileNotFoundError:
                continue  # renamed or deleted in between
            after = listing(self.local)
            if {name: entry.inode for name, entry in before.items()} == {name: e.inode for name, e in after.items()}:
                return before

    def _prune(self) -> None:
        """Delete the snapshots before the last ones, then the contents that none of these needs."""
        numbers = self._numbers()
        for number in numbers[:-_KEPT]:
            self._snapshot(number).unlink(missing_ok=True)
        needed = set()
        for number in numbers[-_KEPT:]:
            files = self._read(number)
            if files is None:
                return  # what it needs is not known
            needed |= {digest for digest, _ in files.values()}
        for path in self._files.iterdir():
            if path.name not in needed:
                path.unlink()

    # --- restoring --------------------------------------------------------------------------------------

    def restore(self) -> int:
        """Fill `local` from the newest whole snapshot, unless it is at least as new; returns the snapshot's number.

        0: there is none. A file on the volume that is not what was written is deleted, so that it is written again.
        Raises `VolumeError` where snapshots are there and none is whole.
        """
        numbers = self._numbers()
        if self.local.is_dir() and self._local_number() >= max(numbers, default=0):
            return self._local_number()  # the same machine: the state on its disk is the newer one
        restoring = self.local.parent / f"{self.local.name}.restoring"
        for number in reversed(numbers):
            shutil.rmtree(restoring, ignore_errors=True)
            restoring.mkdir(parents=True)
            files = self._read(number)
            if files is not None and self._fetch(files, restoring):
                shutil.rmtree(self.local, ignore_errors=True)
                restoring.rename(self.local)
                self._marker.write_text(str(number))
                self._saved = listing(self.local)
                return number
            print(f"warning: snapshot {number} in {self.volume} is not whole: trying the one before", flush=True)
        shutil.rmtree(restoring, ignore_errors=True)
        if numbers:
            raise VolumeError(f"no snapshot in {self.volume} is whole: choose another run name, or delete that folder")
        self.local.mkdir(parents=True, exist_ok=True)
        return 0

    def _fetch(self, files: dict[str, tuple[str, int]], target: Path) -> bool:
        """Copy the files of a snapshot; False if one of them is not what was written."""
        whole = True
        for name, (digest, size) in files.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                copy_file(self._files / digest, path)
                whole &= path.stat().st_size == size and _sha256(path, size) == digest
            except FileNotFoundError:
                whole = False
            if not whole:
                (self._files / digest).unlink(missing_ok=True)
                return False
        return True

    def _local_number(self) -> int:
        try:
            return int(self._marker.read_text())
        except (FileNotFoundError, ValueError):
            return -1

    def _numbers(self) -> list[int]:
        """Of the snapshots on the volume, in order."""
        if not self._snapshots.is_dir():
            return []
        return sorted(int(path.stem) for path in self._snapshots.glob("*.json") if path.stem.isdigit())

    def _snapshot(self, number: int) -> Path:
        return self._snapshots / f"{number:08d}.json"

    def _read(self, number: int) -> dict[str, tuple[str, int]] | None:
        """Files of a snapshot by path; None if it was never finished, or is damaged."""
        try:
            raw = self._snapshot(number).read_bytes()
            files = json.loads(raw)["files"]
            if raw != _manifest_bytes(files):
                return None
            return {name: (digest, size) for name, (digest, size) in files.items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None


def _manifest_bytes(files: dict[str, list]) -> bytes:
    body = json.dumps(files, sort_keys=True)
    return json.dumps({"files": files, "sha256": hashlib.sha256(body.encode()).hexdigest()}, sort_keys=True).encode()


# --- for people -----------------------------------------------------------------------------------------

_STATE = (".resume", ".previous", ".replay", ".writing", ".broken", ".lock")  # of a run under way
_MANIFEST = "manifest.json"  # of a checkpoint or package: without it there is none


def publish(local: Path, target: Path) -> None:
    """Copy the results of a run as plain files: checkpoints, reports, logs, a directory's manifest last."""
    for name in sorted(listing(local), key=lambda name: (Path(name).name == _MANIFEST, name)):
        top = Path(name).parts[0]
        if top.startswith(".") or any(suffix in top for suffix in _STATE):
            continue
        source, copy = local / name, target / name
        size = source.stat().st_size
        if copy.is_file() and copy.stat().st_size == size and _sha256(copy, size) == _sha256(source, size):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            (copy.parent / _MANIFEST).unlink()  # not whole until the last file is there
        copy_file(source, copy, size)
