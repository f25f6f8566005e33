"""Stage 5: package a policy for the platform, prove the package with the platform's own SDK, send it.

    python submit.py --checkpoint DIR --out DIR [--yes]

Input: a converted or fine-tuned checkpoint. Output: a directory with

    model.pt         TorchScript: preprocessed observation in, unit torque out, 50 Hz hold inside
    preprocessor.py  the source of the preprocessor class, as the platform will run it
    manifest.json    which checkpoint and code it came from, checksums of the other files
    score.json       the score the SDK's benchmark gave, and how it compares with our own

Without `--yes` nothing leaves the machine. The proof: the SDK loads both files and plays the three
official environments with the official score. The same torques are then played again in our own runner
(`rollout/play.py`): score and length must be equal. Along the way our own NumPy control says at every
physics step which torque it would have given: the module may differ by rounding only. What `evaluate.py`
gives for the same seeds is reported beside it; where the two round differently it need not be equal, since
contacts are chaotic and a difference in the seventh digit of a torque can grow into another ending.

With `--yes` the real client sends the two files. The API key is taken from the variable SAI_API_KEY by the
SDK itself; we neither hold nor print it. The SDK writes a `.sai` directory into the home directory as soon
as it is imported, so it is imported only when it is needed.
"""

from booster_soccer import terminal

terminal.begin(__name__)

import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
import tyro

from booster_soccer import errors
from booster_soccer.agents.ddpg import Actor, load_module
from booster_soccer.agents.policy import ACTION_LIMITS, policy_from_arrays
from booster_soccer.agents.submission_model import scripted
from booster_soccer.envs import constants as c
from booster_soccer.errors import More, UserError
from booster_soccer.preprocess.observation import LAYOUT_HASH
from booster_soccer.preprocess.submission import Preprocessor
from booster_soccer.rewards.official import WEIGHTS
from booster_soccer.store import checkpoints, manifests
from booster_soccer.store.entry import guarded
from booster_soccer.store.places import check_own_directory, is_vacant
from booster_soccer.tracking import stage_pages
from booster_soccer.tracking.record import Recorder, Result, TrackConfig
from booster_soccer.tracking.report import print_submission

FORMAT = "booster-soccer submission"
MODEL, PREPROCESSOR, MANIFEST, SCORE = "model.pt", "preprocessor.py", "manifest.json", "score.json"
_FILES = (MODEL, PREPROCESSOR, SCORE)  # whose checksums the manifest holds
RECEIPT = "submission.json"  # only after sending: what the platform answered
KEY_VARIABLE = "SAI_API_KEY"
SCORE_TOLERANCE = 1e-9  # same torques in the same environment: only the order of a sum may differ
# Rounding to float32: some 1e-6 in an action, times gains of up to 200 N m/rad.
TORQUE_TOLERANCE_NM = 0.01


@dataclass(frozen=True)
class Config:
    """What to package, how to prove it, and whether to send it."""

    checkpoint: Path  # directory of a converted or fine-tuned checkpoint
    out: Path  # directory to write; must be new or empty, or hold this very package
    yes: bool = False  # send it; without, a dry run
    episodes: int = 3  # per task, for the proof; the platform itself plays 100
    seed: int = 0  # master seed, from which the platform's own function draws each episode's
    hold: bool = True  # hold each joint target for ten physics steps, as trained; off: stateless model
    competition: str = "booster-soccer-showdown"  # the platform's id or short name of the competition
    name: str = ""  # of the submission; empty: stage and hash of the checkpoint
    tracking: TrackConfig = TrackConfig()


@guarded("out")
def main(config: Config) -> Path:
    """Write and prove the package, send it if told to; return its directory."""
    _check_config(config)
    checkpoint = checkpoints.load(config.checkpoint)
    if checkpoint.stage == "pretrained":
        raise UserError(
            f"checkpoint {config.checkpoint} is 'pretrained', and the platform takes PyTorch: convert it "
            f"first, {sys.executable} convert_jax2torch.py --checkpoint {config.checkpoint} --out DIR"
        )
    identity = {
        "format": FORMAT,
        "checkpoint": checkpoint.hash,
        "hold_physics_steps": _hold_steps(config),
        "seed": config.seed,
        "episodes_per_task": config.episodes,
    }
    if not is_vacant(config.out):
        _check_same_package(config.out, identity)
        print(f"{config.out} already holds this package, proved; its files are as they were written")
    else:
        with Recorder(config.out, "submission", config, [checkpoint]) as recorder:
            mean = build(config, checkpoint, identity)
            recorder.result(Result({"result/sdk_score": mean}, [config.out], checkpoint))
    print_score(config.out)
    stage_pages.of_submission(config.out)
    name = config.name or f"{checkpoint.stage}-{checkpoint.hash}"
    _print_contents(config, name)
    if config.yes:
        send(config.out, config.competition, name)
        stage_pages.of_submission(config.out)  # it says that it was sent
    else:
        print("dry run: nothing was sent; add --yes to send")
    print(config.out)
    return config.out


def build(config: Config, checkpoint: checkpoints.Checkpoint, identity: dict[str, Any]) -> float:
    """Write the package beside its place, prove it there, then move it into place, all or nothing; the mean score."""
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{config.out.name}.", dir=config.out.parent))
    except OSError as error:
        raise UserError(f"cannot write into {config.out.parent}: {error.strerror}; choose another --out") from error
    try:
        model = scripted(actor_from_checkpoint(checkpoint), config.hold)
        try:
            torch.jit.save(model, str(work / MODEL))
        except RuntimeError as error:  # how PyTorch reports a full disk
            raise UserError(f"cannot write {config.out}: {_one_line(error)}; free space; {More.DISK_FULL}") from error
        (work / PREPROCESSOR).write_text(inspect.getsource(Preprocessor))
        tasks = prove(work, checkpoint, config)
        mean = float(np.mean([result["mean"] for result in tasks.values()]))
        _write_json(work / SCORE, {"mean": mean} | identity | {"tasks": tasks})
        manifest = identity | {
            "stage": checkpoint.stage,
            "lineage": checkpoint.manifest["lineage"],  # of the checkpoint, oldest first
            "code": checkpoint.manifest["code"],
            "observation_layout": LAYOUT_HASH,
            "official_score": mean,
            "versions": manifests.versions(),
            "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": {file: _sha256(work / file) for file in _FILES},
        }
        _write_json(work / MANIFEST, manifest)
        os.chmod(work, 0o755)  # mkdtemp's own is for the owner only
        if config.out.exists():
            config.out.rmdir()
        shutil.move(work, config.out)
        return mean
    finally:
        shutil.rmtree(work, ignore_errors=True)


def actor_from_checkpoint(checkpoint: checkpoints.Checkpoint) -> Actor:
    """The PyTorch actor of a converted or fine-tuned checkpoint, held against the golden pairs."""
    actor = load_module(Actor(), "actor", checkpoint.arrays)
    with torch.no_grad():
        actions = actor(torch.from_numpy(checkpoint.golden_obs)).numpy()
    difference = float(np.abs(actions - checkpoint.golden_actions).max())
    if not difference <= ACTION_LIMITS["float32"]:
        raise UserError(
            f"checkpoint {checkpoint.path}: in PyTorch its policy differs from its golden actions by "
            f"{difference:.1e}, more than {ACTION_LIMITS['float32']:.0e}; convert it again; {More.CHECKPOINT}"
        )
    return actor


# --- the proof --------------------------------------------------------------------------------------


class SubmittedTorque(gym.Wrapper):
    """The official environment, driven by the submitted model, whatever torque it is given.

    The given torque (12,) in N m is our own control's for the same observation; the largest difference
    between the two is kept.
    """

    def __init__(self, env: gym.Env, manager):
        super().__init__(env)
        self.manager = manager
        self.max_difference_nm = 0.0

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.obs, self.info = self.env.reset(seed=seed, options=options)
        return self.obs, self.info

    def step(self, action):
        submitted_nm = self.manager.get_action(self.obs, self.info)[0]
        difference_nm = np.abs(submitted_nm - action).max()
        self.max_difference_nm = float(np.maximum(self.max_difference_nm, difference_nm))  # keeps a NaN
        self.obs, reward, terminated, truncated, self.info = self.env.step(submitted_nm)
        return self.obs, reward, terminated, truncated, self.info


def prove(package: Path, checkpoint: checkpoints.Checkpoint, config: Config) -> dict[str, dict[str, Any]]:
    """Score the two files with the SDK, by task, and hold that against our own; `UserError` if they differ."""
    sdk, (official, player) = _import_sdk(), _import_player()
    policy = policy_from_arrays(checkpoint.arrays)
    tasks = {}
    for task in c.TASKS:
        print(f"{task}: {config.episodes} episodes in the SDK's benchmark, and again in our own runner")
        env = official.make(task)
        scores, seconds, seeds, manager = sdk_benchmark(sdk, package, env, task, config)
        if seeds != [official.match_seed(config.seed, i) for i in range(config.episodes)]:
            raise UserError(f"the SDK drew other seeds than envs/official.py: use the pinned sai-rl; {More.VERSIONS}")
        replay = SubmittedTorque(env, manager)
        lanes = player.OfficialLanes(task, replay, _hold_steps(config))
        replayed = list(player.play(lanes, policy, [player.Episode(task, seed) for seed in seeds]))
        env.close()
        apart = _max_difference(scores, [result.score for result in replayed])
        tasks[task] = {
            "mean": float(np.mean(scores)),
            "scores": scores,
            "seeds": seeds,
            "physics_steps": [result.physics_steps for result in replayed],
            "same_torques_max_difference": apart,
            "torque_max_difference_nm": replay.max_difference_nm,
        }
        # The SDK does not count an episode's last step.
        lengths_agree = np.allclose(seconds, [(result.physics_steps - 1) * c.PHYSICS_DT_S for result in replayed])
        if not (apart <= SCORE_TOLERANCE and lengths_agree):
            raise UserError(
                f"task '{task}': the SDK's benchmark scored {scores}, our runner with the same torques "
                f"{[result.score for result in replayed]}: one of the two has changed; use the pinned sai-rl "
                f"and sai-mujoco, then report this; {More.DRY_RUN}"
            )
        if not replay.max_difference_nm <= TORQUE_TOLERANCE_NM:
            raise UserError(
                f"task '{task}': the submitted model's torque differs from our own control's by "
                f"{replay.max_difference_nm:.3g} N m, more than {TORQUE_TOLERANCE_NM}: agents/submission_model.py and "
                f"envs/pd.py disagree, so neither can be trusted; report this; {More.DRY_RUN}"
            )
    if config.hold:
        _add_evaluation(tasks, policy, player)
    return tasks


def sdk_benchmark(
    sdk: SimpleNamespace, package: Path, env: gym.Env, task: str, config: Config
) -> tuple[list[float], list[float], list[int], Any]:
    """Scores, lengths in seconds and seeds of one task's episodes, by the SDK; and its loaded model."""
    with mock.patch.dict(os.environ, AUTO_APPROVE_CUSTOM_EVAL="true"):  # the evaluation function is our own
        factory = sdk.make_env_factory(sdk_task(sdk, task), use_custom_eval=True, competition_id="dry run")
        try:
            manager = sdk.ModelManager(
                env=env,  # read for its spaces only; the benchmark makes its own
                model=str(package / MODEL),
                model_type="pytorch",
                preprocessor_class=str(package / PREPROCESSOR),
            )
            episodes, _, seeds = sdk.run_benchmark(
                factory, get_actions=manager.get_action, num_envs=config.episodes, seed=config.seed
            )
        except sdk.SAIError as error:
            cause = error.__cause__ or error
            said = f"task '{task}': the SDK refused the package: {_one_line(cause)}"
            raise UserError(f"{said}; {More.DRY_RUN}") from error
    return [e["score"] for e in episodes], [e["duration"] for e in episodes], seeds, manager


def sdk_task(sdk: SimpleNamespace, task: str):
    """The SDK's description of one of our tasks, with the official score as its evaluation function."""
    version = importlib.metadata.version("sai-mujoco")
    package = sdk.PackageType(id="sai_mujoco", name="sai_mujoco", version=version)
    kind = {"type": "gymnasium", "actionType": "continuous", "package": package}
    environment = sdk.EnvironmentType(id=task, name=task, gymId=c.GYM_ID[task], **kind)
    place = {"index": c.TASKS.index(task), "totalTaskCount": c.NUM_TASKS}
    return sdk.TaskType(id=task, environment=environment, evaluationFn=evaluation_source(task), **place)


def evaluation_source(task: str) -> str:
    """The official score as the platform keeps it: source of `evaluation_fn(env, eval_state)`."""
    return f"""
def evaluation_fn(env, eval_state):
    if not (eval_state["terminated"] or eval_state["truncated"]):
        return 0.0, eval_state
    raw = dict(env.compute_reward(), steps=1.0)
    weights = {WEIGHTS[task]!r}
    return sum(weight * float(raw.get(name, 0.0)) for name, weight in weights.items()), eval_state
"""


def _add_evaluation(tasks: dict[str, dict], policy, player) -> None:
    """Add what `evaluate.py` gives for the same seeds: our float64 control by itself, free to drift away."""
    episodes = [player.Episode(task, seed) for task in tasks for seed in tasks[task]["seeds"]]
    results = player.play_in_workers("official", policy, episodes)
    for task, entry in tasks.items():
        own = [result.score for result in results if result.task == task]
        entry["evaluate_mean"] = float(np.mean(own))
        entry["evaluate_scores"] = own
        entry["evaluate_max_difference"] = _max_difference(entry["scores"], own)


# --- sending ----------------------------------------------------------------------------------------


def send(package: Path, competition: str, name: str) -> None:
    """Send the two files with the SDK's client and keep the platform's answer; `UserError` if it fails."""
    receipt = package / RECEIPT
    if receipt.exists():
        said = f"{receipt}: this package was sent already, and the platform refuses a model twice"
        raise UserError(f"{said}; {More.SUBMISSION}")
    sdk = _import_sdk()
    # Where a newer version exists the SDK offers to install it, which would break the pinned environment.
    sdk.PackageControl._ask_user_for_installation = lambda *args, **kwargs: False
    try:
        client = sdk.SAIClient()
        _check_tasks(client.load_competition(competition), competition)
        answer = client.submit(
            name, model=str(package / MODEL), model_type="pytorch", preprocessor_class=str(package / PREPROCESSOR)
        )
    except UserError:
        raise
    # Whatever the client raises must not become a traceback: its frames hold the request's headers.
    except (Exception, SystemExit) as error:
        raise UserError(
            f"could not send {package} to '{competition}': {_one_line(error)}; the package is complete, "
            f"try again with the same command; {More.SUBMISSION}"
        ) from None
    _write_json(receipt, answer.model_dump() | {"sent_utc": datetime.now(UTC).isoformat(timespec="seconds")})
    print(f"sent: submission {answer.id}, status {answer.status}; the answer is in {receipt}")


def _check_tasks(tasks: list, competition: str) -> None:
    """Refuse a competition whose tasks are not ours in our order: the one-hot would mean something else."""
    expected = [c.GYM_ID[task] for task in c.TASKS]
    found = [task.environment.gymId for task in tasks]
    if found != expected:
        raise UserError(
            f"competition '{competition}' has the tasks {found}, but the policy was trained for {expected}: "
            f"choose the right one with --competition; {More.SUBMISSION}"
        )


# --- the platform's SDK and environments, imported late ------------------------------------------------


def _import_sdk() -> SimpleNamespace:
    """The parts of `sai_rl` used here, imported without its hook that prints local variables on a crash."""
    try:
        with mock.patch("rich.traceback.install"):
            from sai_rl import SAIClient  # noqa: F401
            from sai_rl.benchmark import run_benchmark  # noqa: F401
            from sai_rl.env import make_env_factory  # noqa: F401
            from sai_rl.error import SAIError  # noqa: F401
            from sai_rl.model import ModelManager  # noqa: F401
            from sai_rl.package import PackageControl  # noqa: F401
            from sai_rl.types import EnvironmentType, PackageType, TaskType  # noqa: F401
        return SimpleNamespace(**locals())
    except ImportError as error:
        raise UserError(
            f"cannot import the platform's SDK: {_one_line(error)}; install sai-rl; {More.VERSIONS}"
        ) from error
    except OSError as error:
        raise UserError(
            f"the platform's SDK cannot write its settings: {_one_line(error)}; set HOME to a writable directory"
        ) from error


def _import_player():
    """`envs.official` and `rollout.play`; importing mujoco fails where MUJOCO_GL names an OpenGL that is not there."""
    try:
        from booster_soccer.envs import official
        from booster_soccer.rollout import play
    except (ImportError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"cannot import the official environments with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r}: "
            f"{_one_line(error)}; nothing is rendered here, so set MUJOCO_GL=disable; {More.OPENGL}"
        ) from error
    return official, play


# --- checks, files and text ---------------------------------------------------------------------------


def _hold_steps(config: Config) -> int:
    return c.PHYSICS_STEPS_PER_ACTION if config.hold else 1


def _check_config(config: Config) -> None:
    """Refuse at once what would only fail after the proof."""
    if config.episodes < 1:
        raise UserError(f"--episodes {config.episodes}: at least one episode per task is needed")
    if not 0 <= config.seed < 2**256:
        raise UserError(f"--seed {config.seed}: the platform's seeds are 0 to 2^256 - 1")
    check_own_directory(config.out)
    if config.yes and not os.environ.get(KEY_VARIABLE):
        raise UserError(f"no API key: set {KEY_VARIABLE} to your account's key, or leave out --yes; {More.SUBMISSION}")


def _check_same_package(out: Path, identity: dict[str, Any]) -> None:
    """Raise `UserError` unless a directory holds the whole package that would be written now."""
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        is_same = all(manifest[key] == value for key, value in identity.items())
        files = manifest["files"]
        is_whole = files.keys() == set(_FILES) and all(_sha256(out / file) == files[file] for file in _FILES)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_same = is_whole = False
    if not (is_same and is_whole):
        raise UserError(
            f"{out} holds something else than this package: nothing was touched; choose another --out, or move it away"
        )


def _max_difference(a: list[float], b: list[float]) -> float:
    return float(np.max(np.abs(np.subtract(a, b))))


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(manifests.finite(content), indent=2, allow_nan=False) + "\n")


def _one_line(error: BaseException) -> str:
    """An exception in one line, without the API key should a server have sent it back."""
    text = " ".join(f"{type(error).__name__} {error}".split())[:300]
    key = os.environ.get(KEY_VARIABLE)
    return text.replace(key, "***") if key else text


def print_score(package: Path) -> None:
    """The table of a package's score; `UserError` if its file is none."""
    try:
        print_submission(json.loads((package / SCORE).read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{package / SCORE} is no score of a package: move {package} away") from error


def _print_contents(config: Config, name: str) -> None:
    print(f"to send: submission '{name}' to competition '{config.competition}', as a PyTorch model")
    for file in (MODEL, PREPROCESSOR):
        path = config.out / file
        print(f"  {path}: {path.stat().st_size:,} bytes, sha256 {_sha256(path)}")


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))
