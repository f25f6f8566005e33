"""Acting in environments: collection for training, whole episodes for judging, scores."""
