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

from flux_mlx.packaged_routers import find_routers
from flux_mlx.smollm2 import fetch_gguf

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE / "data" / "us_constitution_1787.txt"
QUESTION = "According to the text, how many Representatives shall Virginia have?"
MODEL = "smollm2-135m-instruct"
ROUTERS = find_routers(MODEL) / "routers.safetensors"


def run(*command: str, **environment: str) -> None:
    """Show a command of this environment and run it."""
    shown = [f"{name}={value}" for name, value in environment.items()]
    shown += [shlex.quote(word) if len(word) < 80 else "..." for word in command]
    print("$ " + " ".join(shown), flush=True)
    program = Path(sys.executable).parent / command[0]
    subprocess.run([str(program), *command[1:]], env=os.environ | environment, check=True)


def directory_name(routers: Path) -> str:
    """Other routers make another directory."""
    return f"smollm2-135m-flux-{hashlib.sha256(routers.read_bytes()).hexdigest()[:8]}"


def main() -> None:
    """Fetch, convert, generate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("models"), help="where to keep the model")
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens to generate")
    args = parser.parse_args()
    directory = args.models / directory_name(ROUTERS)
    if not directory.is_dir():
        gguf = fetch_gguf(args.models / "download")
        run("flux_mlx.convert", "--gguf", str(gguf), "--mlx-path", str(directory), "--routers", MODEL)
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
