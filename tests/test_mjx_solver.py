"""What stands in MJX's places, by itself; against native MuJoCo: tests/test_physics.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from booster_soccer.envs import mjx_solver


@pytest.mark.parametrize("lanes", [(), (3,)], ids=["one", "batch"])
def test_solve_spd(lanes):
    """As NumPy in float64, also where stiffnesses are as far apart as a contact's and a joint's."""
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.uniform(-2, 2, (*lanes, 7, 1))
    a = rng.normal(size=(*lanes, 7, 9)) * scale
    a, b = a @ np.swapaxes(a, -1, -2), rng.normal(size=(*lanes, 7))
    solve = jax.vmap(mjx_solver.solve_spd) if lanes else mjx_solver.solve_spd
    x = solve(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    expected = np.linalg.solve(a, b[..., None])[..., 0]
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_forces_and_cost_of_rows_by_hand():
    """Friction of 2 N on stiffness 4: a parabola up to |x| = 0.5, then a line. A contact pushes and never pulls."""
    rows = mjx_solver._Rows(jnp.array([4.0, 4.0]), jnp.array([-2.0, 0.0]), jnp.array([2.0, jnp.inf]))
    x = jnp.array([[0.25, 0.25], [3.0, -3.0], [-3.0, 0.0]])
    force, between = rows.force(x)
    np.testing.assert_allclose(force, [[-1.0, 0.0], [-2.0, 12.0], [2.0, 0.0]])
    np.testing.assert_array_equal(between, [[True, False], [False, True], [False, False]])
    # 4 x^2 / 2; 2 |x| - 2^2 / (2 * 4)
    np.testing.assert_allclose(rows.cost(x, force), [0.125, 5.5 + 18.0, 5.5])


def test_line_search_finds_the_minimum():
    """Of random rows along a random direction, against a grid: within 1 % of what there is to gain."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        x, dx = (jnp.asarray(rng.normal(size=40), jnp.float32) for _ in range(2))
        most = jnp.where(jnp.arange(40) < 12, 0.1, jnp.inf)
        rows = mjx_solver._Rows(jnp.asarray(rng.uniform(1, 9, 40), jnp.float32), jnp.where(most < 1, -most, 0.0), most)
        parabola = jnp.array([0.0, -20.0, 3.0])
        step = mjx_solver._line_search(rows, x, dx, parabola, jnp.float32(1e-6), 6)
        grid = jnp.linspace(-5.0, 5.0, 4001)
        best = float(rows.at(grid, x, dx, parabola).cost.min())
        start, found = map(float, rows.at(jnp.stack([0.0, step]), x, dx, parabola).cost)
        assert found < best + 0.01 * (start - best)
