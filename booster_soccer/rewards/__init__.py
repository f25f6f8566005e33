"""Rewards: the dense terms of pre-training, the official score, and the annealing between them."""
