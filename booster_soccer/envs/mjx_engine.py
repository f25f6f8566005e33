"""MJX: the engine for GPUs (it also runs on CPU). Pure functions over a batch of lanes, for use inside jit.

Importing this module gives MJX 3.3.7 two collision functions, without which a running foot would not meet the
ground that native MuJoCo gives it (docs/experiments.md). MJX has no public place for them.
"""

import contextlib
import io
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

with contextlib.redirect_stdout(io.StringIO()):  # it says that Warp, another engine, is not installed
    from mujoco import mjx
from mujoco.mjx._src import smooth, solver
from mujoco.mjx._src.collision_driver import _COLLISION_FUNC
from mujoco.mjx._src.collision_primitive import GeomInfo, collider
from mujoco.mjx._src.math import make_frame

from booster_soccer.envs import constants as c
from booster_soccer.envs import mjx_solver
from booster_soccer.envs.randomization import Physics, Randomizer
from booster_soccer.envs.scene import addresses, ball_contact_sensors, load_mjx_model, sensor_slices
from booster_soccer.envs.tasks import View

# MJX's box against box writes the largest float64 for "no contact", which becomes infinity in float32, as it should.
warnings.filterwarnings("ignore", "overflow encountered in cast", RuntimeWarning, r"jax\._src\.")

# One end of each of a box's four diagonals, in half sizes.
_DIAGONALS = np.array([[1, 1, 1], [1, 1, -1], [1, -1, 1], [1, -1, -1]], np.float32)


def _lower_corners(box: GeomInfo, normal: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each diagonal's lower end along `normal`: offsets from the box's centre (4, 3), depths below it (4,), in m."""
    ends = (_DIAGONALS * box.size) @ box.mat.T
    heights = ends @ normal
    return jnp.where(heights[:, None] > 0, -ends, ends), jnp.abs(heights)


@collider(ncon=4)
def _plane_box(plane: GeomInfo, box: GeomInfo) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The box's four lower corners, as in native MuJoCo: distances (4,), positions (4, 3), frames (4, 3, 3).

    MJX's own function keeps only corners within 1 mm of the deepest, so a tilted foot stands on one edge.
    """
    normal = plane.mat[:, 2]
    corners, depths = _lower_corners(box, normal)
    dist = (box.pos - plane.pos) @ normal - depths
    return dist, box.pos + corners - 0.5 * dist[:, None] * normal, jnp.stack([make_frame(normal)] * 4)


@collider(ncon=1)
def _disc_box(disc: GeomInfo, box: GeomInfo) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A box and a cylinder so wide that only its two faces matter: it is pushed out by the nearer one."""
    axis = disc.mat[:, 2]
    corners, depths = _lower_corners(box, axis)
    deepest = jnp.argmax(depths)
    height = (box.pos - disc.pos) @ axis
    reach = disc.size[1] + depths[deepest]
    side = jnp.where(height >= 0, 1.0, -1.0)  # up, or down if the box's centre is below the disc's
    dist = side * height - reach
    position = box.pos + side * corners[deepest] - 0.5 * dist * side * axis
    return dist, position, make_frame(side * axis)


_COLLISION_FUNC[mjx.GeomType.PLANE, mjx.GeomType.BOX] = _plane_box
_COLLISION_FUNC[mjx.GeomType.CYLINDER, mjx.GeomType.BOX] = _disc_box
smooth.factor_m, smooth.solve_m, solver.solve = mjx_solver.factor_m, mjx_solver.solve_m, mjx_solver.solve


class MjxState(NamedTuple):
    """What a physics step reads of `mjx.Data`, and the sensors that the next observation may read; leading axis B.

    All else, 40 kB of contacts and constraints a lane, is made anew in each step.
    """

    time: jax.Array
    qpos: jax.Array
    qvel: jax.Array
    qacc_warmstart: jax.Array
    sensordata: jax.Array

    @classmethod
    def of(cls, data: mjx.Data) -> "MjxState":
        """What is kept of `data`."""
        return cls(*(getattr(data, name) for name in cls._fields))


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
            fields = {
                name: jnp.asarray(np.stack([getattr(d, name) for d in draws]), jnp.float32) for name in Physics._fields
            }
            self._model_axes = jax.tree.map(lambda _: None, self.model).tree_replace({name: 0 for name in fields})
            self.model = self.model.tree_replace(fields)
        self._address = addresses(native)
        self._sensor = sensor_slices(native)
        self._foot_sites = [native.site(f"{side}_foot").id for side in ("left", "right")]
        self._ball_contact = ball_contact_sensors(native)

    def reset(self, qpos: jax.Array, qvel: jax.Array) -> MjxState:
        """The state at qpos (B, nq), at rest: qvel (B, nv) must be zero.

        Only kinematics, not a whole `mjx.forward`: that would double what there is to compile and cost as
        much as a physics step in every lane. The velocity sensors are zero at rest; accelerometer and
        contacts read zero, as they do in the official drop, which starts in free fall.
        """

        def one(model, qpos, qvel):
            data = mjx.kinematics(model, self._template.replace(qpos=qpos, qvel=qvel))
            root, ball = qpos[self._address.root_q], qpos[self._address.ball_q]
            fresh = {
                "imu_pos_w": root[:3],
                "imu_quat_wxyz": root[3:],
                "ball_site_pos_w": ball[:3],
                "ball_quat_wxyz": ball[3:],
                "left_foot_pos_w": data.site_xpos[self._foot_sites[0]],
                "right_foot_pos_w": data.site_xpos[self._foot_sites[1]],
            }
            sensordata = data.sensordata
            for name, value in fresh.items():
                sensordata = sensordata.at[self._sensor[name]].set(value)
            return MjxState.of(data)._replace(sensordata=sensordata)

        return jax.vmap(one, in_axes=(self._model_axes, 0, 0))(self.model, qpos, qvel)

    def step(self, state: MjxState, target_rad: jax.Array) -> tuple[MjxState, jax.Array]:
        """Hold joint targets (B, 12) for one action; also whether robot and ball touched, (B,) bool."""

        def one(model, state, target_rad):
            def physics_step(state, _):
                data = mjx.step(model, self._template.replace(**state._asdict(), ctrl=target_rad))
                return MjxState.of(data), (data.sensordata[self._ball_contact] > 0).any()

            state, touched = jax.lax.scan(physics_step, state, length=c.PHYSICS_STEPS_PER_ACTION)
            return state, touched.any()

        return jax.vmap(one, in_axes=(self._model_axes, 0, 0))(self.model, state, target_rad)

    @staticmethod
    def view(state: MjxState, touched: jax.Array) -> View:
        """The lanes' view, leading axis B."""
        return View(state.qpos, state.qvel, state.sensordata, touched)
