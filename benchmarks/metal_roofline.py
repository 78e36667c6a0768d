"""The roofline of the Metal kernels on paper: `python benchmarks/metal_roofline.py` prints the README's tables.

Nothing here is measured. A time is the larger of operations over the matrix rate and bytes over the memory bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

from flux_mlx.spec import PatternConfig, RouterConfig, visible_pairs
from metal_kernels import catalog, launches

HQ, HKV, D, ITEM = 32, 8, 128, 2
PATTERN = PatternConfig()
LENGTHS = (8192, 32768, 131072)
MATRIX_SHARE = 0.8  # of the peak, for stock attention and for the kernels alike


@dataclass(frozen=True)
class Device:
    """Cores times 128 multiply-adds times the clock, and the memory bandwidth, as published."""

    name: str
    cores: int
    ghz: float
    gb_s: float

    @property
    def tflops(self) -> float:
        """Peak of float32, and of simdgroup_matrix, TFLOP/s."""
        return self.cores * 128 * 2 * self.ghz / 1000

    def ms(self, flops: float, moved_bytes: float) -> float:
        """The roofline's time."""
        return 1e3 * max(flops / (MATRIX_SHARE * self.tflops * 1e12), moved_bytes / (self.gb_s * 1e9))


DEVICES = (
    Device("M1", 8, 1.28, 68),
    Device("M1 Max", 32, 1.30, 400),
    Device("M2 Max", 38, 1.40, 400),
    Device("M3 Max", 40, 1.40, 400),
    Device("M3 Ultra", 80, 1.40, 819),
    Device("M4 Max", 40, 1.58, 546),
)


def tile_pairs(tokens: int) -> int:
    """(query, key) pairs that the prefill kernel computes: its tiles of 32 queries and 16 keys, edges included."""
    keys, _ = launches.prefill_tile("float16", D)
    total = 0
    for first in range(0, tokens, catalog.QUERY_ROWS):
        begin = PATTERN.window_start(first)
        sink = 0 if begin <= PATTERN.sink_span else PATTERN.sink_span
        begin = begin if sink else 0
        window = first + catalog.QUERY_ROWS - begin
        total += catalog.QUERY_ROWS * (-(-sink // keys) + -(-window // keys)) * keys
    return total


def prefill_work(tokens: int) -> dict[str, tuple[float, float]]:
    """(operations, bytes) of a prompt: stock dense, composition of stock calls over gathered blocks, kernel."""
    io = 2 * tokens * (HQ + HKV) * D * ITEM
    blocks = tokens / PATTERN.block_size
    gathered = blocks * (PATTERN.sink_span + PATTERN.window_span) * HKV * D * 2 * ITEM
    visible = visible_pairs(PATTERN, tokens, tokens)
    return {
        "dense": (4 * HQ * D * visible_pairs(None, tokens, tokens), io),
        "composition": (4 * HQ * D * visible * 1.06, io + 3 * gathered),  # its own block is computed whole
        "kernel": (4 * HQ * D * tile_pairs(tokens), io),
    }


def decode_work(tokens: int) -> dict[str, tuple[float, float]]:
    """(operations, bytes) of one query: stock dense, stock over a copied sink and window, kernel in place."""
    seen = PATTERN.sink_span + PATTERN.window_span - PATTERN.block_size // 2
    read = 2 * HKV * D * ITEM
    return {
        "dense": (4 * HQ * D * tokens, read * tokens),
        "composition": (4 * HQ * D * seen, 3 * read * seen),
        "kernel": (4 * HQ * D * seen, read * seen),
    }


def mass_work(tokens: int, stride: int = 16) -> dict[str, tuple[float, float]]:
    """(operations, bytes) of the block masses: scores stored by operations, computed twice by the kernel."""
    scores = HQ * (tokens / stride) ** 2
    products = 2 * scores * stride * D
    rows = HQ * tokens / PATTERN.block_size / catalog.MASS_BLOCKS  # threadgroups: each reads half of the keys twice
    return {
        "operations": (products, 4 * scores * 4),
        "kernel": (products * 2 / 2, rows * tokens * D * ITEM),
    }


def router_work() -> tuple[float, float]:
    """(operations, bytes) of one layer's router over 2 * 100 tokens."""
    parameters = sum(a * b for a, b in (s for s in RouterConfig.parameter_shapes(D).values() if len(s) == 2))
    return 2 * parameters, 4 * parameters + 200 * HQ * D * ITEM


def rows(title: str, work: dict[int, dict[str, tuple[float, float]]]) -> str:
    """One markdown table: milliseconds by device, a column for each length and form."""
    columns = [(length, form) for length, forms in work.items() for form in forms]
    head = [f"{length // 1024}K {form}" for length, form in columns]
    lines = [f"| {title}, ms | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for device in DEVICES:
        times = [device.ms(*work[length][form]) for length, form in columns]
        lines.append(f"| {device.name} | {' | '.join(f'{t:.3g}' for t in times)} |")
    return "\n".join(lines)


def registers(head_dim: int, item_bytes: int) -> int:
    """32-bit registers of a prefill thread by estimate: query, output, scores, and 24 for the rest."""
    keys, _ = launches.prefill_tile("float32" if item_bytes == 4 else "float16", head_dim)
    return head_dim // 4 * item_bytes // 4 + head_dim // 4 + keys // 4 + 24


def main() -> None:
    """Print the tables."""
    tables = [
        rows("prefill, one layer", {n: prefill_work(n) for n in LENGTHS}),
        rows("decode, one layer", {n: decode_work(n) for n in LENGTHS[1:]}),
        rows("block mass, one layer", {n: mass_work(n) for n in LENGTHS[:2]}),
    ]
    lines = ["| prefill, D | keys of a tile | threadgroup bytes | registers |", "|---|---|---|---|"]
    for head_dim in catalog.HEAD_DIMS:
        for dtype in ("float16", "float32"):
            keys, scratch = launches.prefill_tile(dtype, head_dim)
            lines.append(
                f"| {head_dim} {dtype} | {keys} | {scratch} | {registers(head_dim, catalog.ITEM_BYTES[dtype])} |"
            )
    flops, moved = router_work()
    print("\n\n".join([*tables, "\n".join(lines), f"router: {flops / 1e6:.2f} MFLOP, {moved / 1e6:.2f} MB a layer"]))


if __name__ == "__main__":
    main()
