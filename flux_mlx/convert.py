"""flux_mlx.convert: make a Flux model directory from a model that mlx-lm can load, or from a Llama GGUF."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.convert import MODEL_CONVERSION_DTYPES, QUANT_RECIPES
from mlx_lm.utils import dequantize_model, save_config, save_model

from flux_mlx.base_model import (
    Quantization,
    cast,
    default_dtype,
    load_base,
    quantize,
    set_projections,
    source_directory,
)
from flux_mlx.fingerprint import digest_tensors
from flux_mlx.model_directory import (
    CARD_NAME,
    SHIM_NAME,
    building,
    carry_files,
    flux_config,
    is_flux_config,
    model_card,
    read_config,
    shim_text,
)
from flux_mlx.models import apply, routed_layers
from flux_mlx.packaged_routers import find_routers, packaged_names
from flux_mlx.spec import FluxConfig, PatternConfig, RouterConfig
from flux_mlx.spec.config import PATTERNS
from flux_mlx.weights import (
    RouterCheckpoint,
    check_routers,
    flatten_routers,
    fresh_routers,
    has_routers,
    keep_routers_digest,
    read_routers,
    routers_of,
)


def override(flux: FluxConfig, settings: Mapping[str, Any]) -> FluxConfig:
    """`flux` with some settings replaced, by the names of the flags: "pattern" is the pattern's name.

    Raises:
        ValueError: A bad value.
    """
    named = {"name" if key == "pattern" else key: value for key, value in settings.items() if value is not None}
    parts = {}
    for part, cls in (("pattern", PatternConfig), ("router", RouterConfig)):
        mine = {field.name: named.pop(field.name) for field in dataclasses.fields(cls) if field.name in named}
        parts[part] = dataclasses.replace(getattr(flux, part), **mine)
    return dataclasses.replace(flux, **parts, **named)


def _own_settings(directory: Path, checkpoint: RouterCheckpoint | None) -> FluxConfig:
    """Settings to start from: those the routers were trained with, those of a Flux source, the defaults."""
    if checkpoint is not None and checkpoint.flux is not None:
        return checkpoint.flux
    config = read_config(directory)
    return FluxConfig.from_dict(config["flux"]) if is_flux_config(config) else FluxConfig()


def _base_weights(
    directory: Path,
    checkpoint: RouterCheckpoint | None,
    dtype: str | None,
    quantization: Quantization | None,
    dequantize: bool,
) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """The base model as it will be written, its config, and what was changed, a line each."""
    model, config = load_base(directory)
    changes = []
    if checkpoint is not None and checkpoint.projections:
        set_projections(model, checkpoint.projections)
        changes.append("q, k and v projections: those that came with the routers.")
    if dequantize:
        model = dequantize_model(model)
        config = {key: value for key, value in config.items() if not key.startswith("quantization")}
        changes.append("weights: dequantised.")
    dtype = dtype or default_dtype(config)
    if dtype:
        cast(model, dtype)
        config["torch_dtype"] = dtype
        changes.append(f"weights: floating-point ones written as {dtype}.")
    if quantization:
        model, config = quantize(model, config, quantization)
        changes.append(f"weights: quantised, {quantization.recipe or config['quantization']}.")
    return model, config, changes


def _set_routers(model: nn.Module, flux: FluxConfig, checkpoint: RouterCheckpoint | None, seed: int) -> str:
    """Give a Flux model the routers of `checkpoint`, or fresh ones, and say which in a line."""
    layers = routed_layers(model)
    head_dims = {index: attn.router.encoder[0].weight.shape[1] for index, attn in layers.items()}
    routers = checkpoint.routers if checkpoint else fresh_routers(head_dims, flux.router, seed)
    check_routers(routers, head_dims)
    for index, attn in layers.items():
        attn.router.load_weights(list(routers[index].items()))
    made = "trained elsewhere" if checkpoint else f"fresh (seed {seed}), not trained"
    return f"routers: {len(layers)} of {len(model.layers)} layers, {made}, float32."


def _route_line(flux: FluxConfig, layers: list[int], is_fresh: bool) -> str:
    """Which of the routed layers will be full, in a line."""
    if flux.route == "auto" and is_fresh:
        stays = "every layer stays full and nothing is saved; " if flux.router.init_bias > 0 else ""
        return f"route: auto, but routers are fresh and untrained: {stays}give --routers or --route."
    if flux.route == "auto":
        return "route: auto, the routers decide by each prompt."
    full = {"full": layers, "sparse": []}[flux.route] if isinstance(flux.route, str) else flux.route
    shown = f"full layers {', '.join(map(str, full))}" if full else "no full layer"
    return f"route: {shown}; {len(layers) - len(full)} of {len(layers)} sparse."


def _write(part: Path, directory: Path, model: nn.Module, config: dict[str, Any], card: str) -> None:
    """Write the files of a Flux model directory; tokenizer and licence come from `directory`."""
    part.mkdir()
    carry_files(directory, part)
    digest = digest_tensors(flatten_routers(routers_of(routed_layers(model))))
    save_model(part, model, donate_model=True)
    keep_routers_digest(part, digest)
    save_config(config, part / "config.json")
    (part / SHIM_NAME).write_text(shim_text(), "utf-8")
    (part / CARD_NAME).write_text(card, "utf-8")


def convert(
    source: str | Path,
    out: str | Path,
    *,
    routers: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    quantization: Quantization | None = None,
    dequantize: bool = False,
    revision: str | None = None,
) -> list[str]:
    """Write a Flux model directory.

    Args:
        source: Model directory (a Flux one or a published checkpoint too), hub id, or Llama GGUF.
        out: New directory.
        routers: Router file, directory of them, or name of packaged ones; None takes the source's own, and fresh
            ones if it has none.
        settings: What to change in the settings, by the names of `FLAGS`. Unchanged ones come from the router file,
            then from a Flux source, then from the defaults.
        seed: Seed of fresh routers.
        dtype: "float32", "bfloat16" or "float16"; None is `default_dtype`. Routers are float32 always.
        quantization: Quantise the base's weights; never the routers'.
        dequantize: Dequantise a quantised source first.
        revision: Revision at the hub.

    Returns:
        What was changed, a line each, as the directory's README.md says it.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: Source, router file or tokenizer is missing.
        ValueError: Anything else that is wrong with them; the message says what.
    """
    override(FluxConfig(), settings or {})
    given = read_routers(find_routers(routers)) if routers else None
    with building(Path(out)) as part, source_directory(str(source), dtype, part.parent, revision) as (directory, base):
        checkpoint = read_routers(directory) if given is None and has_routers(directory) else given
        flux = override(_own_settings(directory, checkpoint), settings or {})
        model, config, changes = _base_weights(directory, given, dtype, quantization, dequantize)
        apply(model, flux)
        changes.append(_set_routers(model, flux, checkpoint, seed))
        changes.append(_route_line(flux, sorted(routed_layers(model)), is_fresh=checkpoint is None))
        changes.append(
            f"sparse layers: {flux.pattern.name}, block {flux.pattern.block_size}, sink "
            f"{flux.pattern.sink_tokens}, window {flux.pattern.window_tokens} tokens."
        )
        _write(part, directory, model, flux_config(config, flux), model_card(base, flux, changes))
    return changes


FLAGS = {
    "route": "who decides: auto (the routers), full, sparse, or the list of full layers, as 0,2,6-8",
    "pattern": f"what sparse layers see: {', '.join(PATTERNS)}",
    "block_size": "tokens of a block; the sizes in tokens are rounded up to blocks",
    "sink_tokens": "first tokens, which every query sees",
    "window_tokens": "latest tokens that a query sees, itself counted",
    "last_tokens": "triangle: last queries of the prompt, which see everything",
    "stride": "xattention: side of the tiles that are scored",
    "threshold": "xattention: share of the attention mass to keep",
    "top_k_blocks": "xattention: blocks of a row to keep instead of the threshold",
    "pool_tokens": "tokens that a router pools at each end of the prompt",
    "init_bias": "bias for full attention of fresh routers",
}
"""Settings that have a flag: name to help. Names, types and defaults are those of the dataclasses in `spec.config`."""


def _add_flux_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each of `FLAGS`."""
    default = FluxConfig()
    values = {**dataclasses.asdict(default.pattern), **dataclasses.asdict(default.router)}
    values |= {"pattern": default.pattern.name, "route": default.route}
    for name, text in FLAGS.items():
        kind = int if values[name] is None else type(values[name])
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, dest=name, type=kind, default=None, help=f"{text} (default: {values[name]})")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="flux_mlx.convert", description=(__doc__ or "").partition(": ")[2])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf-path", "--model", help="model directory, hub id, or Llama GGUF (a name ending in .gguf)")
    source.add_argument("--gguf", help="Llama GGUF, whatever its name ends in")
    parser.add_argument("--mlx-path", default="flux_model", help="new directory to write (default: flux_model)")
    parser.add_argument("--revision", help="revision of the hub id")
    parser.add_argument("-q", "--quantize", action="store_true", help="quantise the weights, never the routers")
    parser.add_argument("--q-group-size", type=int, help="group size of the quantisation")
    parser.add_argument("--q-bits", type=int, help="bits per weight")
    parser.add_argument("--q-mode", default="affine", choices=["affine", "mxfp4", "nvfp4", "mxfp8"])
    parser.add_argument("--quant-predicate", choices=QUANT_RECIPES, help="mixed-bit recipe")
    parser.add_argument("-d", "--dequantize", action="store_true", help="dequantise a quantised source first")
    parser.add_argument(
        "--dtype", choices=MODEL_CONVERSION_DTYPES, help="of the weights (default: float32 on a CPU, else the source's)"
    )
    parser.add_argument(
        "--routers",
        help="router file, directory of a Flux or published checkpoint, or packaged routers: "
        f"{', '.join(packaged_names())} (default: the source's own, else fresh)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of fresh routers (default: 0)")
    _add_flux_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Bad input ends in one line on stderr and status 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    quantization = Quantization(args.q_group_size, args.q_bits, args.q_mode, args.quant_predicate)
    try:
        changes = convert(
            args.gguf or args.hf_path,
            args.mlx_path,
            routers=args.routers,
            settings={name: getattr(args, name) for name in FLAGS},
            seed=args.seed,
            dtype=args.dtype,
            quantization=quantization if args.quantize else None,
            dequantize=args.dequantize,
            revision=args.revision,
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print("\n".join(changes))
    print(f"Wrote {args.mlx_path}. Try: flux_mlx.generate --model {args.mlx_path} --show-routes --prompt Hello")


if __name__ == "__main__":
    sys.exit(main())
