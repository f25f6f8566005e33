"""The networks: Flax for pre-training, PyTorch for fine-tuning and submission, NumPy for everything that only acts."""
