"""Reward annealing of fine-tuning: from the dense reward that teaches to the official score that counts.

Over the whole fine-tuning the dense reward's weight (alpha) falls from 1.0 to 0.1 and the official terminal
score's weight (beta) rises from 0.1 to 1.0, both linearly.
"""

ALPHA_DENSE = (1.0, 0.1)  # at the start, at the end
BETA_OFFICIAL = (0.1, 1.0)


def anneal(step: int, total_steps: int) -> tuple[float, float]:
    """(alpha, beta) after `step` of `total_steps` fine-tuning steps; beyond either end the end's values."""
    progress = min(max(step / total_steps, 0.0), 1.0)

    def between(ends: tuple[float, float]) -> float:
        return (1.0 - progress) * ends[0] + progress * ends[1]

    return between(ALPHA_DENSE), between(BETA_OFFICIAL)
