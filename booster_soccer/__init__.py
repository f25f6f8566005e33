"""The library under the scripts: teaching a Booster T1 to play football in simulation."""
