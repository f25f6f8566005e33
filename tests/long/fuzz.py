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
import json
import os
import pickle
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
from booster_soccer.agents.policy import LAYERS
from booster_soccer.agents.submission_model import scripted
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE, observe
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE
from booster_soccer.preprocess.submission import Preprocessor
from booster_soccer.store import checkpoints, manifests
from booster_soccer.store import run as life
from booster_soccer.store.manifests import MANIFEST
from booster_soccer.store.replay import Replay, Segments
from booster_soccer.tracking import report
from tests import small_checkpoints, small_pretraining
from tests.long import mutations

_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class",
              "socket.connect", "shutil.rmtree", "os.remove", "os.rename", "os.truncate", "ctypes.dlopen")  # fmt: skip
_PYTHON = [os.path.realpath(place) for place in {*sys.path, sys.prefix, sys.base_prefix} if place]
_watched: Path | None = None  # while an example is judged, the only place where files may be opened
_seen: list[str] = []


@dataclass(frozen=True)
class Config:
    """How many examples, and which."""

    examples: int = 10_000
    first: int = 0  # number of the first example, to see one again


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
def watched(place: Path, allowed: tuple[str, ...] = ()) -> Iterator[None]:
    """Fail if anything outside `place` is opened, or any process or pickle started, but for `allowed`.

    What is printed goes nowhere, but it must be text that can be.
    """
    global _watched
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        _seen.clear()
        _watched = Path(os.path.realpath(place))
        try:
            yield
        finally:
            _watched = None
    harm = [seen for seen in _seen if not seen.startswith(allowed or "\0")]
    assert not harm, "; ".join(harm[:3])


def refused(action: Callable[[], Any], kind: type[Exception] = UserError) -> bool:
    """Whether `action` is refused, which must be with one printable line, in an error of exactly this kind."""
    try:
        action()
    except kind as error:
        if type(error) not in (kind, checkpoints.WrongRun):
            raise
        line = errors.one_line(str(error))
        line.encode()
        assert "\n" not in line and 10 < len(line) < 1000, f"the message is not one clear line: {line[:200]!r}"
        return True
    return False


# --- what is attacked ---------------------------------------------------------------------------------


class Attacks:
    """Good inputs of every kind in one directory, and one method for each kind of attack on them."""

    def __init__(self, place: Path):
        self.place, self.good, self.mutant = place, place / "good", place / "mutant"
        small_checkpoints.save(self.good, parents=[checkpoints.load(small_checkpoints.save(place / "parent"))])
        self.actor = checkpoints.load(self.good).arrays
        jax.default_backend()  # looks for devices once
        self.segments = Segments(place / "replay")
        replay = Replay(60, {"obs": (3,), "reward": ()})
        replay.add(obs=np.ones((50, 3), np.float32), reward=np.ones(50, np.float32))
        self.table = self.segments.write(replay)

    def _copy(self) -> Path:
        """The good checkpoint anew, to be changed."""
        shutil.rmtree(self.mutant, ignore_errors=True)
        return shutil.copytree(self.good, self.mutant)

    def _load(self) -> checkpoints.Checkpoint | None:
        """Load the changed checkpoint; None if it is refused."""

        def load() -> None:
            loaded.append(checkpoints.load(self.mutant, ("converted",)))
            checkpoints.load_extra(loaded[0], "optimizer")

        loaded: list[checkpoints.Checkpoint] = []
        with watched(self.mutant):
            said = refused(load)
        for array in loaded[0].arrays.values() if loaded else ():
            assert np.isfinite(array).all(), "numbers that are not finite were loaded"
        return None if said else loaded[0]

    def bytes(self, rng: random.Random) -> None:
        """A changed byte of any file: always refused."""
        path = self._copy() / rng.choice(small_checkpoints.FILES)
        content = path.read_bytes()
        path.write_bytes(changed := mutations.other_bytes(rng, content))
        said = self._load() is None
        assert said != (changed == content), f"{path.name}: {'refused' if said else 'loaded with changed bytes'}"

    def sealed_file(self, rng: random.Random) -> None:
        """A wrong file whose checksum is right: refused, or arrays that may be had."""
        name = rng.choice([name for name in small_checkpoints.FILES if name != MANIFEST])
        content = mutations.other_bytes(rng, (self.good / name).read_bytes())
        small_checkpoints.replace_file(self._copy(), name, content)
        self._load()

    def manifest(self, rng: random.Random) -> None:
        """A wrong manifest whose checksum is right."""
        manifest = json.loads((self.good / MANIFEST).read_bytes())
        mutations.change_somewhere(rng, manifest)
        (self._copy() / MANIFEST).write_bytes(manifests.to_bytes(manifest))
        loaded = self._load()
        for name, array in loaded.arrays.items() if loaded else ():
            assert np.array_equal(array, self.actor[name]), "other arrays were loaded"

    def foreign_manifest(self, rng: random.Random) -> None:
        """No manifest of ours at all: always refused."""
        other = json.loads((self.good / MANIFEST).read_bytes()) | {
            "schema_version": rng.choice([1, 3, "2", None, 1e99])
        }
        foreign = [b"", b"[]", b"null", b"[" * 100_000, b'{"format": 1}', b'{"a":' * 5000, b"\xff\xfe", b"1e999",
                   b"NaN", b"\x80\x04.", json.dumps(mutations.other_value(rng)).encode(), manifests.to_bytes(other),
                   rng.randbytes(rng.randint(1, 300)), b'{"n": ' + b"9" * 10_000 + b"}"]  # fmt: skip
        (self._copy() / MANIFEST).write_bytes(rng.choice(foreign))
        assert self._load() is None, "a foreign manifest was loaded"

    def segment(self, rng: random.Random) -> None:
        """A changed replay segment, or list of them: refused, or the very rows."""
        table, (path,) = self.table, self.segments.directory.iterdir()
        original = content = path.read_bytes()
        if rng.random() < 0.5:
            content = mutations.other_bytes(rng, original)
        else:
            table = mutations.other_table(rng, table)
        path.write_bytes(content)
        replay = Replay(60, {"obs": (3,), "reward": ()})
        with watched(self.segments.directory):
            said = refused(lambda: Segments(self.segments.directory).read(table, replay, 50))
        path.write_bytes(original)
        same = content == original and replay.added == 50 and (replay.arrays["reward"][:50] == 1).all()
        assert said or same, "wrong rows were loaded"

    @functools.cached_property
    def states(self) -> list[tuple[life.Run, life.Stage, dict]]:
        """Run, stage and tables of a saved state of both long stages, each proved to be taken up as it is."""
        states = []
        for run, stage in (self._pretraining(self.place / "a"), self._finetuning(self.place / "b")):
            run.save(stage)
            run.metrics_path.unlink()  # of which the end would be cut
            saved = checkpoints.load(run.resume_path)
            names = [name.removesuffix(".safetensors") for name in saved.manifest["files"]]
            states.append((run, stage, {name: checkpoints.load_extra(saved, name) for name in names}))
            steps, run.steps = run.steps, -1
            self._restore(*states[-1])  # else a refusal of a changed one would mean nothing
            assert run.steps == steps, f"the unchanged state of {run.stage} was not taken up"
        return states

    @staticmethod
    def _restore(run: life.Run, stage: life.Stage, state: dict) -> None:
        """Go on from these tables, as if they were on disk."""
        with mock.patch.object(checkpoints, "load_extra", lambda _, name: dict(state[name])):
            run.restore(stage)

    @staticmethod
    def _pretraining(out: Path) -> tuple[life.Run, life.Stage]:
        config = small_pretraining.config(out)
        run = life.Run(out, "pretrained", config)
        return run, train_mjx_sac.Pretraining(config, run, None, [])

    @staticmethod
    def _finetuning(out: Path) -> tuple[life.Run, life.Stage]:
        seen = np.zeros((c.NUM_TASKS, CRITIC_OBS_SIZE), np.float32)
        lanes = mock.Mock(tasks=list(c.TASKS))
        lanes.state.return_value = {name: np.zeros(c.NUM_TASKS, np.int64) for name in ("lane_episode", "lane_length")}
        lanes.restore.return_value = seen
        scratch = finetune_ddpg.PRESETS["scratch"]
        config = dataclasses.replace(scratch, out=out, num_lanes=c.NUM_TASKS, round_actions=8, device="cpu")
        run = life.Run(out, "finetuned", config)
        stage = finetune_ddpg.Finetuning(config, run, lanes, None)
        stage.critic_obs, stage.learner = seen, ddpg.Ddpg(config.ddpg, _networks(), *_UNIT)
        while not stage.round.full:
            stage.round.add(**{name: array[0] for name, array in stage.round.arrays.items()})
        stage.learn(LAYERS)
        stage.round.filled = 5
        run.kept["start"] = life.Candidate(_networks(), 0, np.zeros((c.NUM_TASKS, 2)))
        return run, stage

    def state(self, rng: random.Random) -> None:
        """A saved state with right checksums and wrong contents: refused, or taken up without a crash."""
        run, stage, saved = rng.choice(self.states)
        changed = rng.choice(sorted(saved.keys() - {"arrays", "golden"}))
        state = saved | {changed: mutations.other_table(rng, saved[changed])}
        with watched(self.place):
            refused(lambda: self._restore(run, stage, state))

    @functools.cached_property
    def _records(self) -> dict[Path, Callable[[Path], Any]]:
        """The files other than checkpoints that scripts read back, and how they do it."""
        package, result, metrics = self.place / "package", self.place / "result.json", self.place / "run.jsonl"
        package.mkdir()
        task = {"mean": 1.0, "mean_physics_steps": 5, "evaluate_mean": 1.0}
        task |= dict.fromkeys(
            ("same_torques_max_difference", "torque_max_difference_nm", "evaluate_max_difference"), 0.0
        )
        score = {"tasks": dict.fromkeys(c.TASKS, task), "mean": 1.0, "ci95": [0.5, 1.5], "identity": _IDENTITY,
                 "episodes_per_task": 3, "seed": 0}  # fmt: skip
        for path in (*(package / name for name in submit._FILES), result):
            path.write_text(json.dumps(score))
        digests = {name: submit._sha256(package / name) for name in submit._FILES}
        (package / submit.MANIFEST).write_text(json.dumps(_IDENTITY | {"files": digests}))
        metrics.write_text("".join(json.dumps({"step": step, "wall_s": 0.5}) + "\n" for step in range(0, 100, 10)))
        return {
            package / submit.MANIFEST: lambda path: submit._check_same_package(path.parent, _IDENTITY),
            package / submit.SCORE: lambda path: submit.print_score(path.parent),
            result: _read_result,
            metrics: lambda path: (life._last_recorded(path, "wall_s"), life._cut_records(path, 50)),
        }

    def record(self, rng: random.Random) -> None:
        """A changed result, package or log: refused, or read as what it says."""
        path = rng.choice(sorted(self._records))
        original, is_log = path.read_bytes(), path.suffix == ".jsonl"
        if is_log or rng.random() < 0.4:
            changed = mutations.other_bytes(rng, original)
        else:
            content = json.loads(original)
            mutations.change_somewhere(rng, content)
            changed = json.dumps(content).encode()
        path.write_bytes(changed)
        with watched(self.place, allowed=("os.truncate",) if is_log else ()):
            said = refused(lambda: self._records[path](path))
        assert changed.startswith(path.read_bytes()), "the file holds what it did not hold before"
        path.write_bytes(original)
        if path.name in (submit.MANIFEST, "result.json") and not said:
            kept, good = (json.loads(text).get("identity") or json.loads(text) for text in (changed, original))
            assert kept.items() >= good.items(), "another package, or result, was taken"

    @functools.cached_property
    def _module(self) -> torch.jit.ScriptModule:
        return scripted(ddpg.load_module(ddpg.Actor(), "actor", _networks()))

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
        before, results = pickle.dumps((obs, info)), []
        with watched(self.place), np.errstate(all="ignore"):
            refused(lambda: results.append(Preprocessor().modify_state(obs, info)), ValueError)
        assert pickle.dumps((obs, info)) == before, "obs or info was written to"
        for result in results:
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
        script, check = rng.choice(_SCRIPTS)
        names = [*_options(script.Config), "--nonsense", "-x"]
        values = ["", "0", "-1", "3", "1e9", "nan", "inf", "-inf", "9" * 30, "1e400", "demo", "native", "x", "../x",
                  "None", "True", "cpu", "[]", "0.5", "1 2", "a.png", "target:5", "target:x", "zero", "\n",
                  "x" * 300]  # fmt: skip
        arguments = ["--out", "never"] if "--out" in names else []
        for _ in range(rng.randint(1, 4)):
            arguments += [rng.choice(names), rng.choice(values)][: rng.randint(1, 2)]

        def parse() -> None:
            presets = getattr(script, "PRESETS", None)
            config = cli.parse(presets, "", "cpu") if presets else tyro.cli(script.Config)
            errors.check_numbers(config)
            check(config)

        (self.place / "cwd").mkdir(exist_ok=True)
        patches = mock.patch.object(sys, "argv", ["script", *arguments]), mock.patch.object(chain, "run_script", _stop)
        with contextlib.chdir(self.place / "cwd"), patches[0], patches[1], watched(self.place, ("os.remove",)):
            try:
                refused(parse)
            except SystemExit as error:
                assert error.code in (0, 2), f"{arguments}: exit status {error.code}"


_UNIT = np.zeros(OBS_SIZE, np.float32), np.ones(OBS_SIZE, np.float32)
_IDENTITY = {"format": submit.FORMAT, "seed": 0}  # of a package, and of a result


def _networks() -> dict[str, np.ndarray]:
    return ddpg.random_arrays(0, *_UNIT)


def _read_result(path: Path) -> None:
    report.finished(path, _IDENTITY)
    row = chain.Evaluation("zero torque", ("--policy", "zero"), "twin", path)
    chain.print_results(chain.Config(), chain.read_scores([row]), {"pretrain": 1.0})


def _stop(stage: str, command: list[str]) -> None:
    """In place of a script of the chain."""
    raise UserError(f"stage {stage} is not run")


# Each script, and what it checks before it works.
_SCRIPTS = [
    (train_mjx_sac, train_mjx_sac.check),
    (finetune_ddpg, finetune_ddpg.check),
    (chain, chain.main),  # to its first stage
    (convert_jax2torch, convert_jax2torch.main),  # there is no checkpoint, so it ends there
    (evaluate, evaluate._check),
    (gates, gates.load),
    (submit, submit._check_config),
]


def _options(config: type) -> list[str]:
    """The options of a script's configuration, nested ones too."""
    options = []
    for field in dataclasses.fields(config):
        nested = dataclasses.is_dataclass(field.default)
        options += _options(type(field.default)) if nested else [f"--{field.name.replace('_', '-')}"]
    return options


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
