"""MJX: the engine for GPUs (it also runs on CPU). Pure functions over a batch of lanes, for use inside jit."""

import jax
import jax.numpy as jnp
import numpy as np
from mujoco import mjx

from envs import constants as c
from envs.randomization import Physics, Randomizer
from envs.scene import addresses, load_mjx_model, sensor_slices
from envs.tasks import View


class MjxEngine:
    """A batch of lanes; randomised physics is drawn once a lane, since thousands of lanes cover the ranges."""

    def __init__(self, num_envs: int, dr_level: int = 0, seed: int = 0):
        native = load_mjx_model()
        self.num_envs = num_envs
        self.model = mjx.put_model(native)
        self._template = mjx.make_data(native)
        self._model_axes = None
        if dr_level:
            randomizer, rng = Randomizer(native, dr_level), np.random.default_rng(seed)
            draws = [randomizer.draw(rng) for _ in range(num_envs)]
            fields = {name: jnp.asarray(np.stack([getattr(d, name) for d in draws]), jnp.float32) for name in Physics._fields}
            self._model_axes = jax.tree.map(lambda _: None, self.model).tree_replace({name: 0 for name in fields})
            self.model = self.model.tree_replace(fields)
        self._joint_q = addresses(native).joint_q
        sensor = sensor_slices(native)
        contacts = [s for name, s in sensor.items() if name.startswith("ball_") and name.endswith("_contacts")]
        self._ball_contact = np.concatenate([np.arange(s.start, s.stop) for s in contacts])

    def reset(self, qpos: jax.Array, qvel: jax.Array) -> mjx.Data:
        """Data at qpos (B, nq), qvel (B, nv), with fresh sensors and no torque."""

        def one(model, qpos, qvel):
            data = self._template.replace(qpos=qpos, qvel=qvel, ctrl=qpos[self._joint_q])
            return mjx.forward(model, data)

        return jax.vmap(one, in_axes=(self._model_axes, 0, 0))(self.model, qpos, qvel)

    def step(self, data: mjx.Data, target_rad: jax.Array) -> tuple[mjx.Data, jax.Array]:
        """Hold joint targets (B, 12) for one action; also whether robot and ball touched, (B,) bool."""

        def one(model, data, target_rad):
            def physics_step(data, _):
                data = mjx.step(model, data.replace(ctrl=target_rad))
                return data, (data.sensordata[self._ball_contact] > 0).any()

            data, touched = jax.lax.scan(physics_step, data, length=c.PHYSICS_STEPS_PER_ACTION)
            return data, touched.any()

        return jax.vmap(one, in_axes=(self._model_axes, 0, 0))(self.model, data, target_rad)

    @staticmethod
    def view(data: mjx.Data, touched: jax.Array) -> View:
        """The lanes' view, leading axis B."""
        return View(data.qpos, data.qvel, data.sensordata, touched)
