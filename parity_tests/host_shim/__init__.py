"""Runs, on the host, the Metal text that MLX generates: no Mac needed."""
