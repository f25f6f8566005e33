"""The observation: one table, one body for JAX and NumPy, and the class that is submitted."""
