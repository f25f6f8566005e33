"""Football tasks of the Booster T1 lower body, the engines that step them, and the official environments."""
