"""Make a model that mlx-lm has loaded route, with layers chosen by hand: python apply.py MODEL PROMPT."""

import sys

import mlx_lm

import flux_mlx

model, tokenizer = mlx_lm.load(sys.argv[1])
pattern = flux_mlx.PatternConfig(block_size=64, sink_tokens=64, window_tokens=512)
flux_mlx.apply(model, flux_mlx.FluxConfig(pattern=pattern, route=[0, 2]))  # all other layers are sparse
print(mlx_lm.generate(model, tokenizer, sys.argv[2], max_tokens=32))
