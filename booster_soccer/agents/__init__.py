"""Learners side by side, each readable alone, and what a policy is without them."""
