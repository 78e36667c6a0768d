"""Flux Attention on MLX: a layer router sends each layer of a frozen LLM to full or to sparse attention."""

__version__ = "0.1.0"
