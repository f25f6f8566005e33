"""The presets of both learners are one recipe at four sizes."""

import pytest

import finetune_ddpg
import train_mjx_sac

SIZES = ("demo", "cpu", "l4", "h200")
WHOLE = ("cpu", "l4", "h200")  # demo ends before the ramp begins: its policy has only begun to kick


@pytest.mark.parametrize("preset", SIZES)
def test_gradient_steps_per_transition(preset):
    collect = train_mjx_sac.PRESETS[preset].collect
    assert (collect.updates_per_iteration / collect.num_envs, collect.batch_size) == (1 / 32, 512)  # 16 samples


def test_engines_and_lanes_are_those_that_were_measured():
    """`h200` is twice `l4` (docs/results.md); none leaves the choice to what it finds."""
    found = {name: (preset.engine, preset.collect.num_envs) for name, preset in train_mjx_sac.PRESETS.items()}
    native, mjx = ("native", 256), ("mjx", 2048)
    assert found == {"demo": native, "cpu": native, "l4": mjx, "h200": ("mjx", 4096)}


@pytest.mark.parametrize("preset", SIZES)
def test_the_learners_are_the_same(preset):
    assert train_mjx_sac.PRESETS[preset].sac == train_mjx_sac.PRESETS["cpu"].sac
    assert finetune_ddpg.PRESETS[preset].ddpg == finetune_ddpg.PRESETS["cpu"].ddpg


@pytest.mark.parametrize("preset", WHOLE)
def test_the_ramp_and_fine_tuning_have_the_same_share(preset):
    pretraining, finetuning = train_mjx_sac.PRESETS[preset], finetune_ddpg.PRESETS[preset]
    first, last = pretraining.collect.ramp_steps
    assert (first / pretraining.total_steps, last / pretraining.total_steps) == (0.4, 1.0)
    assert finetuning.total_steps / pretraining.total_steps == 0.4  # 27 to 30 % of the time of `cpu`


def test_the_demo_ends_before_the_ramp():
    demo = train_mjx_sac.PRESETS["demo"]
    assert demo.total_steps < demo.collect.ramp_steps[0]
    assert demo.collect == train_mjx_sac.PRESETS["cpu"].collect
