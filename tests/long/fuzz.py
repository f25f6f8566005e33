"""Damaged, foreign and hostile inputs: each must be refused with one clear line, or do no harm.

    python -m tests.long.fuzz --examples 10000

Changed bytes and truncations of every file of a checkpoint; files and manifests with right checksums and wrong
contents (types, huge numbers, paths that lead out, foreign layouts); replay segments and their lists; saved
states of both long stages; the other files that are read back (a measured result, a submission package, a log);
flags of every script; `obs` and `info` for the preprocessor that is submitted, and its module behind it.
While an example is judged, nothing outside its directory may be opened, and no process, pickle or shell
started. Exit status 1, with the example's number, at the first failure; the same number gives the same example.
"""

import contextlib
import dataclasses
import functools
import hashlib
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

import jax
import numpy as np
import torch
import tyro

import chain
import convert_jax2torch
import evaluate
import finetune_ddpg
import gates
import submit
import train_mjx_sac
from booster_soccer import cli, errors
from booster_soccer.agents import ddpg
from booster_soccer.agents.submission_model import scripted
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE, observe
from booster_soccer.preprocess.submission import Preprocessor
from booster_soccer.rollout.collect import CollectConfig
from booster_soccer.store import checkpoints, manifests
from booster_soccer.store import run as life
from booster_soccer.store.replay import Replay, Segments
from booster_soccer.tracking import report
from tests.long import mutations

_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class",
              "socket.connect", "shutil.rmtree", "os.remove", "os.rename", "os.truncate", "ctypes.dlopen")  # fmt: skip


@dataclass(frozen=True)
class Config:
    """How many examples, and which."""

    examples: int = 10_000
    first: int = 0  # number of the first example, to see one again


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
    """Nothing is printed, but it must be text that can be."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def watched(place: Path, allowed: tuple[str, ...] = ()) -> Iterator[None]:
    """Fail if anything outside `place` is opened, or any process or pickle started, but for `allowed`."""
    global _watched
    _seen.clear()
    _watched = Path(os.path.realpath(place))
    try:
        yield
    finally:
        _watched = None
    harm = [seen for seen in _seen if not seen.startswith(allowed or "\0")]
    assert not harm, "; ".join(harm[:3])


def refused(action: Callable[[], Any], what: str, kind: type[Exception] = UserError) -> bool:
    """Whether `action` is refused, which must be with one printable line, in an error of exactly this kind."""
    try:
        action()
    except kind as error:
        if type(error) not in (kind, checkpoints.WrongRun):
            raise
        line = errors.one_line(str(error))
        line.encode()
        assert "\n" not in line and 10 < len(line) < 1000, f"{what}: the message is not one clear line: {line[:200]!r}"
        return True
    return False


@contextlib.contextmanager
def holding(path: Path, content: bytes) -> Iterator[None]:
    """A file with another content for a while."""
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(original)


# --- what is attacked ---------------------------------------------------------------------------------


class Attacks:
    """Good inputs of every kind in one directory, and one method for each kind of attack on them."""

    def __init__(self, place: Path):
        self.place, self.good, self.mutant = place, place / "good", place / "mutant"
        self.arrays = ddpg.random_arrays(0, np.zeros(OBS_SIZE, np.float32), np.ones(OBS_SIZE, np.float32))
        self.obs = np.random.default_rng(0).normal(size=(checkpoints.GOLDEN_PAIRS, OBS_SIZE)).astype(np.float32)
        config = {"a": [1, {"b": 2}]}
        parents: list[checkpoints.Checkpoint] = []
        for path in (place / "parent", self.good):
            checkpoints.save(path, "converted", self.arrays, self.obs, config, 0, 1, parents, {},
                             {"more": {"x": np.arange(5)}})  # fmt: skip
            parents = [checkpoints.load(path)]
        shutil.copytree(self.good, self.mutant)
        jax.default_backend()  # looks for devices once
        self.segments = Segments(place / "replay")
        replay = Replay(60, {"obs": (3,), "reward": ()})
        replay.add(obs=np.ones((50, 3), np.float32), reward=np.ones(50, np.float32))
        self.table = self.segments.write(replay)

    def _load(self, files: dict[str, bytes]) -> tuple[bool, checkpoints.Checkpoint | None]:
        """Load the good checkpoint with other files in it: whether that is refused, and what was loaded before."""
        loaded = None

        def load() -> None:
            nonlocal loaded
            loaded = checkpoints.load(self.mutant, ("converted",))
            checkpoints.load_extra(loaded, "more")

        with contextlib.ExitStack() as stack:
            for name, content in files.items():
                stack.enter_context(holding(self.mutant / name, content))
            with watched(self.mutant):
                return refused(load, str(list(files))), loaded

    def bytes(self, rng: random.Random) -> None:
        """A changed byte of any file: always refused."""
        name = rng.choice(sorted(entry.name for entry in self.good.iterdir()))
        original = (self.good / name).read_bytes()
        changed = mutations.other_bytes(rng, original)
        said, _ = self._load({name: changed})
        assert said != (changed == original), f"{name}: {'refused' if said else 'loaded with changed bytes'}"

    def sealed_file(self, rng: random.Random) -> None:
        """A wrong file whose checksum is right: refused, or arrays that may be had."""
        name = rng.choice(["arrays", "golden", "more"]) + ".safetensors"
        content = mutations.other_bytes(rng, (self.good / name).read_bytes())
        manifest = json.loads((self.good / manifests.MANIFEST).read_bytes())
        manifest["files"][name] = hashlib.sha256(content).hexdigest()
        _, loaded = self._load({name: content, manifests.MANIFEST: manifests.to_bytes(manifest)})
        for value in loaded.arrays.values() if loaded else ():
            assert np.isfinite(value).all(), "numbers that are not finite were loaded"

    def manifest(self, rng: random.Random) -> None:
        """A wrong manifest whose checksum is right."""
        manifest = json.loads((self.good / manifests.MANIFEST).read_bytes())
        mutations.change_somewhere(rng, manifest)
        _, loaded = self._load({manifests.MANIFEST: manifests.to_bytes(manifest)})
        for name, value in loaded.arrays.items() if loaded else ():
            assert np.array_equal(value, self.arrays[name]), "other arrays were loaded"

    def foreign_manifest(self, rng: random.Random) -> None:
        """No manifest of ours at all: always refused."""
        version = {"format": manifests.FORMAT, "schema_version": rng.choice([1, 2, "1", None, 1e99])}
        foreign = [b"", b"[]", b"null", b"[" * 100_000, b'{"format": 1}', b'{"a":' * 5000, b"\xff\xfe", b"1e999", b"NaN",
                   b"\x80\x04.", json.dumps(mutations.other_value(rng)).encode(), rng.randbytes(rng.randint(1, 300)),
                   json.dumps(version).encode(), b'{"n": ' + b"9" * 10_000 + b"}"]  # fmt: skip
        said, _ = self._load({manifests.MANIFEST: rng.choice(foreign)})
        assert said, "a foreign manifest was loaded"

    def segment(self, rng: random.Random) -> None:
        """A changed replay segment, or list of them: refused, or the very rows."""
        table, (path,) = self.table, self.segments.directory.iterdir()
        original = content = path.read_bytes()
        if rng.random() < 0.5:
            content = mutations.other_bytes(rng, original)
        else:
            table = mutations.other_table(rng, table)
        replay = Replay(60, {"obs": (3,), "reward": ()})
        with holding(path, content), watched(self.segments.directory):
            said = refused(lambda: Segments(self.segments.directory).read(table, replay, 50), "segment")
        same = content == original and replay.added == 50 and (replay.arrays["reward"][:50] == 1).all()
        assert said or same, "wrong rows were loaded"

    @functools.cached_property
    def states(self) -> list[tuple[life.Run, life.Stage, dict]]:
        """Run, stage and tables of a saved state of both long stages."""
        states = []
        for run, stage in (self._pretraining(self.place / "a"), self._finetuning(self.place / "b")):
            run.save(stage)
            run.metrics_path.unlink()  # of which the end would be cut
            saved = checkpoints.load(run.resume_path)
            names = [name.removesuffix(".safetensors") for name in saved.manifest["files"]]
            states.append((run, stage, {name: checkpoints.load_extra(saved, name) for name in names}))
        return states

    @staticmethod
    def _pretraining(out: Path) -> tuple[life.Run, life.Stage]:
        collect = CollectConfig(num_envs=4, buffer_size=64, dr_level=1)
        config = dataclasses.replace(train_mjx_sac.PRESETS["cpu"], out=out, collect=collect)
        run = life.Run(out, "pretrained", config)
        return run, train_mjx_sac.Pretraining(config, run, None, [])

    def _finetuning(self, out: Path) -> tuple[life.Run, life.Stage]:
        rows = {name: np.zeros((20, *shape), np.float32) for name, shape in finetune_ddpg._ROW_SHAPES.items()}
        lanes = mock.Mock(tasks=list(c.TASKS))
        lanes.state.return_value = {"lane_episode": np.zeros(3, np.int64), "lane_length": np.zeros(3, np.int64)}
        lanes.restore.return_value = rows["critic_obs"][:3]
        config = dataclasses.replace(finetune_ddpg.PRESETS["scratch"], out=out, num_lanes=3, buffer_size=64,
                                     batch_size=8, device="cpu")  # fmt: skip
        run = life.Run(out, "finetuned", config)
        stage = finetune_ddpg.Finetuning(config, run, lanes, None)
        stage.critic_obs, stage.learner = rows["critic_obs"][:3], ddpg.Ddpg(config.ddpg, self.arrays, *self.obs[:2])
        stage.replay.add(**rows)
        stage.update(2, ("input", "hidden", "output"))
        run.kept["start"] = life.Candidate(self.arrays, 0, np.zeros((c.NUM_TASKS, 2)))
        return run, stage

    def state(self, rng: random.Random) -> None:
        """A saved state with right checksums and wrong contents: refused, or taken up without a crash."""
        run, stage, saved = rng.choice(self.states)
        changed = rng.choice(sorted(saved.keys() - {"arrays", "golden"}))
        state = saved | {changed: mutations.other_table(rng, saved[changed])}
        with mock.patch.object(checkpoints, "load_extra", lambda _, name: dict(state[name])):
            with silence(), watched(self.place):
                refused(lambda: run.restore(stage), changed)

    @functools.cached_property
    def _records(self) -> dict[str, tuple[Path, bytes]]:
        """The files other than checkpoints that scripts read back: where each lies, and good content."""
        package, result, metrics = self.place / "package", self.place / "result.json", self.place / "metrics.jsonl"
        package.mkdir()
        task = {"mean": 1.0, "mean_steps": 5, "same_torques_max_difference": 0.0, "torque_max_difference_nm": 0.0,
                "evaluate_mean": 1.0, "evaluate_max_difference": 0.0}  # fmt: skip
        score = {"tasks": dict.fromkeys(c.TASKS, task), "mean": 1.0, "ci95": [0.5, 1.5], "identity": self._IDENTITY}
        for name in submit._FILES:
            (package / name).write_text(json.dumps(score | {"episodes_per_task": 3, "seed": 0}))
        digests = {name: submit._sha256(package / name) for name in submit._FILES}
        (package / submit.MANIFEST).write_text(json.dumps(self._PACKAGE | {"files": digests}))
        result.write_text(json.dumps(score))
        metrics.write_text("".join(json.dumps({"step": step, "wall_s": 0.5}) + "\n" for step in range(0, 100, 10)))
        files = (package / submit.MANIFEST, package / submit.SCORE, result, metrics)
        return {path.name: (path, path.read_bytes()) for path in files}

    _IDENTITY = {"hash": "ab", "episodes": 3}
    _PACKAGE = {"format": submit.FORMAT, "seed": 0}

    def record(self, rng: random.Random) -> None:
        """A changed result, package or log: refused, or read as what it says."""
        name = rng.choice(sorted(self._records))
        path, original = self._records[name]
        if name == "metrics.jsonl" or rng.random() < 0.4:
            changed = mutations.other_bytes(rng, original)
        else:
            content = json.loads(original)
            mutations.change_somewhere(rng, content)
            changed = json.dumps(content).encode()
        reads = {
            "result.json": lambda: self._read_result(path),
            submit.MANIFEST: lambda: submit._check_same_package(path.parent, self._PACKAGE),
            submit.SCORE: lambda: submit.print_score(path.parent),
            "metrics.jsonl": lambda: (life._last_recorded(path, "wall_s"), life._cut_records(path, 50)),
        }
        with holding(path, changed):
            with silence(), watched(self.place, allowed=("os.truncate",)):
                said = refused(reads[name], name)
            if name == "metrics.jsonl":
                assert changed.startswith(path.read_bytes()), "the log holds what it did not hold before"
        if name in (submit.MANIFEST, "result.json") and not said:
            kept, good = json.loads(changed), json.loads(original)
            keys = ("identity",) if name == "result.json" else ("files", "format", "seed")
            assert all(kept[key] == good[key] for key in keys), "another package, or result, was taken"

    def _read_result(self, path: Path) -> None:
        report.finished(path, self._IDENTITY)
        row = chain.Evaluation("zero torque", ("--policy", "zero"), 0, "twin", path)
        chain.print_results(chain.Config(), chain.read_scores([row]), {"pretrain": 1.0})

    @functools.cached_property
    def _module(self) -> torch.jit.ScriptModule:
        return scripted(ddpg.load_module(ddpg.Actor(), "actor", self.arrays))

    def info(self, rng: random.Random) -> None:
        """`obs` and `info` as no environment should give them: refused, or the very numbers; NaN stays in its lane."""
        batch = rng.choice([None, 1, 2, 3, 4])
        obs, info = mutations.official_like(np.random.default_rng(rng.randrange(2**32)), batch)
        for name in rng.sample(sorted(info), rng.randint(1, 2)):
            kind = rng.random()
            if kind < 0.15:
                del info[name]
            elif kind < 0.25:
                obs = mutations.other_array(rng, np.asarray(obs)) if isinstance(obs, np.ndarray) and obs.size else obs
            else:
                info[name] = mutations.other_array(rng, info[name])
        if rng.random() < 0.2:
            info[rng.choice(["_robot_quat", "success", "extra", ""])] = mutations.other_value(rng)
        before, result = _bits((obs, info)), None

        def act() -> None:
            nonlocal result
            with np.errstate(all="ignore"):
                result = Preprocessor().modify_state(obs, info)

        with watched(self.place):
            refused(act, "info", ValueError)
        assert _bits((obs, info)) == before, "obs or info was written to"
        if result is not None:
            self._check_observation(result, np.asarray(obs, np.float64), info)

    def _check_observation(self, result: np.ndarray, obs: np.ndarray, info: dict[str, Any]) -> None:
        """Held against the NumPy implementation, which is told the shapes; a broken lane stays alone with it."""
        count, wide = len(result), {}
        for name, width in mutations.INFO.items():
            value = np.asarray(info[name], np.float64)
            fits = value.shape in ((width,), (1, width), (count, width)) or value.size in (width, count * width)
            assert fits, f"info[{name!r}] of shape {value.shape} was taken for {count} lanes"
            wide[name] = np.broadcast_to(value.reshape(-1, width), (count, width))
        joints = obs.reshape(-1, obs.shape[-1])
        with np.errstate(all="ignore"):
            expected = observe(joints[:, : c.NUM_JOINTS], joints[:, c.NUM_JOINTS : 2 * c.NUM_JOINTS], wide, np)
            expected = expected.astype(np.float32)
        assert (result.shape, result.dtype) == ((count, OBS_SIZE), np.float32)
        assert np.array_equal(result, expected, equal_nan=True), "other numbers than the NumPy implementation's"
        whole = np.isfinite(result).all(axis=1)
        torque = self._torque(result)[whole]
        assert np.isfinite(torque).all() and np.abs(torque).max(initial=0.0) <= 1.0, "a broken torque"
        assert np.array_equal(torque, self._torque(result[whole])), "a broken lane changed another lane's torque"

    def _torque(self, obs: np.ndarray) -> np.ndarray:
        self._module.age = torch.zeros(0, dtype=torch.int64)  # no target is held from another example
        return self._module(torch.from_numpy(obs)).numpy() if len(obs) else np.zeros((0, c.NUM_JOINTS))

    def flags(self, rng: random.Random) -> None:
        """Command lines of every script: refused by one line or by the parser, or found good."""
        script, check = rng.choice(self._scripts)
        names = [*_options(script.Config), "--nonsense", "-x"]
        values = ["", "0", "-1", "3", "1e9", "nan", "inf", "-inf", "9" * 30, "1e400", "demo", "native", "x", "../x",
                  "None", "True", "cpu", "[]", "0.5", "1 2", "a.png", "target:5", "target:x", "zero", "\n", "x" * 300]  # fmt: skip
        arguments = ["--out", "never"] if "--out" in names else []
        for _ in range(rng.randint(1, 4)):
            arguments += [rng.choice(names), rng.choice(values)][: rng.randint(1, 2)]

        def parse() -> None:
            with silence(), mock.patch.object(sys, "argv", ["script", *arguments]):
                presets = getattr(script, "PRESETS", None)
                config = cli.parse(presets, "", "cpu") if presets else tyro.cli(script.Config)
                with watched(self.place, allowed=("os.remove",)):
                    errors.check_numbers(config)
                    check(config)

        (self.place / "cwd").mkdir(exist_ok=True)
        try:
            with contextlib.chdir(self.place / "cwd"), mock.patch.object(chain, "run_script", _stop):
                refused(parse, " ".join(arguments))
        except SystemExit as error:
            assert error.code in (0, 2), f"{arguments}: exit status {error.code}"

    # Each script, and what it checks before it works.
    _scripts = [
        (train_mjx_sac, train_mjx_sac.check),
        (finetune_ddpg, finetune_ddpg.check),
        (chain, chain.main),  # to its first stage
        (convert_jax2torch, convert_jax2torch.main),  # there is no checkpoint, so it ends there
        (evaluate, evaluate._check),
        (gates, gates.load),
        (submit, submit._check_config),
    ]


def _stop(stage: str, command: list[str]) -> None:
    """In place of a script of the chain."""
    raise UserError(f"stage {stage} is not run")


def _options(config: type) -> list[str]:
    """The options of a script's configuration, nested ones too."""
    options = []
    for field in dataclasses.fields(config):
        nested = dataclasses.is_dataclass(field.default)
        options += _options(type(field.default)) if nested else [f"--{field.name.replace('_', '-')}"]
    return options


def _bits(value: Any) -> Any:
    """What two nested values have in common only if they are the same, NaN included."""
    if isinstance(value, dict):
        return {key: _bits(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_bits, value))
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.shape, value.dtype, value.tobytes()
    return repr(value)


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
                kind(random.Random(number))
            except Exception as error:
                error.add_note(f"example --first {number} --examples 1 ({kind.__name__})")
                raise
            counts[kind.__name__] += 1
    print(", ".join(f"{name} {count}" for name, count in counts.items()) + ": none did harm")
    return counts


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
