"""Many states of one MuJoCo model, stepped by threads as fast as the physics goes; knows no football.

What is particular to the model comes in as data: sensors to add, fields in which the lanes differ, actuators that
take the controls, joints that follow the time. `envs/twin_source.py` brings it, `envs/twin.py` makes football of it.

* A lane is a row of `State`. Each thread owns one model and one `MjData` through which all its lanes pass; so the
  working set stays in the cache (measured: 25,000 physics steps/s on one core, against 17,000 with one `MjData` per
  lane), and memory does not grow with the lanes. Nothing is lost, because the solver's warm start is part of the row.
* A row goes in and comes out as one copy of a stretch of `MjData`'s memory: little Python per step, and the
  interpreter lock changes hands once a step (`mj_setState` and `mj_getState` would let it go as well).
* Each thread takes the next lane when it is done: two cores of one machine are rarely equally fast. What else was
  tried: docs/twin.md.
* What one wants to read from `MjData` is written into `sensordata` by sensors added to the model. They have no part
  in the dynamics. They show the state before the last integration, qpos and qvel the one after it.
"""

import concurrent.futures
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import NamedTuple

import mujoco
import numpy as np

from booster_soccer.envs import scene
from booster_soccer.errors import More, UserError


class Sensor(NamedTuple):
    """A sensor to add to a model."""

    name: str
    kind: mujoco.mjtSensor
    objtype: mujoco.mjtObj
    objname: str
    touching_geom: str = ""  # of a contact sensor: counts the object's contacts with this geom


class Field(NamedTuple):
    """An array of the model in which the lanes differ, such as `model.geom("floor").friction`."""

    kind: str  # geom or site
    name: str
    attribute: str


class DrivenJoints(NamedTuple):
    """Joints of one degree of freedom each that are not simulated but written before every step."""

    names: tuple[str, ...]
    motion: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # time (L, 1) s -> position, velocity, both (L, 1)


def add_sensors(spec: mujoco.MjSpec, sensors: Sequence[Sensor]) -> None:
    """Add sensors to a model before it is compiled."""
    for sensor in sensors:
        added = spec.add_sensor(name=sensor.name, type=sensor.kind, objtype=sensor.objtype, objname=sensor.objname)
        if sensor.touching_geom:
            added.reftype, added.refname = mujoco.mjtObj.mjOBJ_GEOM, sensor.touching_geom
            # what to report (found: the number of contacts), how to reduce them (not), how many to report
            added.intprm[:3] = (1 << int(mujoco.mjtConDataField.mjCONDATA_FOUND), 0, 1)


class Layout(NamedTuple):
    """Where in the memory of an `MjData`, counted in numbers from its qpos, the state lies; and the sensors."""

    qpos: slice
    qvel: slice
    ctrl: slice
    size: int  # up to ctrl's end; the solver's warm start and a little padding lie in between
    sensors_size: int  # of sensordata
    sensors: dict[str, slice]  # of sensordata, by name


def layout_of(data: mujoco.MjData) -> Layout:
    """MuJoCo allocates an `MjData` in one piece, in a fixed order; where, its arrays' addresses tell.

    Raises `UserError` if the order is another, or there is state beside qpos, qvel, warm start and ctrl.
    """

    def where(values: np.ndarray) -> slice:
        start = (values.ctypes.data - data.qpos.ctypes.data) // values.itemsize
        return slice(start, start + values.size)

    qpos, qvel, warmstart, ctrl = map(where, (data.qpos, data.qvel, data.qacc_warmstart, data.ctrl))
    gaps = qvel.start - qpos.stop, warmstart.start - qvel.stop, ctrl.start - warmstart.stop
    more_state = data.act, data.mocap_pos, data.plugin_state, data.userdata, data.eq_active
    # Arrays begin at multiples of 64 bytes.
    if not all(0 <= gap < 8 for gap in gaps) or any(values.size for values in more_state):
        raise UserError(
            f"mujoco {mujoco.__version__} orders an MjData in another way, or the model has more state: "
            f"install the pinned versions (constraints.txt), or adapt envs/twin_physics.py; {More.VERSIONS}"
        )
    return Layout(qpos, qvel, ctrl, ctrl.stop, data.sensordata.size, scene.sensor_slices(data.model))


def memory_of(data: mujoco.MjData) -> np.ndarray:
    """The memory of an `MjData` (n,) that the next physics step depends on, but for the time."""
    return np.lib.stride_tricks.as_strided(data.qpos, (layout_of(data).size,))


class State:
    """What the next physics step depends on, and the sensors of the last one; leading axes alike.

    qpos (..., nq), qvel (..., nv) and ctrl (..., nu) are views into `memory`.
    """

    def __init__(self, layout: Layout, time: np.ndarray, memory: np.ndarray, sensors: np.ndarray):
        self.layout = layout
        self.time = time  # (..., 1) s
        self.memory = memory  # (..., n) as `memory_of` gives it
        self.sensors = sensors  # (..., nsensordata)
        self.qpos, self.qvel, self.ctrl = (memory[..., part] for part in layout[:3])

    @classmethod
    def zeros(cls, layout: Layout, *shape: int) -> "State":
        """All zero, with leading axes of this shape."""
        return cls(layout, *(np.zeros((*shape, size)) for size in (1, layout.size, layout.sensors_size)))

    def at(self, index) -> "State":
        """The part at an index of the leading axes."""
        return State(self.layout, self.time[index], self.memory[index], self.sensors[index])

    def write(self, index, new: "State") -> None:
        """Overwrite the part at an index of the leading axes."""
        self.time[index], self.memory[index], self.sensors[index] = new.time, new.memory, new.sensors

    def read(self, sensor: str) -> np.ndarray:
        """View (..., width) of a sensor."""
        return self.sensors[..., self.layout.sensors[sensor]]


class _Worker:
    """One thread's model and data; its lanes pass through them one after another."""

    def __init__(self, model: mujoco.MjModel, fields: Sequence[Field]):
        self.model = model
        self.data = mujoco.MjData(model)
        # Memory views, assigned in half the time of arrays: these few numbers are at every step of every lane.
        self._fields = [getattr(getattr(model, field.kind)(field.name), field.attribute).data for field in fields]
        self._memory, self._sensors = memory_of(self.data).data, self.data.sensordata.data

    def advance(self, rows: Iterator[tuple]) -> None:
        """One physics step of each lane in `rows`: its field values, the time and the memory before, and the time,
        the memory and the sensors to write after it. Several workers may take their rows from one iterator.

        Someone else's step may be `mj_step1`, ctrl, `mj_step2`: the same arithmetic as ctrl, `mj_step`, but for a
        state that MuJoCo does not accept (`Physics._commanded`).
        """
        model, data, fields, memory, sensors = self.model, self.data, self._fields, self._memory, self._sensors
        step = mujoco.mj_step
        for values, time_before, memory_before, time_after, memory_after, sensors_after in rows:
            for field, value in zip(fields, values, strict=True):
                field[:] = value
            data.time = time_before
            memory[:] = memory_before
            step(model, data)
            time_after[:] = data.time
            memory_after[:] = memory
            sensors_after[:] = sensors

    def set_fields(self, values: list[memoryview]) -> None:
        """Make the model a lane's."""
        for field, value in zip(self._fields, values, strict=True):
            field[:] = value

    def forward(self, values: list[memoryview], qpos: np.ndarray, after: State) -> None:
        """One lane at rest at time 0, without a warm start; writes into `after` (no leading axis)."""
        mujoco.mj_resetData(self.model, self.data)
        self.set_fields(values)
        self.data.qpos[:] = qpos
        after.time[:] = 0.0
        after.memory[:] = self._memory  # now: `mj_forward` leaves a warm start
        mujoco.mj_forward(self.model, self.data)
        after.sensors[:] = self.data.sensordata


class Physics:
    """B lanes of one model: their states, and the threads that step them."""

    def __init__(
        self,
        model: mujoco.MjModel,
        num_lanes: int,
        num_threads: int,
        fields: Sequence[Field],
        actuators: Sequence[str],
        driven: DrivenJoints | None,
    ):
        self._model, self._fields = model, fields
        self._workers = [_Worker(copy(model), fields) for _ in range(num_threads)]
        self._pool = ThreadPoolExecutor(num_threads)  # starts its threads only when they are needed
        data = self._workers[0].data
        self._layout, self._zero_pose = layout_of(data), memory_of(data).copy()
        self._actuators = np.array([model.actuator(name).id for name in actuators])
        self._ctrl_low, self._ctrl_high = model.actuator_ctrlrange[self._actuators].T
        self._driven = driven
        if driven:
            self._driven_q = [int(model.joint(name).qposadr[0]) for name in driven.names]
            self.driven_v = [int(model.joint(name).dofadr[0]) for name in driven.names]
        self.field_values: list[list[memoryview]] = [[]] * num_lanes  # of each lane, in the order of `fields`
        self.state = State.zeros(self._layout, num_lanes)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def reset(self, lane: int, qpos: np.ndarray, field_values: Sequence[np.ndarray]) -> mujoco.MjData:
        """Put a lane at rest at qpos (nq,), with values for its fields.

        Returns the data of that state, for what no sensor shows; it is good until the next call.
        """
        self.field_values[lane] = [np.ascontiguousarray(value, dtype=np.float64).data for value in field_values]
        self._workers[0].forward(self.field_values[lane], qpos, self.state.at(lane))
        return self._workers[0].data

    def model_of(self, lane: int) -> mujoco.MjModel:
        """A copy of the model with a lane's own values of its fields, to draw it."""
        worker = _Worker(copy(self._model), self._fields)
        worker.set_fields(self.field_values[lane])
        return worker.model

    def simulate(self, lanes: np.ndarray, control_of: Callable[[State], np.ndarray], num_steps: int) -> State:
        """States (num_steps, L) after each physics step of some lanes (L,); `self.state` stays as it is.

        `control_of` gives the controls (L, A) of the actuators from the state before each step.
        """
        states = State.zeros(self._layout, num_steps, len(lanes))
        field_values = [self.field_values[lane] for lane in lanes.tolist()]
        state = self.state.at(lanes)
        for s in range(num_steps):
            before, after = self._commanded(state, control_of(state)), states.at(s)
            times = before.time[:, 0].tolist()
            # Each row is taken by one worker.
            rows = zip(field_values, times, before.memory, after.time, after.memory, after.sensors, strict=True)
            jobs = [self._pool.submit(worker.advance, rows) for worker in self._workers[1:]]
            try:
                self._workers[0].advance(rows)
            finally:
                concurrent.futures.wait(jobs)  # a worker's data must be idle before the next call
            for job in jobs:
                job.result()
            state = after
        return states

    def _commanded(self, state: State, control: np.ndarray) -> State:
        """The states with their controls, clipped, and with the driven joints where they belong.

        A state with NaN or huge numbers MuJoCo replaces by the model's zero pose in `mj_step1`, in the official
        code before the control is written. `mj_step` would do it after, and lose the control: so it is done here.
        """
        commanded = State(state.layout, state.time.copy(), state.memory.copy(), state.sensors)
        if self._driven:
            position, velocity = self._driven.motion(state.time)
            commanded.qpos[:, self._driven_q], commanded.qvel[:, self.driven_v] = position, velocity
        accepted = [(np.abs(values) <= mujoco.mjMAXVAL).all(axis=-1) for values in (commanded.qpos, commanded.qvel)]
        restarted = ~np.logical_and(*accepted)
        commanded.memory[restarted], commanded.time[restarted] = self._zero_pose, 0.0
        commanded.ctrl[:, self._actuators] = np.clip(control, self._ctrl_low, self._ctrl_high)
        return commanded


# A free body has six degrees of freedom: the velocity of its origin in the world, then its turning about its axes.


def angular_velocity_w(axes_w: Sequence[np.ndarray], dofs: slice, qvel: np.ndarray) -> np.ndarray:
    """World angular velocity (L, 3) of a free body, from its three axes (L, 3): the rotation Jacobian times qvel.

    Written as that full product, because BLAS adds in an order of its own.
    """
    jacobian = np.zeros((len(qvel), 3, qvel.shape[1]))
    for i, axis_w in enumerate(axes_w):
        jacobian[:, :, dofs.start + 3 + i] = axis_w
    return _times_qvel(jacobian, qvel)


def point_velocity_w(
    axes_w: Sequence[np.ndarray],
    origin_w: np.ndarray,
    com_w: np.ndarray,
    point_w: np.ndarray,
    dofs: slice,
    qvel: np.ndarray,
) -> np.ndarray:
    """Velocity (L, 3) of a point of a free body, by MuJoCo's Jacobian: lever arms by way of the centre of mass."""
    jacobian = np.zeros((len(qvel), 3, qvel.shape[1]))
    for i, axis_w in enumerate(axes_w):
        jacobian[:, i, dofs.start + i] = 1.0
        jacobian[:, :, dofs.start + 3 + i] = np.cross(axis_w, com_w - origin_w) + np.cross(axis_w, point_w - com_w)
    return _times_qvel(jacobian, qvel)


def _times_qvel(jacobian: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    """(L, 3) from (L, 3, nv) and (L, nv), by the BLAS call that `np.dot` uses for one lane."""
    return (jacobian @ qvel[..., None])[..., 0]
