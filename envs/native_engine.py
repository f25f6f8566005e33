"""Native MuJoCo on CPU threads: the engine where there is no GPU.

`mujoco.rollout` steps all lanes over a thread pool, ten physics steps a call, without the GIL. Chained
calls drop the solver's warm start between actions (3e-6 off after 50 steps); inside a call it is kept.
"""

import copy

import mujoco
import numpy as np
from mujoco import rollout

from envs import constants as c
from envs.randomization import Randomizer
from envs.scene import addresses, load_native_model, sensor_slices
from envs.tasks import View


class NativeEngine:
    """A batch of lanes of our scene. Arrays are float64 inside, float32 in the `View`s it gives."""

    def __init__(self, num_envs: int, num_threads: int = 2, dr_level: int = 0, seed: int = 0):
        model = load_native_model()
        self.num_envs = num_envs
        self._randomizer = Randomizer(model, dr_level)
        self._rng = np.random.default_rng(seed)
        # One model a lane only where they differ; models share nothing that is written.
        self._models = [model] if dr_level == 0 else [copy.copy(model) for _ in range(num_envs)]
        self._pool = rollout.Rollout(nthread=num_threads)
        self._datas = [mujoco.MjData(model) for _ in range(num_threads)]
        address, sensor = addresses(model), sensor_slices(model)
        self._joint_q = address.joint_q
        self._nq, self._nv = model.nq, model.nv
        self._ball_contact = np.concatenate(
            [
                np.arange(s.start, s.stop)
                for name, s in sensor.items()
                if name.startswith("ball_") and name.endswith("_contacts")
            ]
        )
        # Full physics state is time, qpos, qvel here: no activations, no plugins.
        size = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS)
        assert size == 1 + model.nq + model.nv
        self.state = np.zeros((num_envs, size))
        self.sensordata = np.zeros((num_envs, model.nsensordata))
        self.touched = np.zeros(num_envs, bool)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.close()

    def _model_list(self, lanes: np.ndarray):
        return self._models if len(self._models) == 1 else [self._models[i] for i in lanes]

    def reset(self, lanes: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Put lanes (n,) at qpos (n, nq), qvel (n, nv), with fresh sensors and newly drawn physics."""
        if len(lanes) == 0:
            return
        if len(self._models) > 1:
            for lane in lanes:
                for name, value in self._randomizer.draw(self._rng)._asdict().items():
                    getattr(self._models[lane], name)[:] = value
        state = np.concatenate([np.zeros((len(lanes), 1)), qpos, qvel], axis=1)
        # Sensors of the state itself are those of the first step's start; the step is thrown away. With the
        # target at the joints' own positions the PD torque is zero, as in the official reset.
        control = np.asarray(qpos, np.float64)[:, None, self._joint_q]
        _, sensordata = self._pool.rollout(self._model_list(lanes), self._datas, state, control, nstep=1)
        self.state[lanes] = state
        self.sensordata[lanes] = sensordata[:, 0]
        self.touched[lanes] = False

    def step(self, target_rad: np.ndarray) -> None:
        """Hold joint targets (B, 12) for one action: ten physics steps."""
        control = np.repeat(np.asarray(target_rad, np.float64)[:, None], c.PHYSICS_STEPS_PER_ACTION, axis=1)
        lanes = np.arange(self.num_envs)
        states, sensordata = self._pool.rollout(
            self._model_list(lanes), self._datas, self.state, control, nstep=c.PHYSICS_STEPS_PER_ACTION
        )
        self.state = states[:, -1]
        self.sensordata = sensordata[:, -1]
        self.touched = (sensordata[:, :, self._ball_contact] > 0).any(axis=(1, 2))

    def view(self) -> View:
        """The lanes' view, float32, leading axis B."""
        qpos = self.state[:, 1 : 1 + self._nq]
        qvel = self.state[:, 1 + self._nq :]
        f32 = np.float32
        return View(qpos.astype(f32), qvel.astype(f32), self.sensordata.astype(f32), self.touched.copy())
