"""The constraint solver of MJX 3.3.7 for our scene: the same Newton steps and line search, and no LAPACK.

MJX factorises with LAPACK on a CPU and cuSOLVER on a GPU. LAPACK's call splits a batch into the thread pool that it
runs on: at 64 lanes on two cores it waits for itself, for ever. Here everything is plain JAX (`solve_spd`). MJX's line
search also writes out and reads back an array of (rows, 3) for each point that it looks at, 40 % of a physics step's
time on a CPU; here a point is three sums (`_Rows.at`).

Dense matrices, pyramidal cones, no equality constraints: `mjx_engine.py` puts these functions in MJX's places.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx


def _solve_lanes(a: jax.Array, b: jax.Array) -> jax.Array:
    """x of a x = b for SPD matrices (n, n, B) and (n, B): Gauss-Jordan elimination, which needs no pivoting here.

    A Cholesky factorisation has a third of the sums, but measures 3 to 5 times slower written in XLA's operations: this
    is one fused loop over the matrices per pivot, with the lanes side by side in vector registers.
    """
    row_index = jnp.arange(len(b))[:, None]

    def eliminate(k, rows):
        is_pivot = row_index == k
        pivot = rows[k] / rows[k, k]
        column = jnp.where(is_pivot, -1.0, rows[:, k])
        return jnp.where(is_pivot[..., None], 0.0, rows) - column[:, None] * pivot

    return jax.lax.fori_loop(0, len(b), eliminate, jnp.concatenate([a, b[:, None]], axis=1))[:, -1]


@jax.custom_batching.custom_vmap
def solve_spd(a: jax.Array, b: jax.Array) -> jax.Array:
    """x of a x = b for an SPD matrix (n, n) and (n,)."""
    return _solve_lanes(a[..., None], b[..., None])[..., 0]


@solve_spd.def_vmap
def _(size: int, batched: list[bool], a: jax.Array, b: jax.Array) -> tuple[jax.Array, bool]:
    a, b = (x if has else jnp.broadcast_to(x, (size, *x.shape)) for x, has in zip((a, b), batched))
    return jnp.moveaxis(_solve_lanes(jnp.moveaxis(a, 0, -1), jnp.moveaxis(b, 0, -1)), -1, 0), True


def factor_m(_: mjx.Model, data: mjx.Data) -> mjx.Data:
    """Nothing: `solve_m` reads the inertia matrix itself, and is called once a step."""
    return data


def solve_m(_: mjx.Model, data: mjx.Data, force: jax.Array) -> jax.Array:
    """Acceleration (nv,) that a force (nv,) gives without constraints."""
    return solve_spd(data._impl.qM, force)


class _Point(NamedTuple):
    """The cost along a search direction, at `step` times it."""

    step: jax.Array
    cost: jax.Array
    slope: jax.Array
    curvature: jax.Array


class _Rows(NamedTuple):
    """Constraint rows (R,): the force of row i is -stiffness x, between `least` and `most`, x = J qacc - aref.

    Its cost, of which -force is the slope, is -force x - force^2 / (2 stiffness): a parabola between the bounds and a
    straight line beyond (friction of a joint: +-frictionloss; limits and contacts: 0 and infinity).
    """

    stiffness: jax.Array
    least: jax.Array
    most: jax.Array

    def force(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Forces (..., R), and whether each is between its bounds."""
        free = -self.stiffness * x
        return jnp.clip(free, self.least, self.most), (self.least < free) & (free < self.most)

    def cost(self, x: jax.Array, force: jax.Array) -> jax.Array:
        """Sum over the rows (...,)."""
        return -(force * (x + 0.5 * force / self.stiffness)).sum(-1)

    def at(self, steps: jax.Array, x: jax.Array, dx: jax.Array, parabola: jax.Array) -> _Point:
        """Points at `steps` (P,) from x (R,) along dx (R,); `parabola` (3,) is the rest of the cost."""
        there = x + steps[:, None] * dx
        force, between = self.force(there)
        constant, linear, square = parabola
        cost = self.cost(there, force) + constant + steps * (linear + steps * square)
        slope = linear + 2.0 * steps * square - force @ dx
        curvature = 2.0 * square + between.astype(dx.dtype) @ (self.stiffness * dx * dx)
        return _Point(steps, cost, slope, jnp.where(curvature == 0.0, mujoco.mjMINVAL, curvature))


class _State(NamedTuple):
    """A Newton iterate."""

    qacc: jax.Array  # (nv,)
    mass_qacc: jax.Array  # (nv,) inertia matrix times qacc
    x: jax.Array  # (R,)
    force: jax.Array  # (R,)
    gradient: jax.Array  # (nv,)
    cost: jax.Array
    improvement: jax.Array  # of the cost, by the last iteration
    iterations: jax.Array


def _where(condition: jax.Array, a: _Point, b: _Point) -> _Point:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _narrow(end: _Point, others: tuple[_Point, ...]) -> tuple[_Point, jax.Array]:
    """The point whose slope has the sign of `end`'s and is nearest to zero, and whether it is another than `end`."""
    moved = jnp.array(False)
    for other in others:
        nearer = ((end.slope < other.slope) & (other.slope < 0)) | ((end.slope > other.slope) & (other.slope > 0))
        end, moved = _where(nearer, other, end), moved | nearer
    return end, moved


def _line_search(rows: _Rows, x: jax.Array, dx: jax.Array, parabola: jax.Array, tolerance: jax.Array, iterations: int):
    """The best step along dx, 0 if none is better: Newton steps from both ends of a bracket, and its middle."""

    def points(*steps: jax.Array) -> list[_Point]:
        found = rows.at(jnp.stack(steps), x, dx, parabola)
        return [jax.tree.map(lambda value, i=i: value[i], found) for i in range(len(steps))]

    def newton(p: _Point) -> jax.Array:
        return p.step - p.slope / p.curvature

    def tighten(_, carry):
        low, high, moved = carry
        done = ~moved | ((low.slope < 0) & (low.slope > -tolerance)) | ((high.slope > 0) & (high.slope < tolerance))
        from_low, from_high, middle = points(newton(low), newton(high), 0.5 * (low.step + high.step))
        new_low, low_moved = _narrow(low, (from_low, middle, from_high))
        new_high, high_moved = _narrow(high, (from_high, middle, from_low))
        return _where(done, low, new_low), _where(done, high, new_high), ~done & (low_moved | high_moved)

    (start,) = points(jnp.zeros((), x.dtype))
    (first,) = points(newton(start))
    is_low = first.slope < start.slope
    low, high = _where(is_low, first, start), _where(is_low, start, first)
    low, high, _ = jax.lax.fori_loop(0, iterations, tighten, (low, high, jnp.array(True)))
    best = _where(low.cost < high.cost, low, high)
    return jnp.where((low.cost < start.cost) | (high.cost < start.cost), best.step, 0.0)


def solve(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """Accelerations and constraint forces, which minimise the constraints' cost (Todorov 2014), by Newton's method."""
    inner = data._impl
    mass, smooth_force = inner.qM, data.qfrc_smooth
    columns = inner.efc_J.T  # (nv, R): laid out like this, the Hessian costs two thirds
    friction = np.arange(inner.nefc) < inner.nf
    rows = _Rows(
        inner.efc_D,
        jnp.where(friction, -inner.efc_frictionloss, 0.0),
        jnp.where(friction, inner.efc_frictionloss, jnp.inf),
    )
    scale = 1.0 / (model.stat.meaninertia * max(1, model.nv))

    def inertial_cost(qacc, mass_qacc):
        return 0.5 * (mass_qacc - smooth_force) @ (qacc - data.qacc_smooth)

    def evaluate(qacc, mass_qacc, x, last_cost, iterations) -> _State:
        force, _ = rows.force(x)
        cost = rows.cost(x, force) + inertial_cost(qacc, mass_qacc)
        gradient = mass_qacc - smooth_force - columns @ force
        return _State(qacc, mass_qacc, x, force, gradient, cost, last_cost - cost, iterations)

    def goes_on(s: _State):
        small = jnp.minimum(s.improvement, jnp.linalg.norm(s.gradient)) * scale < model.opt.tolerance
        return (s.iterations < model.opt.iterations) & ~small

    def iterate(s: _State) -> _State:
        stiffness = rows.stiffness * rows.force(s.x)[1]
        search = -solve_spd(mass + (columns * stiffness) @ columns.T, s.gradient)
        mass_search, dx = mass @ search, search @ columns
        gauss = inertial_cost(s.qacc, s.mass_qacc)
        parabola = jnp.stack([gauss, search @ (s.mass_qacc - smooth_force), 0.5 * search @ mass_search])
        tolerance = model.opt.tolerance * model.opt.ls_tolerance * jnp.linalg.norm(search) / scale
        step = _line_search(rows, s.x, dx, parabola, tolerance, model.opt.ls_iterations)
        return evaluate(
            s.qacc + step * search, s.mass_qacc + step * mass_search, s.x + step * dx, s.cost, s.iterations + 1
        )

    # From the last step's accelerations, or from those without constraints: whichever costs less.
    starts = jnp.stack([data.qacc_warmstart, data.qacc_smooth])
    masses, xs = starts @ mass, starts @ columns - inner.efc_aref
    costs = rows.cost(xs, rows.force(xs)[0]) + jax.vmap(inertial_cost)(starts, masses)
    warm = costs[0] < costs[1]
    qacc, mass_qacc, x = (jnp.where(warm, both[0], both[1]) for both in (starts, masses, xs))
    s = jax.lax.while_loop(goes_on, iterate, evaluate(qacc, mass_qacc, x, jnp.inf, 0))
    return data.tree_replace({"qacc": s.qacc, "qfrc_constraint": columns @ s.force, "_impl.efc_force": s.force})
