"""play.py: the game it shows is the one that is scored; its page is served; colours as MuJoCo shows them."""

import sys
import urllib.request

import mujoco
import numpy as np
import pytest

import play as script
from booster_soccer.errors import UserError
from booster_soccer.rollout.lanes import TwinLanes
from booster_soccer.rollout.play import Episode, hold_default_pose, play
from booster_soccer.tracking import viewer


@pytest.fixture(scope="module")
def game():
    return script.Game(hold_default_pose, 0.02)


def test_the_game_is_the_scored_episode(game):
    game.start("goalie", 5)
    while not game.ended:
        game.step()
    [expected] = play(TwinLanes("goalie", 1), hold_default_pose, [Episode("goalie", 5)], 0.02)
    assert game.terms == expected.terms and game.time_s == expected.physics_steps * 0.002
    assert "**ended**" in game.words() and f"score **{expected.score:+.2f}**" in game.words()


def test_a_push_to_the_left_moves_the_robot_to_its_left(game):
    """In the penalty it faces -x, so its left is -y."""
    places = []
    for speed_m_s in (0.0, 0.8):
        game.start("goalie", 5)
        game.step()
        game.push(speed_m_s)
        for _ in range(10):
            game.step()
        places.append(game.lane.env.imu_pos_w[0].copy())
    moved = places[1] - places[0]
    assert -0.2 < moved[1] < -0.02 and abs(moved[0]) < 0.02


def test_the_page_is_served_while_it_plays_and_buttons_reach_the_game(game):
    page = viewer.Viewer(port=0)
    try:
        game.start("goalie", 7)
        controls = script.Controls(page, script.Config(policy="hold", seed=7))
        with urllib.request.urlopen(page.address, timeout=10) as answer:
            assert answer.status == 200 and b"<html" in answer.read()
        script.play(game, page, controls, 0.3)
        assert game.time_s > 0.0 and "seed 7" in controls.text.content
        moving = [i for i, frame in page._frames.items() if np.abs(frame.position).max() > 0.0]
        trunk = page._model.body("robot_0:Trunk").id
        assert trunk in moving
        assert page._frames[trunk].position[2] == pytest.approx(game.lane.env.qpos[0][_trunk_z(page._model)], abs=0.02)
        controls.task.value = "target"
        controls.asked.put(controls.next_start)
        script.play(game, page, controls, 0.2)
        assert (game.task, game.seed) in (("target", 8), ("target", 9))  # the choice itself asks for a start too
    finally:
        page.close()


def _trunk_z(model: mujoco.MjModel) -> int:
    return int(model.joint("robot_0:root").qposadr[0]) + 2


def test_colours_as_mujoco_shows_them():
    """A geom's own colour counts, unless it is the default: then its material's, times its texture."""
    model = mujoco.MjModel.from_xml_string("""
        <mujoco><asset>
          <texture name="t" type="2d" builtin="flat" rgb1="0.5 1 0" width="4" height="4"/>
          <material name="plain" rgba="1 0 0 0.5"/><material name="woven" rgba="1 0.5 1 1" texture="t"/>
        </asset><worldbody>
          <geom size="1" rgba="0 0 1 1" material="plain"/><geom size="1" material="plain"/>
          <geom size="1" material="woven"/><geom size="1"/>
        </worldbody></mujoco>""")
    colours = [viewer.geom_rgba(model, i) for i in range(model.ngeom)]
    expected = [[0, 0, 1, 1], [1, 0, 0, 0.5], [0.5, 0.5, 0, 1], [0.5, 0.5, 0.5, 1]]
    np.testing.assert_allclose(colours, expected, atol=0.01)


def test_bad_input_and_a_missing_package_are_one_line(monkeypatch):
    refused = (
        ({}, "either --checkpoint DIR or --policy"),
        ({"policy": "zero", "seed": -1}, "--seed -1"),
        ({"policy": "zero", "host": "192.0.2.1"}, "cannot serve at 192.0.2.1"),  # of no machine
    )
    for wrong, message in refused:
        with pytest.raises(UserError, match=message):
            script.main(script.Config(**wrong))
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(UserError, match=r"cannot import viser .*\[viewer\]"):
        script.main(script.Config(policy="zero"))
