"""A run on disk: checkpoints, the replay buffer, and going on after a kill; knows no training."""
