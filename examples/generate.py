"""Load a Flux model directory and generate, every layer routed on the whole prompt: python generate.py DIR PROMPT."""

import sys

import flux_mlx
from flux_mlx.stream import stream_generate

model, tokenizer = flux_mlx.load(sys.argv[1])
prompt = tokenizer.apply_chat_template([{"role": "user", "content": sys.argv[2]}], add_generation_prompt=True)
for response in stream_generate(model, tokenizer, prompt, max_tokens=32):
    print(response.text, end="", flush=True)
print()
