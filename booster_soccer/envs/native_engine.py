"""Native MuJoCo on CPU threads: the engine where there is no GPU.

`mujoco.rollout` steps all lanes over a thread pool, ten physics steps a call, without the GIL. Chained
calls drop the solver's warm start between actions (3e-6 off after 50 steps); inside a call it is kept.
"""

import copy

import mujoco
import numpy as np
from mujoco import rollout

from booster_soccer.arrays import check_like, restore_rng, rng_array
from booster_soccer.envs import constants as c
from booster_soccer.envs.randomization import Physics, Randomizer
from booster_soccer.envs.scene import addresses, ball_contact_sensors, keep_mujoco_quiet, load_native_model
from booster_soccer.envs.tasks import View


class NativeEngine:
    """A batch of lanes of our scene. Arrays are float64 inside, float32 in the `View`s it gives."""

    def __init__(self, num_envs: int, num_threads: int = 2, dr_level: int = 0, seed: int = 0):
        model = load_native_model()
        keep_mujoco_quiet()
        self.num_envs = num_envs
        self._randomizer = Randomizer(model, dr_level)
        # One generator a lane, so that a lane's physics does not depend on how often the others are reset.
        self._rngs = [np.random.default_rng((seed, lane)) for lane in range(num_envs)]
        # One model a lane only where they differ; models share nothing that is written.
        self._models = [model] if dr_level == 0 else [copy.copy(model) for _ in range(num_envs)]
        self._pool = rollout.Rollout(nthread=num_threads)
        self._datas = [mujoco.MjData(model) for _ in range(num_threads)]
        self._joint_q = addresses(model).joint_q
        self._nq, self._nv = model.nq, model.nv
        self._timestep_s = model.opt.timestep
        self._ball_contact = ball_contact_sensors(model)
        # Full physics state is time, qpos, qvel here: no activations, no plugins.
        size = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS)
        assert size == 1 + model.nq + model.nv
        self.state = np.zeros((num_envs, size))
        self.sensordata = np.zeros((num_envs, model.nsensordata))
        self.touched = np.zeros(num_envs, bool)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.close()

    def _model_list(self, lanes: np.ndarray) -> list[mujoco.MjModel]:
        return self._models if len(self._models) == 1 else [self._models[i] for i in lanes]

    def reset(self, lanes: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Put lanes (n,) at qpos (n, nq), qvel (n, nv), with fresh sensors and newly drawn physics."""
        if len(lanes) == 0:
            return
        if len(self._models) > 1:
            for lane in lanes:
                for name, value in self._randomizer.draw(self._rngs[lane])._asdict().items():
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
        # On NaN or huge numbers MuJoCo starts again by itself, from the model's zero pose, and only the clock
        # tells. The rules must see the break, so the lane's numbers become NaN until it is reset.
        expected_s = self.state[:, 0] + c.PHYSICS_STEPS_PER_ACTION * self._timestep_s
        broken = ~(np.abs(states[:, -1, 0] - expected_s) < 0.5 * self._timestep_s)
        states[broken], sensordata[broken] = np.nan, np.nan
        self.state = states[:, -1]
        self.sensordata = sensordata[:, -1]
        self.touched = (sensordata[:, :, self._ball_contact] > 0).any(axis=(1, 2))

    def view(self) -> View:
        """The lanes' view, float32, leading axis B."""
        qpos = self.state[:, 1 : 1 + self._nq]
        qvel = self.state[:, 1 + self._nq :]
        f32 = np.float32
        return View(qpos.astype(f32), qvel.astype(f32), self.sensordata.astype(f32), self.touched.copy())

    def arrays(self) -> dict[str, np.ndarray]:
        """All that later steps depend on, as arrays: there is no warm start between calls."""
        arrays = {"state": self.state, "sensordata": self.sensordata, "touched": self.touched}
        if len(self._models) > 1:
            arrays["rng"] = np.stack([rng_array(rng) for rng in self._rngs])
            arrays |= {name: np.stack([getattr(m, name) for m in self._models]) for name in Physics._fields}
        return arrays

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from what `arrays` gave on an engine of the same settings."""
        check_like(arrays, self.arrays(), "the saved state of the lanes")
        self.state, self.sensordata = arrays["state"].copy(), arrays["sensordata"].copy()
        self.touched = arrays["touched"].copy()
        if len(self._models) > 1:
            for lane, model in enumerate(self._models):
                restore_rng(self._rngs[lane], arrays["rng"][lane])
                for name in Physics._fields:
                    getattr(model, name)[:] = arrays[name][lane]
