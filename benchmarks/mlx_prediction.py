"""The arithmetic behind every prediction of the MLX path's speed: operations over rates, bytes over bandwidth.

    python -m benchmarks.mlx_prediction

prints what it says of one H100 with MLX's CUDA backend: the figures that were known before (with the error), and what
the stages of `benchmarks/mlx_cuda.sh` should take and give. Nothing that it prints is measured.

Prefill of one prompt = products of the weights + attention + activations (norms, RoPE, residuals) and growing caches
moved through memory. Decode of one token = weights and keys read once + a fixed time that neither explains.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from flux_mlx.spec import PatternConfig, RouterConfig, visible_pairs

PATTERN = PatternConfig()
STEP_TOKENS = 2048
ITEM_BYTES = 2  # of activations, keys and values
QUANTIZED_BITS = {4: 4.5, 8: 8.5, 16: 16.0}  # scales and biases in 16 bits for groups of 64


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder of the Llama kind."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    tied: bool = False

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices."""
        attention = self.hidden * (2 * self.q_heads + 2 * self.kv_heads) * self.head_dim
        return attention + 3 * self.hidden * self.intermediate

    @property
    def read_weights(self) -> int:
        """Weights that one token needs: all layers and the head."""
        return self.layers * self.layer_weights + self.hidden * self.vocabulary

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one layer's keys and values of one token."""
        return 2 * self.kv_heads * self.head_dim * ITEM_BYTES

    @property
    def activation_bytes(self) -> int:
        """Bytes that a layer moves for one token beside weights and cached keys, each operation reading and writing.

        15 times the hidden state (two norms, two residuals, inputs and outputs of projections), 8 times the queries
        and 10 times the keys (norm, RoPE, cache, attention), 6 times the intermediate state.
        """
        queries, keys = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        return ITEM_BYTES * (15 * self.hidden + 8 * queries + 10 * keys + 6 * self.intermediate)


QWEN3_8B = Shape("Qwen3-8B", 36, 4096, 12288, 151936)
QWEN3_4B = Shape("Qwen3-4B", 36, 2560, 9728, 151936, tied=True)
SMALL = Shape("small", 10, 512, 1024, 4096, 8, 1, 64, tied=True)


@dataclass(frozen=True)
class Machine:
    """What a machine reaches in practice.

    Args:
        name: For people.
        product_tflops: Of the weights' products in prefill, by bits of a weight.
        attention_tflops: Of dense causal attention in prefill, over visible pairs.
        gb_s: Memory bandwidth of long reads.
        token_s: Time of a decoded token that is neither weights nor keys.
        sparse_fraction: Of the ideal, that sparse prefill attention reaches.
    """

    name: str
    product_tflops: dict[int, float]
    attention_tflops: float
    gb_s: float
    token_s: float
    sparse_fraction: float

    def moved_s(self, moved_bytes: float) -> float:
        """Time to move bytes."""
        return moved_bytes / (self.gb_s * 1e9)


def attention_s(shape: Shape, machine: Machine, tokens: int, pattern: PatternConfig | None) -> float:
    """Prefill attention of one layer: dense, or sparse at the machine's fraction of the ideal but never above dense."""
    flops = 4 * shape.q_heads * shape.head_dim
    dense = flops * visible_pairs(None, tokens, tokens) / (machine.attention_tflops * 1e12)
    if pattern is None:
        return dense
    share = visible_pairs(pattern, tokens, tokens) / visible_pairs(None, tokens, tokens)
    return dense if share == 1 else dense * share / machine.sparse_fraction


def rest_s(shape: Shape, machine: Machine, bits: int, tokens: int) -> float:
    """Prefill without attention."""
    products = 2 * shape.layers * shape.layer_weights * tokens / (machine.product_tflops[bits] * 1e12)
    chunks = -(-tokens // STEP_TOKENS)
    grown = shape.layers * shape.kv_token_bytes * tokens * (chunks - 1)  # half the cache, read and written, a chunk
    return products + machine.moved_s(shape.layers * shape.activation_bytes * tokens + grown)


def router_s(shape: Shape, machine: Machine, bits: int) -> float:
    """Routing of one prompt, as predicted: the queries of both ends, projected once more in every layer."""
    tokens = 2 * RouterConfig().pool_tokens
    flops = 2 * shape.layers * tokens * shape.hidden * shape.q_heads * shape.head_dim
    return flops / (machine.product_tflops[bits] * 1e12)


def prefill_s(shape: Shape, machine: Machine, bits: int, tokens: int, sparse_layers: float = 0) -> float:
    """Time of a prompt; with sparse layers the routers run too."""
    dense = attention_s(shape, machine, tokens, None)
    total = rest_s(shape, machine, bits, tokens) + (shape.layers - sparse_layers) * dense
    if not sparse_layers:
        return total
    sparse = attention_s(shape, machine, tokens, PATTERN)
    return total + sparse_layers * sparse + router_s(shape, machine, bits)


def token_s(shape: Shape, machine: Machine, bits: int, tokens: int, sparse_layers: float = 0) -> float:
    """Time of one decoded token over `tokens` keys."""
    seen = visible_pairs(PATTERN, 1, tokens)
    keys = (shape.layers - sparse_layers) * tokens + sparse_layers * seen
    weights = shape.read_weights * QUANTIZED_BITS[bits] / 8
    return machine.token_s + machine.moved_s(weights + keys * shape.kv_token_bytes)


def crossover_tokens(shape: Shape, machine: Machine, bits: int, sparse_layers: float, gain: float = 0.02) -> int | None:
    """Shortest prompt from which on prefill gains `gain`, by bisection; None if 256K does not."""

    def pays(tokens: int) -> bool:
        stock = prefill_s(shape, machine, bits, tokens)
        return stock / prefill_s(shape, machine, bits, tokens, sparse_layers) >= 1 + gain

    low, high = PATTERN.sink_span + PATTERN.window_span, 1 << 18
    if not pays(high):
        return None
    while high - low > 64:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high


def columns(lines: list[tuple[Any, ...]]) -> str:
    """A markdown table; the first line is its head."""
    head, *rows = [" | ".join(str(cell) for cell in line) for line in lines]
    return "\n".join([f"| {head} |", "|" + "---|" * len(lines[0]), *(f"| {row} |" for row in rows)])


# What was known of MLX's CUDA backend on one H100 before any stage ran: stock mlx-lm, random weights. The fixed time of
# a token is what 8.3 ms of non-attention at 128K leave after the weights; the matrix rate is that of one large product.
H100 = Machine(
    "one H100, MLX's CUDA backend",
    product_tflops={4: 130.0, 8: 130.0, 16: 799.0},
    attention_tflops=557.0,
    gb_s=3000.0,
    token_s=0.0083 - QWEN3_8B.read_weights * QUANTIZED_BITS[4] / 8 / 3e12,
    sparse_fraction=0.8,
)
KNOWN_PREFILL_S = {32768: 5.3, 131072: 28.2}  # Qwen3-8B, 4 bits
KNOWN_TOKENS_S = {32768: 124.0, 131072: 67.0}
RUNS = (
    (16, 8192, 25),
    (16, 32768, 25),
    (16, 131072, 25),
    (16, 262144, 28),
    (4, 32768, 25),
    (4, 131072, 25),
    (4, 262144, 28),
)
"""(bits, tokens, sparse layers of 36) of the main stages: Omega 0.7, and 0.77 at 256K."""


def error(predicted: float, known: float) -> str:
    """Relative error for people."""
    return f"{100 * (predicted / known - 1):+.0f} %"


def known_table() -> str:
    """The arithmetic against what was measured before."""
    lines: list[tuple[Any, ...]] = [("figure, H100, Qwen3-8B 4-bit, stock", "measured", "by this arithmetic", "error")]
    for tokens, known in KNOWN_PREFILL_S.items():
        predicted = prefill_s(QWEN3_8B, H100, 4, tokens)
        lines.append((f"prefill {tokens // 1024}K, s", known, f"{predicted:.1f}", error(predicted, known)))
    for tokens, known in KNOWN_TOKENS_S.items():
        predicted = 1 / token_s(QWEN3_8B, H100, 4, tokens)
        lines.append((f"decode {tokens // 1024}K, tokens/s", known, f"{predicted:.0f}", error(predicted, known)))
    return columns(lines)


def runs_table() -> str:
    """Predictions for the main stages."""
    head = ("bits", "tokens", "sparse of 36", "stock prefill s", "Flux prefill s", "speed-up", "ceiling")
    lines: list[tuple[Any, ...]] = [(*head, "stock tok/s", "Flux tok/s", "speed-up")]
    for bits, tokens, sparse in RUNS:
        stock, flux = (prefill_s(QWEN3_8B, H100, bits, tokens, n) for n in (0, sparse))
        dense = attention_s(QWEN3_8B, H100, tokens, None)
        share = visible_pairs(PATTERN, tokens, tokens) / visible_pairs(None, tokens, tokens)
        top = stock / (stock - sparse * dense * (1 - share))
        decode = [1 / token_s(QWEN3_8B, H100, bits, tokens, n) for n in (0, sparse)]
        cells = (f"{stock:.2f}", f"{flux:.2f}", f"{stock / flux:.2f}", f"{top:.2f}")
        lines.append(
            (bits, f"{tokens // 1024}K", sparse, *cells, *(f"{x:.0f}" for x in decode), f"{decode[1] / decode[0]:.2f}")
        )
    return columns(lines)


FRACTIONS = (0.39, 0.7, 0.8, 0.95)
"""Of the ideal: stock calls over gathered keys, the same without the sink's copy, and two kernels."""


def short_prompts(machine: Machine, bits: int, sparse_layers: float = 25) -> tuple[int, float, int]:
    """Of prefill: length of the least speed-up, that speed-up, length from which on nothing is lost; by 128 tokens."""
    least, even = (0, 1.0), 0
    for tokens in range(PATTERN.sink_span + PATTERN.window_span + 1, 20000, 128):
        stock = prefill_s(QWEN3_8B, machine, bits, tokens)
        speedup = stock / prefill_s(QWEN3_8B, machine, bits, tokens, sparse_layers)
        least = min(least, (tokens, speedup), key=lambda pair: pair[1])
        even = tokens + 128 if speedup < 1 else even
    return (*least, even)


def short_table() -> str:
    """What short prompts lose if sparse layers compute sparse attention as soon as a key is hidden."""
    lines: list[tuple[Any, ...]] = [("sparse attention reaches", "least speed-up", "at tokens", "nothing lost from")]
    for fraction in FRACTIONS:
        where, least, even = short_prompts(replace(H100, sparse_fraction=fraction), 16)
        lines.append((f"{fraction} of its ideal", f"{least:.3f}", where, even))
    return columns(lines)


START_S = 20.0  # of a process: imports, random weights, loading kernels; the first one compiles for a minute more
PASSES = 11  # that the timing of attention by itself makes over a prompt: 2, and 3 times one call and two


MASK_PASSES = 6  # over stock's mask of a batch in each layer: zeros, minus infinity, their choice (3), attention
CROSSOVER_RUNS = {**dict.fromkeys((512, 1024, 2048, 3072, 4096, 8192, 16384), 7), 32768: 4, 65536: 2}
"""Lengths that `--crossover` would measure, one of them in the bracket, and rounds that its time allows."""


def masks_s(tokens: int, rows: int) -> float:
    """Stock's masks of a batch of prompts, `[B, HQ, step, keys]` in each layer, moved through memory."""
    pairs = sum(STEP_TOKENS * keys for keys in range(STEP_TOKENS, tokens + 1, STEP_TOKENS))
    return H100.moved_s(MASK_PASSES * QWEN3_8B.layers * rows * QWEN3_8B.q_heads * pairs * ITEM_BYTES)


def compare_s(bits: int, tokens: int, sparse: int, trials: int, generated: int, rows: int = 1) -> float:
    """What `flux_mlx.benchmark` needs for one length, a run of each side as warm-up included."""
    parts = sum(attention_s(QWEN3_8B, H100, tokens, pattern) for pattern in (None, PATTERN))
    prompts = rows * sum(prefill_s(QWEN3_8B, H100, bits, tokens, n) for n in (0, sparse))
    prompts += masks_s(tokens, rows) if rows > 1 else 0
    answers = generated * sum(token_s(QWEN3_8B, H100, bits, rows * tokens, n) for n in (0, sparse))
    return rows * PASSES * parts + (trials + 1) * prompts + trials * answers


def stages() -> dict[str, float]:
    """Seconds of each stage of `benchmarks/mlx_cuda.sh`, the start of its process included."""
    exact = [2 * sum(prefill_s(QWEN3_8B, H100, 16, n, sparse) for sparse in (0, 25)) for n in (8192, 32768)]
    layer = [sum(attention_s(QWEN3_8B, H100, n, pattern) for pattern in (None, PATTERN)) for n in (32768, 131072)]
    memory = prefill_s(QWEN3_8B, H100, 16, 131072) + 2 * prefill_s(QWEN3_8B, H100, 16, 131072, 25)
    prompts = [prefill_s(QWEN3_8B, H100, 16, n) for n in (1024, 8192)]
    small = [prefill_s(SMALL, H100, 16, n, 7) for n in (16384, 262144, 1048576)]

    def decode(bits: int, kinds: int) -> float:
        return sum(3 * kinds * 37 * token_s(QWEN3_8B, H100, bits, n) for n in (32768, 131072, 262144))

    seconds = {
        "layer": PASSES * sum(layer) + 5,
        "decode-bf16": decode(16, 3),
        "decode-4bit": decode(4, 5),
        "short": sum(compare_s(16, n, 25, 11, 24) for n in (256, 512, 1024, 2048, 4096)),
        "crossover": sum(compare_s(16, n, 25, runs, 24) for n, runs in CROSSOVER_RUNS.items()),
        "router": 6 * 101 * prefill_s(QWEN3_8B, H100, 16, 8192, 25),  # kinds, runs
        "commands": 4
        * sum(prefill_s(QWEN3_8B, H100, 16, n, sparse) for n in (1024, 8192, 32768) for sparse in (0, 25, 25)),
        "exact": 3 * sum(exact),
        "bf16": compare_s(16, 32768, 25, 4, 48) + compare_s(16, 131072, 25, 2, 48),
        "bf16-256k": compare_s(16, 262144, 28, 1, 32),
        "million": sum(small),
        "memory": memory,
        "4bit": compare_s(4, 32768, 25, 2, 48) + compare_s(4, 131072, 25, 1, 48),
        "batch": compare_s(4, 32768, 25, 1, 32, rows=8),
        "4bit-256k": compare_s(4, 262144, 28, 1, 32),
        "timeline": 35 * sum(prompts) + 120 * token_s(QWEN3_8B, H100, 16, 131072) + 10,  # PyTorch, and its tracer
    }
    return {name: START_S + value for name, value in seconds.items()}


def stages_table() -> str:
    """The stages, and what they take together."""
    lines: list[tuple[Any, ...]] = [("stage", "seconds", "together, with the first minute")]
    together = 60.0
    for name, seconds in stages().items():
        together += seconds
        lines.append((name, f"{seconds:.0f}", f"{together:.0f}"))
    return columns(lines)


def main() -> None:
    """Print the tables."""
    print("\n\n".join([known_table(), runs_table(), stages_table(), short_table()]))


if __name__ == "__main__":
    main()
