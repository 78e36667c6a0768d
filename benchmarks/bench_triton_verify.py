"""Every Triton kernel on a real GPU: sampled rows against float64, gradients against eager, repeats bit for bit.

Run on a GPU from the repository root: python -m benchmarks.bench_triton_verify
With --small every kernel runs once at a small size, for compute-sanitizer; with --only WORD the cases that have it in
their names.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.bench_triton_common import write
from cuda_reference import eager, triton_attention, triton_prefill, triton_xattention, xattention
from cuda_reference.attention import full_attention, sparse_attention
from cuda_reference.pattern import block_table, visible
from flux_mlx.spec import PatternConfig

Mask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Sizes = tuple[int, int, int]  # query tokens, keys, head dim
DEVICE = "cuda"
LONG_TOKENS = 8192  # of a call that is not repeated
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # of the relative error of out


@dataclass(frozen=True)
class Case:
    """One call: `run(q, k, v)` gives (out, lse); `mask(q_pos, k_pos)` says what the rows see."""

    name: str
    q_tokens: int
    kv_tokens: int
    head_dim: int
    run: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    mask: Mask
    heads: tuple[int, int] = (8, 2)
    dtype: torch.dtype = torch.bfloat16

    def tensors(self) -> list[torch.Tensor]:
        """Fresh q, k, v of a fixed seed, the keys in a larger buffer whose end is NaN."""
        torch.manual_seed(self.q_tokens + self.kv_tokens)
        q = torch.randn(2, self.heads[0], self.q_tokens, self.head_dim, device=DEVICE, dtype=self.dtype)
        room = (2, self.heads[1], self.kv_tokens + 200, self.head_dim)
        kv = [torch.full(room, torch.nan, device=DEVICE, dtype=self.dtype) for _ in "kv"]
        return [q, *(x[:, :, : self.kv_tokens].normal_() for x in kv)]


def causal(q_pos: torch.Tensor, k_pos: torch.Tensor) -> torch.Tensor:
    """Dense attention's mask."""
    return k_pos <= q_pos


def full_case(name: str, q_tokens: int, kv_tokens: int, head_dim: int, **more: object) -> Case:
    """The public dense call."""
    return Case(name, q_tokens, kv_tokens, head_dim, _public(full_attention), causal, **more)


def _public(function: Callable[..., object], *arguments: object, **options: object) -> Callable[..., object]:
    return lambda q, k, v: function(q, k, v, *arguments, impl="triton", return_lse=True, **options)


def sparse_case(
    name: str,
    q_tokens: int,
    kv_tokens: int,
    head_dim: int,
    pattern: PatternConfig,
    prompt: int | None = None,
    **more: object,
) -> Case:
    """The public sparse call, streaming or triangle."""
    run = _public(sparse_attention, pattern, prompt_tokens=prompt)
    return Case(name, q_tokens, kv_tokens, head_dim, run, lambda q, k: visible(pattern, q, k, prompt), **more)


def block_case(name: str, q_tokens: int, kv_tokens: int, head_dim: int, block: int, *, fast: bool) -> Case:
    """Random kept blocks; `fast` allows Hopper's kernel."""
    first, n = (kv_tokens - q_tokens) // block, -(-kv_tokens // block)
    generator = torch.Generator(device=DEVICE).manual_seed(n)
    kept = torch.rand(2, 8, n - first, n, device=DEVICE, generator=generator) < 0.3
    kept |= torch.arange(n, device=DEVICE) == torch.arange(first, n, device=DEVICE)[:, None]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if fast:
            return triton_attention.block_attention(q, k, v, kept, block, q.shape[3] ** -0.5, diagonal_kept=True)
        table = block_table(block, kept, q_tokens, kv_tokens)
        return triton_prefill.block_sparse(q, k, v, q.shape[3] ** -0.5, table)

    def mask(q_pos: torch.Tensor, k_pos: torch.Tensor) -> torch.Tensor:
        return kept[..., q_pos // block - first, k_pos // block] & (k_pos <= q_pos)

    return Case(name, q_tokens, kv_tokens, head_dim, run, mask)


def portable_case(name: str, q_tokens: int, kv_tokens: int, head_dim: int, pattern: PatternConfig) -> Case:
    """The portable kernel, whatever the GPU."""
    sizes = (pattern.block_size, pattern.window_blocks, pattern.sink_span)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return triton_prefill.streaming(q, k, v, q.shape[3] ** -0.5, *sizes)

    return Case(name, q_tokens, kv_tokens, head_dim, run, lambda q, k: visible(pattern, q, k))


def cases(small: bool) -> list[Case]:
    """Both kernels of every kind; lengths that are no whole number of tiles, offsets inside a tile."""
    default = PatternConfig()
    near = PatternConfig(sink_tokens=128, window_tokens=256)
    short = PatternConfig(block_size=64, sink_tokens=64, window_tokens=512)
    tokens = PatternConfig(block_size=1, sink_tokens=5, window_tokens=77)
    triangle = PatternConfig(name="triangle", sink_tokens=128, window_tokens=256, last_tokens=100)
    listed = [
        full_case("dense", 300, 300, 128),
        full_case("dense, offset", 333, 700, 128),
        full_case("dense, float16", 333, 700, 64, dtype=torch.float16),
        full_case("dense, float32", 150, 200, 64, dtype=torch.float32),
        full_case("dense, head dim 80", 200, 391, 80),
        full_case("dense, head dim 96", 200, 391, 96),
        full_case("dense, head dim 256", 200, 391, 256),
        sparse_case("streaming", 700, 900, 128, near),
        sparse_case("streaming, head dim 64", 700, 911, 64, near),
        sparse_case("streaming, blocks of 64", 700, 900, 64, short),
        sparse_case("streaming, blocks of 1", 300, 500, 64, tokens),
        sparse_case("triangle", 700, 911, 128, triangle, prompt=890),
        portable_case("portable streaming", 700, 911, 128, near),
        block_case("block-sparse", 700, 911, 128, 128, fast=True),
        block_case("portable block-sparse", 700, 911, 128, 128, fast=False),
        block_case("block-sparse, blocks of 48", 200, 291, 64, 48, fast=True),
        full_case("decode", 1, 1111, 128),
        full_case("decode of 5", 5, 1111, 128),
        full_case("decode of 16, 8 heads a group", 16, 700, 64, heads=(8, 1)),
        sparse_case("streaming decode", 1, 3333, 128, default),
        sparse_case("streaming decode of 7, blocks of 1", 7, 3333, 64, tokens),
    ]
    if small:
        return listed
    return [
        *listed,
        full_case("dense, long", 8192, 8192, 128, heads=(32, 8)),
        full_case("dense, long, offset", 5001, 33000, 128),
        sparse_case("streaming, long", 32768, 32768, 128, default, heads=(32, 8)),
        sparse_case("streaming, long, offset", 20001, 70003, 128, default),
        sparse_case("streaming, long, head dim 64", 20001, 70003, 64, default),
        portable_case("portable streaming, long", 9001, 20003, 128, default),
        block_case("block-sparse, long", 20001, 30003, 128, 128, fast=True),
        full_case("decode, long", 1, 131072, 128, heads=(32, 8)),
        sparse_case("streaming decode, long", 1, 1048576, 128, default),
    ]


def sampled_error(case: Case) -> tuple[float, float]:
    """(relative error of out, largest error of lse) over 16 rows, the first and last among them, against float64."""
    q, k, v = case.tensors()
    out, lse = case.run(q, k, v)
    if out.isnan().any() or lse.isnan().any():
        return float("nan"), float("nan")
    picked = torch.linspace(0, case.q_tokens - 1, min(16, case.q_tokens), device=DEVICE).long()
    mask = case.mask(
        (picked + case.kv_tokens - case.q_tokens)[:, None], torch.arange(case.kv_tokens, device=DEVICE)[None]
    )
    expected, expected_lse = eager.masked_rows(
        q[:, :, picked].double(), k.double(), v.double(), mask, case.head_dim**-0.5
    )
    error = (out[:, :, picked].double() - expected).norm() / expected.norm()
    return error.item(), (lse[:, :, picked] - expected_lse).abs().max().item()


def gradients(sizes: Sizes, pattern: PatternConfig | None, impl: str) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv) of fixed inputs; eager computes in float32 on the same bfloat16 values."""
    tensors = Case("", *sizes, full_attention, causal).tensors()
    dout = torch.randn_like(tensors[0])
    inputs = [x.to(torch.bfloat16 if impl == "triton" else torch.float32).requires_grad_() for x in tensors]
    out = full_attention(*inputs, impl=impl) if pattern is None else sparse_attention(*inputs, pattern, impl=impl)
    return torch.autograd.grad(out, inputs, dout.to(out.dtype))


def gradient_errors(sizes: Sizes, pattern: PatternConfig | None) -> list[float]:
    """Relative errors of dq, dk, dv against eager's."""
    pairs = zip(gradients(sizes, pattern, "triton"), gradients(sizes, pattern, "eager"), strict=True)
    return [((a.float() - b).norm() / b.norm()).item() for a, b in pairs]


def equal_repeats(run: Callable[[], tuple[torch.Tensor, ...]], repeats: int) -> int:
    """`repeats` if so many more runs give the bits of the first, else 0."""
    first = run()
    differ = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for _ in range(repeats):
        for a, b in zip(first, run(), strict=True):
            differ |= (a.view(torch.uint8) != b.view(torch.uint8)).any()
    return 0 if differ.item() else repeats


def selection(sizes: Sizes, pattern: PatternConfig, module: ModuleType) -> tuple[torch.Tensor, torch.Tensor]:
    """(block mass, kept blocks) of fixed inputs; by Torch operations in float32 if `module` is `xattention`."""
    q, k, _v = Case("", *sizes, full_attention, causal).tensors()
    if module is xattention:
        q, k = q.float(), k.float()
    return module.block_mass(q, k, pattern.block_size, pattern.stride), module.select_blocks(q, k, pattern)


def attention_row(case: Case, repeats: int) -> dict[str, Any]:
    """Errors of one case, and its repeats if it is short."""
    error, lse_error = sampled_error(case)
    row = {"case": case.name, "tokens": [case.q_tokens, case.kv_tokens], "head_dim": case.head_dim}
    row |= {"out_error": error, "lse_error": lse_error, "ok": error < LIMITS[case.dtype] and lse_error < 2e-3}
    if case.q_tokens >= LONG_TOKENS:
        return row
    tensors = case.tensors()
    return row | _repeats(row["ok"], lambda: case.run(*tensors), repeats)


def gradient_row(sizes: Sizes, pattern: PatternConfig | None, repeats: int) -> dict[str, Any]:
    """Errors and repeats of a backward pass."""
    errors = gradient_errors(sizes, pattern)
    row = {"case": "gradients", "tokens": sizes[:2], "head_dim": sizes[2], "errors": errors}
    return row | _repeats(max(errors) < 1e-2, lambda: gradients(sizes, pattern, "triton"), repeats)


def selection_row(sizes: Sizes, pattern: PatternConfig, repeats: int) -> dict[str, Any]:
    """Largest error of the block mass, the share of blocks chosen otherwise than by Torch operations, and repeats."""
    mass, chosen = selection(sizes, pattern, triton_xattention)
    expected, as_expected = selection(sizes, pattern, xattention)
    error = (mass - expected).abs().max().item()
    row = {"case": "xattention choice", "tokens": sizes[:2], "head_dim": sizes[2], "top_k": pattern.top_k_blocks}
    row |= {"mass_error": error, "chosen_otherwise": (chosen != as_expected).float().mean().item()}
    repeats = 0 if sizes[0] >= LONG_TOKENS else repeats
    return row | _repeats(error < 1e-3, lambda: selection(sizes, pattern, triton_xattention), repeats)


def _repeats(is_right: bool, run: Callable[[], tuple[torch.Tensor, ...]], repeats: int) -> dict[str, Any]:
    """The end of a row: repeats that were equal, if any were asked for, and whether all is well."""
    if not repeats:
        return {"ok": is_right}
    equal = equal_repeats(run, repeats)
    return {"equal_repeats": equal, "ok": is_right and equal == repeats}


def main() -> None:
    """Run all cases; exit code 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="small sizes and one run each, for compute-sanitizer")
    parser.add_argument("--only", default="", help="a word of the cases' names")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    repeats = 0 if options.small else options.repeats
    calls = [partial(attention_row, case, repeats) for case in cases(options.small) if options.only in case.name]
    near = PatternConfig(sink_tokens=128, window_tokens=256)
    backward = [((400, 400, 128), None), ((300, 455, 64), near), ((300, 455, 256), near), ((300, 455, 96), near)]
    if options.only in "gradients":
        calls += [partial(gradient_row, sizes, pattern, repeats) for sizes, pattern in backward]
    chosen = [((500, 900, 128), None), ((700, 700, 64), None), ((500, 900, 80), 3)]
    chosen += [] if options.small else [((8192, 16384, 128), None)]
    if options.only in "xattention choice":
        patterns = [(sizes, PatternConfig(name="xattention", top_k_blocks=top_k)) for sizes, top_k in chosen]
        calls += [partial(selection_row, sizes, pattern, repeats) for sizes, pattern in patterns]
    rows = [call() for call in calls]
    write(options.out / "bench_triton_verify.json", rows, repeats=options.repeats)
    raise SystemExit(0 if all(row["ok"] for row in rows) else 1)


if __name__ == "__main__":
    main()
