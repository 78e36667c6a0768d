"""The same kernel text on an NVIDIA GPU."""
