#!/bin/sh
# The stages that measure the MLX path on one H100-class GPU with MLX's CUDA backend, each one command, in the order in
# which docs/speed.md predicts them:
#
#     sh benchmarks/mlx_cuda.sh OUT STAGE...      # STAGE: see below, or "list"
#
# OUT gets one log and a JSON for each stage (of bf16-256k mlx_bf16_256k.json). A stage that fails does not stop the next
# one. Compiled kernels are kept in $MLX_PTX_CACHE_DIR for the next stage.
set -eu

usage="usage: sh benchmarks/mlx_cuda.sh OUT STAGE... (or: list)"
stages="layer decode-bf16 decode-4bit short crossover router commands exact bf16 bf16-256k million memory 4bit batch"
stages="$stages 4bit-256k timeline"
python=${PYTHON:-python3}

[ $# -ge 1 ] || { echo "$usage" >&2; exit 2; }
if [ "$1" = list ]; then
    for stage in $stages; do echo "$stage"; done
    exit
fi
[ $# -ge 2 ] && [ -d "$1" ] || { echo "$usage; OUT must be a directory" >&2; exit 2; }
out=$1
shift

for stage in "$@"; do
    case " $stages " in *" $stage "*) ;; *) echo "no stage $stage; stages: $stages" >&2; exit 2 ;; esac
done

export MLX_PTX_CACHE_DIR="${MLX_PTX_CACHE_DIR:-${TMPDIR:-/tmp}/flux_mlx_ptx}"
# As flux_mlx.benchmark sets them: else many lengths in one process end it.
export MLX_CUDA_SDPA_CACHE_SIZE="${MLX_CUDA_SDPA_CACHE_SIZE:-4096}"
export MLX_CUDA_GRAPH_CACHE_SIZE="${MLX_CUDA_GRAPH_CACHE_SIZE:-2000}"
mkdir -p "$MLX_PTX_CACHE_DIR"

# Some builds of Python leave its manual out, which is the default text.
text=""
"$python" -c "import pydoc_data.topics" 2>/dev/null || text="--prompt examples/data/us_constitution_1787.txt"

compare() { "$python" -m flux_mlx.benchmark --shape qwen3-8b --show-routes $text "$@"; }
# 39 GB of keys at 32K, and stock's masks of a layer are 34 GB, twice and more, in its own chunks of 2,048 tokens a row.
batch() { compare --bits 4 -b 8 --lengths "$1" --omega 0.7 -n 1 -g 32 --memory-share 0.5 --batch-step-size 512 --json "$json"; }
script() {
    name=$1
    shift
    "$python" -m "benchmarks.$name" $text "$@"
}

run() {
    json="$out/mlx_$(echo "$1" | tr - _).json"
    case $1 in
    layer) script mlx_sparse_layer --lengths 32K 128K --decode-lengths 4K 32K 128K 512K --json "$json" ;;
    decode-bf16) script mlx_decode --lengths 32K 128K 256K --omegas 0.7 -n 5 --json "$json" ;;
    decode-4bit) script mlx_decode --bits 4 --lengths 32K 128K 256K --omegas 0.7 -n 5 --json "$json" ;;
    short) compare --lengths 256 512 1K 2K 4K --omega 0.7 -n 11 -g 24 --json "$json" ;;
    crossover) compare --crossover --lengths 512 64K --omega 0.7 -n 7 --trial-seconds 8 -g 24 --json "$json" ;;
    router) script mlx_router_cost --lengths 8K -n 100 --json "$json" ;;
    commands) script mlx_stock_commands --lengths 1K 8K 32K -n 3 --json "$json" ;;
    exact) script mlx_exact_cost --lengths 8K 32K -n 2 --json "$json" ;;
    bf16) compare --lengths 32K 128K --omega 0.7 -n 4 --trial-seconds 22 -g 48 --json "$json" ;;
    bf16-256k) compare --lengths 256K --omega 0.77 -n 1 -g 32 --json "$json" ;;
    million) script mlx_million --lengths 256K 1M --chunk 8192 --json "$json" ;;
    memory) script mlx_kv_memory --lengths 128K -n 1 --json "$json" ;;
    4bit) compare --bits 4 --lengths 32K 128K --omega 0.7 -n 3 --trial-seconds 15 -g 48 --json "$json" ;;
    batch) batch 32K || batch 16K ;;
    4bit-256k) compare --bits 4 --lengths 256K --omega 0.77 -n 1 -g 32 --json "$json" ;;
    timeline) script mlx_timeline --prefill 1K 8K --decode 128K -n 5 --json "$json" ;; # wants PyTorch with CUDA
    esac
}

log="$out/mlx_cuda.log"
failed=""
for stage in "$@"; do
    start=$(date +%s)
    echo "== $stage" >>"$log"
    run "$stage" >>"$log" 2>&1 || failed="$failed $stage"
    echo "== $stage took $(($(date +%s) - start)) s" >>"$log"
    tail -n 30 "$log"
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
