"""A run on disk: checkpoints, the replay buffer, and going on after a kill. What a policy is, on disk; knows no training."""
