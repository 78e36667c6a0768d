"""Look at the routes of a prompt, exact against chunked as stock mlx-lm runs it: python routes.py DIR PROMPT."""

import sys

import mlx.core as mx

import flux_mlx

model, tokenizer = flux_mlx.load(sys.argv[1])
tokens = mx.array(tokenizer.encode(sys.argv[2]))
exact, chunked = model.make_cache(), model.make_cache()
flux_mlx.prefill(model, tokens, exact)
for start in range(0, tokens.size - 1, 512):
    model(tokens[None, start : min(start + 512, tokens.size - 1)], cache=chunked)
print("exact:  ", flux_mlx.describe_routes(exact))
print("chunked:", flux_mlx.describe_routes(chunked))
