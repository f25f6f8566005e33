"""Damaged, foreign and hostile inputs: each must be refused with one clear line, or do no harm.

    python benchmarks/fuzz.py --examples 10000

Changed bytes and truncations of every file of a checkpoint; files and manifests with right checksums and wrong
contents (types, huge numbers, paths that lead out, foreign layouts); replay segments and their lists; saved
states of both long stages; flags. While an example is judged, nothing outside its directory may be opened,
and no process, pickle or shell started. Exit status 1, with the example's number, at the first failure; the
same `--seed` and number give the same example.
"""

import contextlib
import copy
import functools
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoints  # noqa: E402
import errors  # noqa: E402
import finetune_ddpg  # noqa: E402
import train_mjx_sac  # noqa: E402
from envs import constants as c  # noqa: E402
from errors import UserError  # noqa: E402
from models.numpy_policy import policy_from_arrays  # noqa: E402
from preprocess.observation import OBS_SIZE  # noqa: E402
from replay import Replay, Segments  # noqa: E402

_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class",
              "socket.connect", "shutil.rmtree", "os.remove", "os.rename", "os.truncate", "ctypes.dlopen")  # fmt: skip


@dataclass(frozen=True)
class Config:
    """How many examples, and which."""

    examples: int = 10_000
    seed: int = 0
    first: int = 0  # number of the first example, to see one again


class Broken(Exception):
    """An example did what none may do."""


# --- the watch ----------------------------------------------------------------------------------------

_watched: Path | None = None  # while an example is judged, the only place where files may be opened
_seen: list[str] = []


def _audit(event: str, arguments: tuple) -> None:
    if _watched is None:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = Path(os.path.realpath(os.fsdecode(arguments[0])))
        # Python itself reads modules late; and /dev/null is nowhere.
        if not path.is_relative_to(_watched) and path.suffix not in (".py", ".pyc", ".so"):
            _seen.append(f"opened {path}")
    elif event in _FORBIDDEN:
        _seen.append(f"{event} {arguments[:2]!r}")


@contextlib.contextmanager
def watched(place: Path) -> Iterator[None]:
    """Raise `Broken` if anything outside `place` is opened, or any process or pickle started."""
    global _watched
    _seen.clear()
    _watched = Path(os.path.realpath(place))
    try:
        yield
    finally:
        _watched = None
    if _seen:
        raise Broken("; ".join(_seen[:3]))


def refused(action: Callable[[], Any], what: str) -> bool:
    """Whether `action` is refused, which must be with one printable line."""
    try:
        action()
    except UserError as error:
        line = str(error)
        line.encode()
        if "\n" in line or not 10 < len(line) < 1000:
            raise Broken(f"{what}: the message is not one clear line: {line[:200]!r}") from error
        return True
    return False


# --- mutations ----------------------------------------------------------------------------------------


def other_bytes(rng: random.Random, content: bytes) -> bytes:
    """Changed content: flips, cuts, insertions, zeros."""
    kind = rng.choice(["flip", "flip", "truncate", "insert", "delete", "zero", "empty", "double"])
    at = rng.randrange(len(content) + 1) if rng.random() < 0.5 else rng.randrange(min(len(content), 400) + 1)
    if kind == "flip" and content:
        changed = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            changed[min(at + rng.randrange(8), len(content) - 1)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    length = rng.randint(1, 64)
    return {
        "truncate": content[:at],
        "insert": content[:at] + rng.randbytes(length) + content[at:],
        "delete": content[:at] + content[at + length :],
        "zero": content[:at] + bytes(length) + content[at + length :],
        "double": content * 2,
    }.get(kind, b"")


def other_value(rng: random.Random, depth: int = 0) -> Any:
    """Any value that JSON can hold, hostile ones included."""
    simple = [None, True, 0, -1, 2**63, 10**400, 1e308, "", "x", "../../etc/passwd", "/etc/passwd", "a\nb", "\ud800",
              "pretrained", "arrays.safetensors/../x", "x" * 5000, "__import__('os')", [], {}]  # fmt: skip
    kind = rng.random()
    if depth < 3 and kind < 0.1:
        return [other_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if depth < 3 and kind < 0.2:
        return {str(other_value(rng, 3))[:20]: other_value(rng, depth + 1) for _ in range(rng.randint(0, 3))}
    return rng.choice(simple)


def change_somewhere(rng: random.Random, node: Any) -> None:
    """Replace, delete or add one entry of nested dictionaries and lists, in place."""
    while True:
        key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not (isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.6):
            break
        node = node[key]
    kind = rng.choice(["replace", "replace", "delete", "add"])
    if kind == "delete":
        del node[key]
    elif kind == "add" and isinstance(node, dict):
        node[str(other_value(rng, 3))[:40]] = other_value(rng)
    else:
        node[key] = other_value(rng)


def other_table(rng: random.Random, table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of which one is missing, new, or of another type, shape or content."""
    table = dict(table)
    name = rng.choice(sorted(table)) if table else "new"
    value = table.get(name, np.zeros(3))
    kind = rng.choice(["drop", "add", "type", "shape", "flat", "empty", "huge", "negative", "random"])
    if kind == "drop":
        table.pop(name, None)
    elif kind == "add":
        table[rng.choice(["new", "../x", name + ".0", "a.b.c.d", ""])] = value
    elif kind == "type":
        table[name] = value.astype(rng.choice([np.float64, np.float32, np.int8, np.int64, np.uint64, bool]))
    elif kind == "shape":
        table[name] = np.stack([value, value]) if rng.random() < 0.5 else value[..., None]
    elif kind == "flat":
        table[name] = value.ravel()[: rng.randint(0, value.size)]
    elif kind == "empty":
        table[name] = np.zeros((0, *value.shape[1:]), value.dtype)
    else:
        numbers = {"huge": 2**62, "negative": -(2**62), "random": rng.randint(-1000, 1000)}
        with np.errstate(all="ignore"):
            table[name] = np.full(value.shape, np.array(numbers[kind]).astype(value.dtype))
    return table


# --- what is attacked ---------------------------------------------------------------------------------


class Attacks:
    """Good inputs of every kind in one directory, and one method for each kind of attack on them."""

    def __init__(self, place: Path):
        self.place = place
        self.mutant = place / "mutant"
        self.good = self._converted(place / "good")
        self.arrays = checkpoints.load(self.good).arrays
        shutil.copytree(self.good, self.mutant)
        self.segments = Segments(place / "replay")
        replay = Replay(60, {"obs": (3,), "reward": ()})
        replay.add(obs=np.ones((50, 3), np.float32), reward=np.ones(50, np.float32))
        self.table = self.segments.write(replay)

    @functools.cached_property
    def states(self) -> list[tuple[Callable, dict]]:
        """A function that takes up the saved state, and its tables, of both long stages."""
        return [self._pretraining(self.place / "a"), self._finetuning(self.place / "b")]

    @staticmethod
    def _converted(path: Path) -> Path:
        arrays = finetune_ddpg.random_arrays(0, np.zeros(OBS_SIZE, np.float32), np.ones(OBS_SIZE, np.float32))
        obs = np.random.default_rng(0).normal(size=(checkpoints.GOLDEN_PAIRS, OBS_SIZE)).astype(np.float32)
        actions = policy_from_arrays(arrays)(obs).astype(np.float32)
        return checkpoints.save(path, "converted", arrays, obs, actions, {"a": [1, {"b": 2}]}, 0, 1, None, {},
                                {"more": {"x": np.arange(5)}})  # fmt: skip

    @staticmethod
    def _pretraining(out: Path) -> tuple[Callable, dict]:
        config = train_mjx_sac.Config(out, engine="native", num_envs=4, buffer_size=64, evaluation_lanes=3, dr_level=1)
        run = train_mjx_sac.Run(train_mjx_sac.resolve(config))
        run.save()
        saved = checkpoints.load(out.with_name(f"{out.name}.resume"))
        run.close()
        return (lambda: run._take_up(saved)), _tables(saved)

    @staticmethod
    def _finetuning(out: Path) -> tuple[Callable, dict]:
        lanes = mock.Mock()
        lanes.task = list(c.TASKS)
        lanes.state.return_value = {"lane_episode": np.zeros(3, np.int64), "lane_length": np.zeros(3, np.int64),
                                    "lane_actions": np.zeros((3, c.EPISODE_ACTIONS, c.NUM_JOINTS), np.float32)}  # fmt: skip
        obs = np.zeros((3, OBS_SIZE), np.float32)
        lanes.restore.return_value = obs, None
        config = finetune_ddpg.Config(out, from_scratch=True, num_lanes=3, buffer_size=64, warmup_steps=32, batch_size=8,
                                      validation_episodes=2, device="cpu")  # fmt: skip
        run = finetune_ddpg.Run(finetune_ddpg.resolve(config), lanes)
        mean, scale = np.zeros(OBS_SIZE, np.float32), np.ones(OBS_SIZE, np.float32)
        run.start_arrays, run.obs = finetune_ddpg.random_arrays(0, mean, scale), obs
        run.start_scores = finetune_ddpg.Scores(*np.zeros((4, c.NUM_TASKS, 2)))
        run.learner = finetune_ddpg.Learner(run.config, run.start_arrays, mean, scale)
        run.replay.add(
            **{name: np.zeros((20, *shape), np.float32) for name, shape in finetune_ddpg._ROW_SHAPES.items()}
        )
        run.update(2, ("input", "hidden", "output"))
        path = out.with_name(f"{out.name}.resume")
        run.save(path, None)
        saved = checkpoints.load(path)
        return (lambda: run.restore(saved)), _tables(saved)

    def bytes(self, rng: random.Random) -> None:
        """A changed byte of any file: always refused."""
        path = self.mutant / rng.choice(sorted(entry.name for entry in self.good.iterdir()))
        original = path.read_bytes()
        changed = other_bytes(rng, original)
        path.write_bytes(changed)
        try:
            with watched(self.mutant):
                said = refused(lambda: checkpoints.load_extra(checkpoints.load(self.mutant), "more"), path.name)
        finally:
            path.write_bytes(original)
        if said == (changed == original):
            raise Broken(f"{path.name}: {'refused' if said else 'loaded with changed bytes'}")

    def sealed_file(self, rng: random.Random) -> None:
        """A wrong file whose checksum is right: refused, or arrays that may be had."""
        name = rng.choice(["arrays", "golden", "more"]) + ".safetensors"
        content = other_bytes(rng, (self.good / name).read_bytes())
        self._load_sealed({name: content}, lambda manifest: None)

    def manifest(self, rng: random.Random) -> None:
        """A wrong manifest whose checksum is right."""
        self._load_sealed({}, lambda manifest: change_somewhere(rng, manifest))

    def foreign_manifest(self, rng: random.Random) -> None:
        """No manifest of ours at all: always refused."""
        foreign = [b"", b"[]", b"null", b"[" * 100_000, b'{"format": 1}', b'{"a":' * 5000, b"\xff\xfe", b"1e999", b"NaN",
                   b"\x80\x04.", json.dumps(other_value(rng)).encode(), rng.randbytes(rng.randint(1, 300)),
                   json.dumps({"format": checkpoints.FORMAT, "schema_version": rng.choice([1, 2, "1", None, 1e99])}).encode(),
                   b'{"n": ' + b"9" * 10_000 + b"}"]  # fmt: skip
        path = self.mutant / checkpoints.MANIFEST
        original = path.read_bytes()
        path.write_bytes(rng.choice(foreign))
        try:
            with watched(self.mutant):
                if not refused(lambda: checkpoints.load(self.mutant), "manifest"):
                    raise Broken("a foreign manifest was loaded")
        finally:
            path.write_bytes(original)

    def _load_sealed(self, files: dict[str, bytes], change: Callable[[dict], None]) -> None:
        manifest = json.loads((self.good / checkpoints.MANIFEST).read_bytes())
        for name, content in files.items():
            (self.mutant / name).write_bytes(content)
            manifest["files"][name] = checkpoints.hashlib.sha256(content).hexdigest()
        change(manifest)
        (self.mutant / checkpoints.MANIFEST).write_bytes(checkpoints._manifest_bytes(manifest))
        loaded: list = []

        def load() -> None:
            checkpoint = checkpoints.load(self.mutant, ("converted",))
            loaded.append(checkpoint)
            checkpoints.load_extra(checkpoint, "more")

        try:
            with watched(self.mutant):
                refused(load, "sealed")
        finally:
            for name in (checkpoints.MANIFEST, *files):
                shutil.copy(self.good / name, self.mutant / name)
        for checkpoint in loaded:
            if not all(np.isfinite(value).all() for value in checkpoint.arrays.values()):
                raise Broken("numbers that are not finite were loaded")
            if not files and any(
                not np.array_equal(value, self.arrays[name]) for name, value in checkpoint.arrays.items()
            ):
                raise Broken("other arrays were loaded")

    def segment(self, rng: random.Random) -> None:
        """A changed replay segment, or list of them: refused, or the very rows."""
        table, (path,) = self.table, self.segments.directory.iterdir()
        original = path.read_bytes()
        if rng.random() < 0.5:
            path.write_bytes(other_bytes(rng, original))
        else:
            table = other_table(rng, table)
        unchanged = path.read_bytes() == original
        replay = Replay(60, {"obs": (3,), "reward": ()})
        try:
            with watched(self.segments.directory):
                said = refused(lambda: Segments(self.segments.directory).read(table, replay, 50), "segment")
        finally:
            path.write_bytes(original)
        if not said and not (unchanged and replay.added == 50 and (replay.arrays["reward"][:50] == 1).all()):
            raise Broken("wrong rows were loaded")

    def state(self, rng: random.Random) -> None:
        """A saved state with right checksums and wrong contents: refused, or taken up without a crash."""
        take_up, tables = rng.choice(self.states)
        tables = copy.copy(tables)
        name = rng.choice(sorted(tables))
        tables[name] = other_table(rng, tables[name])
        with mock.patch.object(checkpoints, "load_extra", lambda _, name: dict(tables[name])), watched(self.place):
            refused(take_up, name)

    def flags(self, rng: random.Random) -> None:
        """Command lines: refused by one line or by the parser, or resolved."""
        stage = rng.choice([train_mjx_sac, finetune_ddpg])
        names = ["--out", "--preset", "--seed", "--num-envs", "--dr-level", "--total-steps", "--batch-size", "--resume",
                 "--buffer-size", "--engine", "--checkpoint", "--num-lanes", "--discount", "--from-scratch", "--device",
                 "--weights.fallen", "--time-limit-s", "--nonsense", "--resume-buffer", "--checkpoint-interval-s"]  # fmt: skip
        values = ["", "0", "-1", "3", "1e9", "nan", "inf", "-inf", "9" * 30, "demo", "native", "x", "../x", "\x00", "None",
                  "True", "cpu", "[]", "0.5"]  # fmt: skip
        arguments = ["--out", str(self.place / "never")]
        for _ in range(rng.randint(1, 4)):
            arguments += [rng.choice(names), rng.choice(values)][: rng.randint(1, 2)]

        def parse() -> None:
            with (
                open(os.devnull, "w") as nowhere,
                contextlib.redirect_stdout(nowhere),
                contextlib.redirect_stderr(nowhere),
            ):
                config = tyro.cli(stage.Config, args=arguments)
            with watched(self.place):
                stage.resolve(config)

        try:
            refused(parse, " ".join(arguments))
        except SystemExit as error:
            if error.code not in (0, 2):
                raise Broken(f"{arguments}: exit status {error.code}") from error


def _tables(saved: checkpoints.Checkpoint) -> dict[str, dict[str, np.ndarray]]:
    names = [name.removesuffix(".safetensors") for name in saved.manifest["files"]]
    return {name: checkpoints.load_extra(saved, name) for name in names if name not in ("arrays", "golden")}


def main(config: Config) -> dict[str, int]:
    """Try all examples; returns how many there were of each kind. Raises at the first that breaks something."""
    sys.addaudithook(_audit)
    with tempfile.TemporaryDirectory() as temporary:
        attacks = Attacks(Path(temporary))
        kinds = [attacks.bytes, attacks.sealed_file, attacks.manifest, attacks.foreign_manifest, attacks.segment,
                 attacks.state, attacks.flags]  # fmt: skip
        counts = dict.fromkeys((kind.__name__ for kind in kinds), 0)
        for number in range(config.first, config.first + config.examples):
            kind = kinds[number % len(kinds)]
            try:
                kind(random.Random(f"{config.seed} {number}"))
            except Exception as error:
                error.add_note(f"example --seed {config.seed} --first {number} --examples 1 ({kind.__name__})")
                raise
            counts[kind.__name__] += 1
    print(", ".join(f"{name} {count}" for name, count in counts.items()) + ": none did harm")
    return counts


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
