"""The submitted package: our control, accepted by the platform's own SDK, and sent only when told to."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from email import message_from_bytes
from pathlib import Path

import numpy as np
import pytest
import torch

import submit
from booster_soccer.agents.ddpg import Actor
from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.agents.submission_model import scripted
from booster_soccer.envs import constants as c
from booster_soccer.envs import official, pd
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE, SLICES, observe
from booster_soccer.preprocess.submission import Preprocessor
from booster_soccer.store import checkpoints

REPOSITORY = Path(__file__).resolve().parent.parent
KEY = "a-key-that-must-not-be-shown"
JOINT_POS, JOINT_VEL = SLICES["joint_pos"], SLICES["joint_vel"]


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """The SDK writes its settings into the home directory as soon as it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv(submit.KEY_VARIABLE, raising=False)
        yield


def _save(path: Path, stage: str, arrays: dict[str, np.ndarray]) -> Path:
    obs = np.random.default_rng(0).normal(size=(16, OBS_SIZE)).astype(np.float32)
    return checkpoints.save(path, stage, arrays, obs, {}, seed=0, steps=0, parents=[], metrics={})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> checkpoints.Checkpoint:
    """A converted checkpoint with random weights."""
    torch.manual_seed(0)
    arrays = {f"actor.{name}": value.numpy() for name, value in Actor().state_dict().items()}
    return checkpoints.load(_save(tmp_path_factory.mktemp("checkpoint") / "converted", "converted", arrays))


@pytest.fixture(scope="module")
def dry_run(checkpoint, tmp_path_factory) -> tuple[submit.Config, str]:
    """A dry run with one episode per task, and what it printed."""
    out = tmp_path_factory.mktemp("package") / "submission"
    config = submit.Config(checkpoint=checkpoint.path, out=out, episodes=1)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert submit.main(config) == out
    return config, printed.getvalue()


@pytest.fixture
def model(checkpoint) -> torch.jit.ScriptModule:
    return scripted(submit.actor_from_checkpoint(checkpoint))


# --- the model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("task", ["goalie", "target"])
def test_model_gives_our_torque_along_official_episodes(checkpoint, task, hold):
    """200 steps, then a new episode that begins in the middle of a held target."""
    policy = policy_from_arrays(checkpoint.arrays)
    model, preprocessor = scripted(submit.actor_from_checkpoint(checkpoint), hold), Preprocessor()
    env = official.make(task)
    for seed, steps in ((1, 204), (2, 25)):
        obs, info = env.reset(seed=seed)
        for step in range(steps):
            joint_pos_rad, joint_vel_rad_s = obs[JOINT_POS], obs[JOINT_VEL]
            if not hold or step % 10 == 0:
                target_rad = pd.joint_target_rad(policy(observe(joint_pos_rad, joint_vel_rad_s, info, np)))
            torque_nm = pd.torque_nm(target_rad, joint_pos_rad, joint_vel_rad_s, np)
            unit_torque = model(torch.from_numpy(preprocessor.modify_state(obs, info))).numpy()
            assert unit_torque.shape == (1, c.NUM_JOINTS) and unit_torque.dtype == np.float32
            assert np.abs(unit_torque).max() <= 1.0
            np.testing.assert_allclose(unit_torque[0] * c.TORQUE_LIMIT_NM, torque_nm, rtol=0, atol=1e-3)
            obs, _, _, _, info = env.step(torque_nm)
    env.close()


def test_torque_has_the_same_bits_in_numpy(model):
    """So an episode does not hang on whose matrix product it was. The torque is as the SDK rescales it."""
    weights = {name: value.detach().numpy() for name, value in model.actor.named_parameters()}
    policy = policy_from_arrays({f"actor.{name}": value for name, value in weights.items()})
    constants = (c.DEFAULT_POSE_RAD, c.ACTION_SCALE_RAD, c.KP_NM_PER_RAD, c.KD_NMS_PER_RAD, c.TORQUE_LIMIT_NM)
    pose, scale, kp, kd, limit = (constant.astype(np.float32) for constant in constants)
    preprocessor = Preprocessor()
    env = official.make("obstacle")
    obs, info = env.reset(seed=1)
    for step in range(200):
        observation = preprocessor.modify_state(obs, info)
        unit_torque = model(torch.from_numpy(observation)).numpy()[0]
        if step % 10 == 0:
            target = pose + policy(observation[0].astype(np.float64)).astype(np.float32) * scale
        spring = kp * (target - observation[0, JOINT_POS])
        expected = np.clip((spring - kd * observation[0, JOINT_VEL]) / limit, -1.0, 1.0)
        assert expected.dtype == np.float32 and np.array_equal(unit_torque, expected)
        obs, _, _, _, info = env.step(unit_torque * limit)
    env.close()


def _random_calls(calls: int, lanes: int) -> torch.Tensor:
    """Observations (calls, lanes, 87) of lanes that all start an episode at the first call."""
    obs = torch.randn(calls, lanes, OBS_SIZE, generator=torch.Generator().manual_seed(1))
    obs[0, :, JOINT_VEL] = 0.0
    return obs


def test_lanes_do_not_touch_each_other(checkpoint):
    """Lanes that restart at different times act, bit for bit, like models that have one lane each."""
    actor = submit.actor_from_checkpoint(checkpoint)
    obs = _random_calls(30, 3)
    obs[7, 1, JOINT_VEL] = 0.0  # in the middle of a hold
    obs[13, 2, JOINT_VEL] = 0.0
    obs[20:, 0] = torch.nan  # a finished lane whose physics has blown up
    together = scripted(actor)
    together = torch.stack([together(call) for call in obs])
    for lane in range(3):
        alone = scripted(actor)
        alone = torch.cat([alone(call[lane : lane + 1]) for call in obs])
        assert torch.equal(together[:, lane].nan_to_num(nan=9.0), alone.nan_to_num(nan=9.0))


def test_another_batch_size_starts_afresh(checkpoint, model):
    obs = torch.randn(2, 3, OBS_SIZE, generator=torch.Generator().manual_seed(2))
    model(obs[0])
    fresh = scripted(submit.actor_from_checkpoint(checkpoint))
    assert torch.equal(model(obs[1, :2]), fresh(obs[1, :2]))
    assert model.age.tolist() == [1, 1]


def test_stateless_model_keeps_nothing(checkpoint):
    model = scripted(submit.actor_from_checkpoint(checkpoint), hold=False)
    calls = _random_calls(3, 2)
    first = model(calls[1])
    model(calls[2])
    assert torch.equal(model(calls[1]), first)
    assert model.age.numel() == model.target_rad.numel() == 0


# --- the platform's SDK -------------------------------------------------------------------------------


def test_sdk_saves_and_loads_the_model(model, tmp_path):
    """What the SDK writes is the scripted module itself: the hold survives, at any batch size."""
    from sai_rl.model import ModelManager

    env = official.make("target")
    path = str(tmp_path / "saved.pt")
    ModelManager(env=env, model=model, model_type="pytorch").save_model(path)
    loaded = ModelManager(env=env, model=path, model_type="pytorch").model
    env.close()
    for obs in _random_calls(25, 2):
        assert torch.equal(loaded(obs), model(obs))


def test_sdk_runs_the_preprocessor_without_an_environment(dry_run):
    from sai_rl.model.custom import PreprocessingManager

    source = dry_run[0].out / submit.PREPROCESSOR
    assert source.read_text().startswith("class Preprocessor")
    manager = PreprocessingManager(preprocessor_class=str(source), env=None)
    env = official.make("obstacle")
    obs, info = env.reset(seed=5)
    for _ in range(20):
        obs, _, _, _, info = env.step(env.action_space.high)
    env.close()
    ours = observe(obs[JOINT_POS], obs[JOINT_VEL], info, np)
    one = manager.modify_state(obs, info)
    arrays = {name: value for name, value in info.items() if isinstance(value, np.ndarray)}
    batched = {name: np.stack([value, value]) for name, value in arrays.items()}
    two = manager.modify_state(np.stack([obs, obs]), batched)
    assert one.shape == (1, OBS_SIZE) and two.shape == (2, OBS_SIZE) and one.dtype == np.float32
    np.testing.assert_allclose(one[0], ours, rtol=1e-6, atol=1e-6)
    assert np.array_equal(two, np.concatenate([one, one]))


def test_evaluation_function_is_the_official_score():
    class Ended:
        def compute_reward(self):
            return {
                "goal_scored": True,
                "ball_vel_twd_goal": 2.0,
                "robot_distance_ball": 1.5,
                "offside": False,
                "robot_fallen": True,
                "ball_blocked": False,
                "ball_hits": np.log1p(1),
                "ball_distance_target": 7.0,  # not scored
            }

    namespace = {"np": np}
    exec(submit.evaluation_source("obstacle"), namespace)
    evaluate = namespace["evaluation_fn"]
    assert evaluate(None, {"terminated": False, "truncated": False})[0] == 0.0
    # 2.5 + 1.5 * 2 + 0.25 * 1.5 - 1.5 - 0.2 * ln 2 - 1
    assert evaluate(Ended(), {"terminated": False, "truncated": True})[0] == pytest.approx(3.2363705639)
    assert evaluate(Ended(), {"terminated": True, "truncated": False})[0] == pytest.approx(3.2363705639)


# --- the package --------------------------------------------------------------------------------------


def test_dry_run_writes_a_proved_package(checkpoint, dry_run):
    config, printed = dry_run
    files = {submit.MODEL, submit.PREPROCESSOR, submit.MANIFEST, submit.SCORE}
    assert {file.name for file in config.out.iterdir()} == files
    beside = sorted(file.name for file in config.out.parent.iterdir())
    assert beside == [config.out.name, f"{config.out.name}.html"]
    assert "dry run: nothing was sent" in printed
    assert printed.splitlines()[-1] == str(config.out)

    manifest = json.loads((config.out / submit.MANIFEST).read_text())
    assert manifest["checkpoint"] == checkpoint.hash and manifest["stage"] == "converted"
    assert manifest["files"].keys() == files - {submit.MANIFEST}
    for file, digest in manifest["files"].items():
        assert hashlib.sha256((config.out / file).read_bytes()).hexdigest() == digest
        assert digest in printed or file == submit.SCORE

    score = json.loads((config.out / submit.SCORE).read_text())
    assert score["tasks"].keys() == set(c.TASKS)
    assert score["mean"] == pytest.approx(np.mean([task["mean"] for task in score["tasks"].values()]))
    for task in score["tasks"].values():
        assert task["same_torques_max_difference"] <= 1e-9
        assert task["torque_max_difference_nm"] <= 1e-3
        assert task["seeds"] == [official.match_seed(0, 0)]
        # A random policy falls within a second or two, too soon for rounding to grow into another ending.
        assert task["evaluate_max_difference"] < 0.05


def test_proof_fails_when_the_model_is_not_our_control(checkpoint, tmp_path, monkeypatch):
    """A package whose hold differs from the policy's is refused, and nothing stays on disk."""
    monkeypatch.setattr(submit, "scripted", lambda actor, hold: scripted(actor, not hold))
    monkeypatch.setattr(c, "TASKS", ("target",))
    with pytest.raises(UserError, match="torque differs from our own"):
        submit.main(submit.Config(checkpoint=checkpoint.path, out=tmp_path / "out", episodes=1))
    assert list(tmp_path.iterdir()) == []


def test_same_package_is_kept_and_anything_else_refused(checkpoint, dry_run, tmp_path, capsys):
    config, _ = dry_run
    copy = dataclasses.replace(config, out=tmp_path / "copy")
    shutil.copytree(config.out, copy.out)
    before = (copy.out / submit.MANIFEST).read_bytes()
    assert submit.main(copy) == copy.out
    assert "already holds this package" in capsys.readouterr().out
    assert (copy.out / submit.MANIFEST).read_bytes() == before

    with pytest.raises(UserError, match="holds something else"):
        submit.main(dataclasses.replace(copy, seed=1))
    with open(copy.out / submit.PREPROCESSOR, "a") as file:
        file.write("# changed\n")
    with pytest.raises(UserError, match="holds something else"):
        submit.main(copy)
    with pytest.raises(UserError, match="holds something else"):
        submit.main(dataclasses.replace(config, out=checkpoint.path))
    checkpoints.load(checkpoint.path)  # untouched


def test_bad_input_is_one_clear_line(checkpoint, tmp_path):
    config = submit.Config(checkpoint=checkpoint.path, out=tmp_path / "out")
    with pytest.raises(UserError, match=submit.KEY_VARIABLE):
        submit.main(dataclasses.replace(config, yes=True))
    with pytest.raises(UserError, match="not there"):
        submit.main(dataclasses.replace(config, checkpoint=tmp_path / "missing"))
    with pytest.raises(UserError, match="--episodes 0"):
        submit.main(dataclasses.replace(config, episodes=0))

    rng = np.random.default_rng(0)
    widths = (OBS_SIZE, 256, 256, 2 * c.NUM_JOINTS)
    arrays = {"normalizer.mean": np.zeros(OBS_SIZE, np.float32)}
    arrays["normalizer.std"] = np.ones(OBS_SIZE, np.float32)
    for layer, n_in, n_out in zip(("input", "hidden", "output"), widths, widths[1:]):
        arrays[f"actor.{layer}.kernel"] = rng.normal(0, 0.05, (n_in, n_out)).astype(np.float32)
        arrays[f"actor.{layer}.bias"] = np.zeros(n_out, np.float32)
    pretrained = _save(tmp_path / "pretrained", "pretrained", arrays)
    with pytest.raises(UserError, match="convert it first"):
        submit.main(dataclasses.replace(config, checkpoint=pretrained))
    assert not (tmp_path / "out").exists()


# --- sending, to a stub of the platform on this machine -----------------------------------------------


class Platform(http.server.ThreadingHTTPServer):
    """Answers like the platform and keeps what it is sent."""

    def __init__(self, tasks=c.TASKS, submission_status=200):
        self.tasks, self.submission_status = tasks, submission_status
        self.key, self.parts, self.submissions = None, {}, 0
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        package = {"id": "p", "name": "sai_mujoco", "version": "99.0.0"}  # newer: the SDK wants to update
        environments = [
            {"id": t, "name": t, "gymId": c.GYM_ID[t], "type": "gymnasium", "actionType": "continuous"}
            for t in self.server.tasks
        ]
        competition = {
            "id": "stub",
            "slug": "stub",
            "name": "Stub",
            "opensource": False,
            "linkedBenchmark": {
                "collectionName": "environments",
                "document": environments[0] | {"package": package},
            },
            "tasks": [{"environment": e | {"package": package}} for e in environments],
        }
        self._answer(200, competition if self.path == "/v1/competitions/stub" else package)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        header = b"Content-Type: " + self.headers["Content-Type"].encode()
        form = message_from_bytes(header + b"\r\n\r\n" + body)
        self.server.parts = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in form.get_payload()
        }
        self.server.key = self.headers["X-API-Key"]
        self.server.submissions += 1
        if self.server.submission_status != 200:
            self._answer(self.server.submission_status, {"error": f"bad key {self.server.key}"})
            return
        self._answer(
            200,
            {
                "id": "sub_1",
                "name": "n",
                "type": "pytorch",
                "status": "queued",
                "competition": {"id": "stub", "slug": "stub", "name": "Stub"},
                "updatedAt": "now",
                "createdAt": "now",
            },
        )

    def _answer(self, status: int, content: dict):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def _serve(platform: Platform):
    thread = threading.Thread(target=platform.serve_forever)
    thread.start()
    try:
        yield platform
    finally:
        platform.shutdown()
        thread.join()
        platform.server_close()


@pytest.fixture
def package(dry_run, tmp_path) -> Path:
    return Path(shutil.copytree(dry_run[0].out, tmp_path / "package"))


def test_real_client_sends_the_package(dry_run, package):
    config, _ = dry_run
    command = [sys.executable, "submit.py", "--checkpoint", config.checkpoint, "--out", package]
    command += ["--episodes", "1", "--competition", "stub", "--yes"]
    with _serve(Platform()) as platform:
        environment = os.environ | {submit.KEY_VARIABLE: KEY, "SAI_API_BASE": platform.url}
        run = subprocess.run(
            command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == str(package)
    assert platform.key == KEY and platform.submissions == 1
    assert KEY not in run.stdout + run.stderr

    assert platform.parts["competitionId"] == b"stub" and platform.parts["type"] == b"pytorch"
    assert platform.parts["preprocessCode"] == (package / submit.PREPROCESSOR).read_bytes()
    sent = torch.jit.load(io.BytesIO(platform.parts["model"]))
    ours = torch.jit.load(str(package / submit.MODEL))
    for obs in _random_calls(25, 2):
        assert torch.equal(sent(obs), ours(obs))

    receipt = (package / submit.RECEIPT).read_text()
    assert json.loads(receipt)["id"] == "sub_1" and KEY not in receipt
    with pytest.raises(UserError, match="sent already"):
        submit.send(package, "stub", "again")


@pytest.mark.parametrize(
    ("platform", "message"),
    [
        (lambda: Platform(tasks=("obstacle", "goalie", "target")), "choose the right one with --competition"),
        (lambda: Platform(submission_status=401), "could not send"),
    ],
    ids=["other task order", "key refused"],
)
def test_refused_submission_is_one_clear_line(package, monkeypatch, platform, message):
    monkeypatch.setenv(submit.KEY_VARIABLE, KEY)
    with _serve(platform()) as platform:
        monkeypatch.setenv("SAI_API_BASE", platform.url)
        with pytest.raises(UserError, match=message) as refused:
            submit.send(package, "stub", "name")
    assert KEY not in str(refused.value) and "\n" not in str(refused.value)
    assert platform.submissions == (message == "could not send")
    assert not (package / submit.RECEIPT).exists()


def test_no_network_is_one_clear_line(package, monkeypatch):
    monkeypatch.setenv(submit.KEY_VARIABLE, KEY)
    monkeypatch.setenv("SAI_API_BASE", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="could not send") as refused:
        submit.send(package, "stub", "name")
    assert KEY not in str(refused.value) and "\n" not in str(refused.value)
