"""Damaged, foreign and hostile inputs: each must be refused with one clear line, or do no harm.

    python benchmarks/fuzz.py --examples 10000

Changed bytes and truncations of every file of a checkpoint; files and manifests with right checksums and wrong
contents (types, huge numbers, paths that lead out, foreign layouts); replay segments and their lists; saved
states of both long stages; the other files that are read back (the chain's summary, a submission package, a
log); flags of every script; `obs` and `info` for the preprocessor that is submitted, and its module behind it.
While an example is judged, nothing outside its directory may be opened, and no process, pickle or shell
started. Exit status 1, with the example's number, at the first failure; the same `--seed` and number give the
same example.
"""

import contextlib
import copy
import dataclasses
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

import torch  # noqa: E402

import chain  # noqa: E402
import convert_jax2torch  # noqa: E402
import evaluate  # noqa: E402
import finetune_ddpg  # noqa: E402
import gates  # noqa: E402
import submit  # noqa: E402
import train_mjx_sac  # noqa: E402
from booster_soccer import errors  # noqa: E402
from booster_soccer.agents.policy import policy_from_arrays  # noqa: E402
from booster_soccer.agents.submission_model import scripted  # noqa: E402
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError  # noqa: E402
from booster_soccer.preprocess.observation import OBS_SIZE, observe  # noqa: E402
from booster_soccer.preprocess.submission import Preprocessor  # noqa: E402
from booster_soccer.store import (
    checkpoints,  # noqa: E402
    resume,  # noqa: E402
)
from booster_soccer.store.replay import Replay, Segments  # noqa: E402

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

_PYTHON = [os.path.realpath(place) for place in {*sys.path, sys.prefix, sys.base_prefix} if place]
_watched: Path | None = None  # while an example is judged, the only place where files may be opened
_seen: list[str] = []


def _audit(event: str, arguments: tuple) -> None:
    if _watched is None:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = Path(os.path.realpath(os.fsdecode(arguments[0])))
        # Python itself reads modules and the lists of packages late.
        of_python = arguments[1] in ("r", "rb", None) and any(map(path.is_relative_to, _PYTHON))
        if not path.is_relative_to(_watched) and not of_python:
            _seen.append(f"opened {path}")
    elif event in _FORBIDDEN:
        _seen.append(f"{event} {arguments[:2]!r}")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing is printed."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def watched(place: Path, allowed: tuple[str, ...] = ()) -> Iterator[None]:
    """Raise `Broken` if anything outside `place` is opened, or any process or pickle started, but for `allowed`."""
    global _watched
    _seen.clear()
    _watched = Path(os.path.realpath(place))
    try:
        yield
    finally:
        _watched = None
    if harm := [seen for seen in _seen if not seen.startswith(allowed or "\0")]:
        raise Broken("; ".join(harm[:3]))


def refused(action: Callable[[], Any], what: str, kind: type[Exception] = UserError) -> bool:
    """Whether `action` is refused, which must be with one printable line, in an error of exactly this kind."""
    try:
        action()
    except kind as error:
        if type(error) not in (kind, checkpoints.WrongRun):
            raise
        line = errors.one_line(str(error))
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


# width of each entry of an official `info`
_INFO = dict.fromkeys(
    [f"goal_team_{i}_rel_{what}" for i in (0, 1) for what in ("robot", "ball")]
    + [f"goalkeeper_team_{i}_{what}_rel_robot" for i in (0, 1) for what in ("xpos", "velp")]
    + ["robot_gyro", "robot_accelerometer", "robot_velocimeter", "ball_xpos_rel_robot", "ball_velp_rel_robot"]
    + ["ball_velr_rel_robot", "target_xpos_rel_robot", "target_velp_rel_robot", "task_index"],
    3,
) | {"robot_quat": 4, "player_team": 2, "defender_xpos": 9}


def official_like(rng: np.random.Generator, batch: int | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """An `obs` (B, 45) and an `info` of official names and widths, random; unbatched if None."""
    lead = () if batch is None else (batch,)
    info = {name: rng.normal(size=(*lead, width)).astype(np.float32) for name, width in _INFO.items()}
    info["robot_quat"] /= np.linalg.norm(info["robot_quat"], axis=-1, keepdims=True)
    info["player_team"] = np.zeros((*lead, 2)) + [1.0, 0.0]
    return rng.normal(size=(*lead, 45)), info


def other_array(rng: random.Random, value: np.ndarray) -> Any:
    """One entry of an `info` with another type, shape or content."""
    kind = rng.choice(["type", "type", "number", "number", "shorter", "longer", "turned", "flat", "deeper", "batch",
                       "nothing", "text", "nested", "dict", "objects", "scalar"])  # fmt: skip
    if kind == "type":
        with np.errstate(all="ignore"):
            return value.astype(rng.choice([np.float64, np.float32, np.float16, np.int64, np.int8, bool]))
    if kind == "number":
        value = np.array(value, np.float64)
        value[tuple(rng.randrange(size) for size in value.shape)] = rng.choice(
            [np.nan, np.inf, -np.inf, 1e308, -1e-320]
        )
        return value
    return {
        "shorter": value[..., :-1],
        "longer": np.concatenate([value, value], axis=-1),
        "turned": value.T.copy() if rng.random() < 0.5 else value[..., ::-1].T,
        "flat": value.ravel(),
        "deeper": value[None] if rng.random() < 0.5 else value[..., None],
        "batch": np.stack([value] * rng.randint(1, 4)) if rng.random() < 0.5 else value[:1],
        "nothing": None,
        "text": rng.choice(["", "x", b"x", "nan", "__import__('os')"]),
        "nested": value.tolist() if rng.random() < 0.5 else [value.tolist(), [1]],
        "dict": {"a": 1},
        "objects": np.full(value.shape, rng.choice([None, "x", {}]), object),
        "scalar": rng.choice([0, 1.5, np.nan, np.float32(2), 10**400, True]),
    }[kind]


# --- what is attacked ---------------------------------------------------------------------------------


class Attacks:
    """Good inputs of every kind in one directory, and one method for each kind of attack on them."""

    def __init__(self, place: Path):
        self.place = place
        self.mutant = place / "mutant"
        self.good = self._converted(place / "good")
        self.arrays = checkpoints.load(self.good).arrays
        shutil.copytree(self.good, self.mutant)
        train_mjx_sac.jax.default_backend()  # looks for devices once
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

    @functools.cached_property
    def _records(self) -> dict[str, tuple[Path, bytes]]:
        """The files other than checkpoints that scripts read back: where each lies, and good content."""
        run, package, metrics = self.place / "run", self.place / "package", self.place / "metrics.jsonl"
        for place in (run / "pretrain", run / "pretrain.resume", run / "converted", package):
            place.mkdir(parents=True)
        settings = {"preset": "demo", "seed": 0, "pretrain_steps": None}
        summary = {"settings": settings, "seconds": {"pretrain": 10.5, "convert": 2}}
        entry = {"mean": 1.0, "same_torques_max_difference": 0.0, "torque_max_difference_nm": 0.0,
                 "evaluate_mean": 1.0, "evaluate_max_difference": 0.0}  # fmt: skip
        score = {"tasks": dict.fromkeys(c.TASKS, entry), "mean": 1.0, "episodes_per_task": 3, "seed": 0}
        for name in submit._FILES:
            (package / name).write_text(json.dumps(score))
        digests = {name: submit._sha256(package / name) for name in submit._FILES}
        manifest = {"format": submit.FORMAT, "seed": 0, "files": digests}
        lines = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(0, 100, 10))
        contents = {run / "summary.json": json.dumps(summary), package / submit.MANIFEST: json.dumps(manifest),
                    package / submit.SCORE: json.dumps(score), metrics: lines}  # fmt: skip
        for path, content in contents.items():
            path.write_text(content)
        return {path.name: (path, content.encode()) for path, content in contents.items()}

    def record(self, rng: random.Random) -> None:
        """A changed summary, package or log: refused, or read as what it says."""
        name = rng.choice(sorted(self._records))
        path, original = self._records[name]
        if name == "metrics.jsonl" or rng.random() < 0.4:
            changed = other_bytes(rng, original)
        else:
            content = json.loads(original)
            change_somewhere(rng, content)
            changed = json.dumps(content).encode()
        path.write_bytes(changed)
        reads = {
            "summary.json": self._read_summary,
            submit.MANIFEST: lambda: submit._check_same_package(path.parent, {"format": submit.FORMAT, "seed": 0}),
            submit.SCORE: lambda: submit.print_score(path.parent),
            "metrics.jsonl": lambda: resume.cut_records(path, 50),
        }
        try:
            with silence(), watched(self.place, allowed=("os.truncate",)):
                said = refused(reads[name], name)
            if name == "metrics.jsonl" and not changed.startswith(path.read_bytes()):
                raise Broken("the log holds what it did not hold before")
        finally:
            path.write_bytes(original)
        if name == submit.MANIFEST and not said:
            kept = json.loads(changed)
            if kept["files"] != json.loads(original)["files"] or (kept["format"], kept["seed"]) != (submit.FORMAT, 0):
                raise Broken("another package was taken for this one")

    def _read_summary(self) -> None:
        summary = chain.start_summary(chain.Config(out=self.place / "run", resume=True))
        chain.print_times(summary["seconds"])

    @functools.cached_property
    def _module(self) -> torch.jit.ScriptModule:
        actor = convert_jax2torch.load_module(convert_jax2torch.Actor(), "actor", self.arrays)
        return scripted(actor)

    def info(self, rng: random.Random) -> None:
        """`obs` and `info` as no environment should give them: refused, or the very numbers; NaN stays in its lane."""
        batch = rng.choice([None, 1, 2, 3, 4])
        obs, info = official_like(np.random.default_rng(rng.randrange(2**32)), batch)
        for name in rng.sample(sorted(info), rng.randint(1, 2)):
            kind = rng.random()
            if kind < 0.15:
                del info[name]
            elif kind < 0.25:
                obs = other_array(rng, np.asarray(obs)) if isinstance(obs, np.ndarray) and obs.size else obs
            else:
                info[name] = other_array(rng, info[name])
        if rng.random() < 0.2:
            info[rng.choice(["_robot_quat", "success", "extra", ""])] = other_value(rng)
        before = copy.deepcopy((obs, info))
        results: list[np.ndarray] = []

        def act() -> None:
            with np.errstate(all="ignore"):
                results.append(Preprocessor().modify_state(obs, info))

        with watched(self.place):
            refused(act, "info", ValueError)
        if not _equal(before, (obs, info)):
            raise Broken("obs or info was written to")
        for result in results:
            self._check_observation(result, obs, info)

    def _check_observation(self, result: np.ndarray, obs: Any, info: dict[str, Any]) -> None:
        """Held against the NumPy implementation, which is told the shapes; a broken lane stays alone with it."""
        count = len(result)
        obs = np.asarray(obs, np.float64)
        wide = {}
        for name, width in _INFO.items():
            value = np.asarray(info[name], np.float64)
            if value.shape not in ((width,), (1, width), (count, width)) and value.size not in (width, count * width):
                raise Broken(f"info[{name!r}] of shape {value.shape} was taken for {count} lanes")
            wide[name] = np.broadcast_to(value.reshape(-1, width), (count, width))
        joints = obs.reshape(-1, obs.shape[-1])
        with np.errstate(all="ignore"):
            expected = observe(joints[:, : c.NUM_JOINTS], joints[:, c.NUM_JOINTS : 2 * c.NUM_JOINTS], wide, np)
            expected = expected.astype(np.float32)
        if result.shape != (count, OBS_SIZE) or result.dtype != np.float32:
            raise Broken(f"an observation of shape {result.shape}, {result.dtype}")
        if not np.array_equal(result, expected, equal_nan=True):
            raise Broken("other numbers than the NumPy implementation's")
        torque, broken = self._torque(result), ~np.isfinite(result).all(axis=1)
        if not np.isfinite(torque[~broken]).all() or np.abs(torque[~broken]).max(initial=0.0) > 1.0:
            raise Broken("a whole observation gave a broken torque")
        if broken.any() and not np.array_equal(torque[~broken], self._torque(result[~broken])):
            raise Broken("a broken lane changed another lane's torque")

    def _torque(self, obs: np.ndarray) -> np.ndarray:
        self._module.age = torch.zeros(0, dtype=torch.int64)  # no target is held from another example
        return self._module(torch.from_numpy(obs)).numpy() if len(obs) else np.zeros((0, c.NUM_JOINTS))

    def flags(self, rng: random.Random) -> None:
        """Command lines of every script: refused by one line or by the parser, or found good."""
        script, check = rng.choice(self._scripts)
        fields = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(script.Config)]
        names = [*fields, *fields, "--weights.fallen", "--starts.task-share", "--nonsense", "-x"]
        values = ["", "0", "-1", "3", "1e9", "nan", "inf", "-inf", "9" * 30, "1e400", "demo", "native", "x", "../x",
                  "None", "True", "cpu", "[]", "0.5", "1 2", "a.png", "target:5", "target:x", "zero", "\n", "x" * 300]  # fmt: skip
        arguments = ["--out", "never"] if "--out" in fields else []
        for _ in range(rng.randint(1, 4)):
            arguments += [rng.choice(names), rng.choice(values)][: rng.randint(1, 2)]

        def parse() -> None:
            with silence():
                config = tyro.cli(script.Config, args=arguments)
                with watched(self.place, allowed=("os.remove",)):
                    errors.check_numbers(config)
                    check(config)

        before = os.getcwd()
        (self.place / "cwd").mkdir(exist_ok=True)
        os.chdir(self.place / "cwd")
        try:
            refused(parse, " ".join(arguments))
        except SystemExit as error:
            if error.code not in (0, 2):
                raise Broken(f"{arguments}: exit status {error.code}") from error
        finally:
            os.chdir(before)

    # Each script, and what it checks before it works.
    _scripts = [
        (train_mjx_sac, train_mjx_sac.resolve),
        (finetune_ddpg, finetune_ddpg.resolve),
        (chain, lambda config: chain.start_summary(chain.resolve(config))),
        (convert_jax2torch, convert_jax2torch.main),  # there is no checkpoint, so it ends there
        (evaluate, evaluate._check),
        (gates, gates.load),
        (submit, submit._check_config),
    ]


def _equal(a: Any, b: Any) -> bool:
    """Whether two nested values are the same, NaN included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return all(map(_equal, a, b))
    if isinstance(a, np.ndarray):
        return (a.shape, a.dtype) == (b.shape, b.dtype) and (a.dtype == object or a.tobytes() == b.tobytes())
    return repr(a) == repr(b)


def _tables(saved: checkpoints.Checkpoint) -> dict[str, dict[str, np.ndarray]]:
    names = [name.removesuffix(".safetensors") for name in saved.manifest["files"]]
    return {name: checkpoints.load_extra(saved, name) for name in names if name not in ("arrays", "golden")}


def main(config: Config) -> dict[str, int]:
    """Try all examples; returns how many there were of each kind. Raises at the first that breaks something."""
    sys.addaudithook(_audit)
    with tempfile.TemporaryDirectory() as temporary:
        attacks = Attacks(Path(temporary))
        kinds = [attacks.bytes, attacks.sealed_file, attacks.manifest, attacks.foreign_manifest, attacks.segment,
                 attacks.state, attacks.record, attacks.info, attacks.flags, attacks.info]  # fmt: skip
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
