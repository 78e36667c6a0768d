"""The main job: SmolLM2, routed layer by layer, answers a question about a long document in stock `mlx_lm.generate`.

Run by `make demo`. The first run downloads the model (93 MB) and converts it; later runs start at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

from flux_mlx.smollm2 import fetch_gguf

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE / "data" / "us_constitution_1787.txt"
QUESTION = "According to the text, how many Representatives shall Virginia have?"
# Full layers chosen by hand: needle retrieval at 4,096 tokens stays at the level of all layers full.
STATIC_FULL_LAYERS = "0,2,6,7,14,18,21,23"
ROUTERS = HERE.parent / "flux_mlx" / "data" / "routers" / "smollm2-135m-instruct" / "routers.safetensors"


def run(*command: str, **environment: str) -> None:
    """Show a command of this environment and run it."""
    shown = [f"{name}={value}" for name, value in environment.items()]
    shown += [shlex.quote(word) if len(word) < 80 else "..." for word in command]
    print("$ " + " ".join(shown), flush=True)
    program = Path(sys.executable).parent / command[0]
    subprocess.run([str(program), *command[1:]], env=os.environ | environment, check=True)


def flux_settings(trained: bool) -> list[str]:
    """Flags of flux_mlx.convert: the trained routers that ship with the package, or the static list."""
    if trained:
        return ["--routers", str(ROUTERS)]
    sizes = ["--block-size", "64", "--sink-tokens", "64", "--window-tokens", "512"]
    return [*sizes, "--route", STATIC_FULL_LAYERS]


def settings_hash(settings: list[str]) -> str:
    """Names a directory: other settings, or other contents of a file among them, make another one."""
    parts = [Path(part).read_bytes() if Path(part).is_file() else part.encode() for part in settings]
    return hashlib.sha256(b" ".join(parts)).hexdigest()[:8]


def main() -> None:
    """Fetch, convert, generate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("models"), help="where to keep the model")
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens to generate")
    parser.add_argument("--trained", action="store_true", help="trained routers (experimental) in place of the list")
    args = parser.parse_args()
    settings = flux_settings(args.trained)
    kind = settings_hash(settings)
    directory = args.models / f"smollm2-135m-flux-{kind}"
    if not directory.is_dir():
        gguf = fetch_gguf(args.models / "download")
        run("flux_mlx.convert", "--gguf", str(gguf), "--mlx-path", str(directory), *settings)
    document = DOCUMENT.read_text(encoding="utf-8")
    prompt = f"{document}\n\n{QUESTION}"
    print(f"\n{DOCUMENT.name}, {len(document.split())} words. {QUESTION}\n")
    run(
        *("mlx_lm.generate", "--model", str(directory), "--trust-remote-code"),
        *("--max-tokens", str(args.max_tokens), "--prompt", prompt),
        FLUX_MLX_SHOW_ROUTES="1",
    )


if __name__ == "__main__":
    main()
