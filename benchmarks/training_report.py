"""Tables and plots of trained routers, from the results of flux_mlx.evaluate.

Run from the repository root, with the files of all shards:

    python -m benchmarks.training_report benchmarks/training_eval_*.json --ships seed0 \
        --seeds seed0 seed1 seed2 --out benchmarks

It writes training_table.md, training_omega.png and training_quality.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RETRIEVAL, TEXT = ("single-magic", "single", "multi-keys"), ("code", "document")
MIX = (*RETRIEVAL, "multi-hops", "aggregation", "icl", *TEXT)
Results = dict[str, Any]


def merge(parts: Iterable[Results], *, same: Iterable[str] = ()) -> Results:
    """One result of many: cells and contenders of shards and of later runs together.

    Where a contender was scored on a cell more than once, the run with most samples stands. With `same`, names of
    contenders that are to be compared, only cells stay on which all of them were scored on as many samples, the most
    that they share, and in them only who was scored on as many: their means are over the same samples.

    Raises:
        ValueError: Two parts hold the same contender of the same cell, on as many samples, with different numbers.
    """
    whole: Results = {"cells": {}, "routes": {}, "forms": {}, "generation": {}}
    met: dict[str, dict[str, dict[int, tuple[dict[str, Any], Any]]]] = {}
    for part in parts:
        whole["forms"] |= part.get("forms", {})
        for cell, found in part.get("generation", {}).items():
            whole["generation"].setdefault(cell, {}).update(found)
        for cell, by in part.get("cells", {}).items():
            for name, found in by.items():
                runs = met.setdefault(cell, {}).setdefault(name, {})
                first, _ = runs.setdefault(found["samples"], (found, part.get("routes", {}).get(cell, {}).get(name)))
                if found != first and name != "full":
                    raise ValueError(f"[merge] {cell} holds {name} twice, with different numbers.")
    compared = list(same)
    for cell, by in met.items():
        if compared:
            sizes = set[int].intersection(*(set(by.get(name, {})) for name in compared))
            by = {name: {max(sizes): runs[max(sizes)]} for name, runs in by.items() if sizes and max(sizes) in runs}
        if by:
            taken = {name: runs[max(runs)] for name, runs in by.items()}
            whole["cells"][cell] = {name: found for name, (found, _) in taken.items()}
            whole["routes"][cell] = {name: routes for name, (_, routes) in taken.items() if routes is not None}
    return whole


def pick(results: Results, contender: str, kinds: Sequence[str], value: str, split: str = "test") -> list[float]:
    """The values of a contender in all cells of some kinds, any length, that have them."""
    found = []
    for cell, by in results["cells"].items():
        name, kind, _ = cell.split("/")
        if name == split and kind in kinds and value in by.get(contender, {}):
            found.append(by[contender][value])
    return found


def mean(values: Sequence[float]) -> float:
    """Mean, nan of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")


def lost(results: Results, contender: str) -> float:
    """Nats a token lost to all layers full, mean over all cells of the mix."""
    nll, ratio = (pick(results, contender, MIX, value) for value in ("nll", "nll_ratio"))
    return mean([a - a / b for a, b in zip(nll, ratio, strict=True)])


def lost_noise(results: Results, contender: str) -> float:
    """Half the width of the 95 % interval of `lost`, from those of the cells, which are drawn apart."""
    values = (pick(results, contender, MIX, value) for value in ("nll", "nll_ratio", "nll_ratio_low", "nll_ratio_high"))
    halves = [nll / ratio * (high - low) / 2 for nll, ratio, low, high in zip(*values, strict=True)]
    return float(np.linalg.norm(halves)) / len(halves) if halves else float("nan")


COLUMNS: dict[str, Callable[[Results, str], float]] = {
    "Omega, retrieval": lambda r, c: mean(pick(r, c, RETRIEVAL, "omega")),
    "NLL ratio, retrieval": lambda r, c: mean(pick(r, c, RETRIEVAL, "nll_ratio")),
    "choice, difference in points": lambda r, c: 100 * mean(pick(r, c, RETRIEVAL, "accuracy_diff")),
    "choice, unseen forms": lambda r, c: 100 * mean(pick(r, c, RETRIEVAL, "accuracy_diff", "ood")),
    "Omega, code and documents": lambda r, c: mean(pick(r, c, TEXT, "omega")),
    "NLL ratio, code and documents": lambda r, c: mean(pick(r, c, TEXT, "nll_ratio")),
    "Omega, all kinds": lambda r, c: mean(pick(r, c, MIX, "omega")),
    "nats lost, all kinds": lost,
    "its 95 %, plus or minus": lost_noise,
    "visible pairs": lambda r, c: mean(pick(r, c, MIX, "pairs")),
}


def contenders(results: Results) -> list[str]:
    """Names in the order in which they were met."""
    return list(dict.fromkeys(name for by in results["cells"].values() for name in by))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers with three decimals, nan as a hyphen."""
    lines = [" | ".join(header), " | ".join(["---"] * len(header))]
    lines += [" | ".join(map(_cell, row)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if np.isnan(value) else f"{value:.3f}"
    return str(value)


def comparison(results: Results) -> str:
    """All contenders, a line each, means over the lengths."""
    names = contenders(results)
    rows = ([name, *(column(results, name) for column in COLUMNS.values())] for name in names)
    return table(["contender", *COLUMNS], rows)


def by_cell(results: Results, contender: str) -> str:
    """What one contender does in every cell."""
    header = ["cell", "samples", "Omega", "NLL", "NLL ratio", "95 %"]
    header += ["full: choice", "difference", "bound", "exact", "full: exact"]
    rows = []
    for cell, by in sorted(results["cells"].items(), key=_cell_order):
        if contender in by:
            s = by[contender]
            bounds = f"{s['nll_ratio_low']:.3f} to {s['nll_ratio_high']:.3f}"
            choice = [s.get(name, float("nan")) for name in ("accuracy_base", "accuracy_diff", "accuracy_diff_bound")]
            quality = [s["omega"], s["nll"], s["nll_ratio"], bounds, *choice, s["exact"], s["exact_base"]]
            rows.append([cell, s["samples"], *quality])
    return table(header, rows)


def _cell_order(item: tuple[str, Any]) -> tuple[str, str, int]:
    split, kind, tokens = item[0].split("/")
    return split, kind, int(tokens)


def targets(results: Results, contender: str) -> str:
    """The conditions for the routers that ship, cell by cell at its worst."""

    def of(kinds: Sequence[str], value: str, split: str = "test") -> list[float]:
        return pick(results, contender, kinds, value, split)

    gap = mean(of(TEXT, "omega")) - mean(of(RETRIEVAL, "omega"))
    judged = [
        ("retrieval: NLL ratio, worst cell", max(of(RETRIEVAL, "nll_ratio")), "at most", 1.02),
        ("retrieval: Omega, mean", mean(of(RETRIEVAL, "omega")), "at least", 0.70),
        ("retrieval: choice, worst bound", min(of(RETRIEVAL, "accuracy_diff_bound")), "at least", -0.01),
        ("retrieval: choice of all full, least", min(of(RETRIEVAL, "accuracy_base")), "at least", 0.60),
        ("unseen forms: choice, worst", min(of(RETRIEVAL, "accuracy_diff", "ood"), default=np.nan), "at least", -0.02),
        ("code and documents: NLL ratio, worst cell", max(of(TEXT, "nll_ratio")), "at most", 1.015),
        ("code and documents: Omega, mean", mean(of(TEXT, "omega")), "at least", 0.85),
        ("Omega of code and documents minus retrieval", gap, "at least", 0.15),
    ]
    rows = []
    for what, value, side, limit in judged:
        holds = value <= limit if side == "at most" else value >= limit
        rows.append([what, float(value), f"{side} {limit:.3f}", "yes" if holds else "**no**"])
    return table(["condition", "found", "wanted", "holds"], rows)


def route_shares(results: Results, contender: str, split: str = "test") -> dict[str, np.ndarray]:
    """Kind of samples to the share of full routes by layer, mean over the lengths."""
    found: dict[str, list[list[float]]] = {}
    for cell, by in results["routes"].items():
        name, kind, _ = cell.split("/")
        if name == split and contender in by:
            found.setdefault(kind, []).append(by[contender]["full_by_layer"])
    return {kind: np.mean(rows, axis=0) for kind, rows in found.items()}


def bits(p: np.ndarray) -> np.ndarray:
    """Entropy of a decision that is full with probability p."""
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))


def information(results: Results, contender: str) -> tuple[float, float]:
    """(entropy within a task, what the route says about the task), bits a layer.

    The second is the entropy of the mean over tasks less the mean of the tasks' entropies: 0 if routing has collapsed
    to one pattern for all.
    """
    shares = np.array(list(route_shares(results, contender).values()))
    within = float(bits(shares).mean())
    return within, float(bits(shares.mean(0)).mean()) - within


def entropies(results: Results) -> str:
    """Both for every contender with routers."""
    names = dict.fromkeys(name for by in results["routes"].values() for name in by)
    header = ["routers", "entropy within a task", "information about the task", "Omega gap"]
    gap = {c: mean(pick(results, c, TEXT, "omega")) - mean(pick(results, c, RETRIEVAL, "omega")) for c in names}
    return table(header, ([name, *information(results, name), gap[name]] for name in names))


def seeds_agree(results: Results, seeds: Sequence[str]) -> str:
    """Pairwise share of (layer, task) with the same majority, and the spread of each column over the seeds."""
    votes = {seed: {k: v > 0.5 for k, v in route_shares(results, seed).items()} for seed in seeds}
    rows: list[list[object]] = []
    for a, b in itertools.combinations(seeds, 2):
        shared = votes[a].keys() & votes[b].keys()
        same = mean([float((votes[a][kind] == votes[b][kind]).mean()) for kind in shared])
        rows.append([f"{a}, {b}: same decisions", same])
    for name, column in COLUMNS.items():
        values = [column(results, seed) for seed in seeds]
        rows.append([f"{name}: mean, spread", f"{mean(values):.3f}, {max(values) - min(values):.3f}"])
    return table(["over the seeds", "found"], rows)


def chunked(parts: Sequence[Results], contender: str) -> str:
    """Exact against chunked routing: equal routes, and what each loses to all full, on the same samples."""
    rows = []
    names = [name for name in contenders(merge(parts)) if name.startswith(f"{contender}@")]
    for name in sorted(names, key=lambda name: int(name.partition("@")[2])):
        for cell, by in sorted(merge(parts, same=(contender, name))["cells"].items(), key=_cell_order):
            both = by[contender], by[name]
            values = [float(part.get(value, np.nan)) for value in ("nll_ratio", "accuracy_diff") for part in both]
            equal = by[name].get("routes_as_exact", np.nan)
            rows.append([cell, int(name.partition("@")[2]), by[name]["samples"], equal, *values])
    header = ["cell", "chunk", "samples", "equal routes", "NLL ratio exact", "chunked"]
    return table([*header, "choice, difference exact", "chunked"], rows)


def chosen_forms(results: Results) -> str:
    """How many facts a cell of `multi-keys` holds: of the numbers tried, the one at which all full chose right most."""
    rows = []
    for cell, tried in sorted(results["forms"].items(), key=_cell_order):
        shares = {_facts(form): share for form, share in tried.items()}
        shown = ", ".join(f"{facts}: {share:.2f}" for facts, share in shares.items())
        rows.append([cell, max(shares, key=lambda facts: shares[facts]), shown])
    return table(["cell", "facts", "all full choose right, by number of facts"], rows)


def _facts(form: str) -> int:
    return int(form.removeprefix("keys") or 10)


def by_depth(results: Results, contender: str) -> str:
    """Choice and NLL ratio by the needle's place."""
    rows = []
    for cell, by in sorted(results["cells"].items(), key=_cell_order):
        for part in by.get(contender, {}).get("by_depth", []):
            rows.append([cell, part["depth"], part["accuracy_base"], part["accuracy"], part["nll_ratio"]])
    return table(["cell", "depth", "full: choice", "choice", "NLL ratio"], rows)


def generation(results: Results) -> str:
    """Exact matches of generated answers."""
    rows = [
        [cell, name, s["samples"], s["exact"], s["as_teacher_forced"]]
        for cell, by in sorted(results["generation"].items(), key=_cell_order)
        for name, s in by.items()
    ]
    return table(["cell", "contender", "samples", "exact", "as teacher forcing says"], rows)


def report(parts: Sequence[Results], ships: str, seeds: Sequence[str]) -> str:
    """The whole text."""
    results = merge(parts)
    shared = merge(parts, same=contenders(results))
    texts = {
        "All contenders, on the same samples": comparison(shared),
        f"What {ships} must hold": targets(results, ships),
        "Facts in a prompt of multi-keys": chosen_forms(results),
        f"{ships}, cell by cell": by_cell(results, ships),
        **({f"{seed}, cell by cell": by_cell(results, seed) for seed in seeds if seed != ships}),
        "Exact and chunked routing": chunked(parts, seeds[0]),
        "Routes and tasks, on the same samples": entropies(shared),
        "Seeds, on the same samples": seeds_agree(merge(parts, same=seeds), seeds) if len(seeds) > 1 else "One seed.",
        f"{ships}, by depth": by_depth(results, ships),
        "Generated answers": generation(results),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in texts.items()) + "\n"


def plot_omega(results: Results, contender: str, path: Path) -> None:
    """Heat map: share of sparse routes by layer and kind of sample."""
    import matplotlib.pyplot as plt

    shares = route_shares(results, contender)
    figure, axis = plt.subplots(figsize=(10, 0.4 * len(shares) + 1.4), layout="constrained")
    image = axis.imshow([1 - share for share in shares.values()], cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axis.set_yticks(range(len(shares)), [f"{kind} ({1 - share.mean():.2f})" for kind, share in shares.items()])
    axis.set_xlabel("layer")
    axis.set_title(f"Share of prompts whose layer is sparse ({contender}; Omega in brackets)")
    figure.colorbar(image)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_quality(results: Results, path: Path) -> None:
    """What is lost against Omega: retrieval and text, a point for each contender that routes exactly."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    names = [name for name in contenders(results) if name != "full" and "@" not in name]
    colours = plt.get_cmap("tab20")
    for axis, kinds, title in zip(axes, (RETRIEVAL, TEXT), ("retrieval", "code and documents"), strict=True):
        for i, name in enumerate(names):
            x, y = mean(pick(results, name, kinds, "omega")), 100 * (mean(pick(results, name, kinds, "nll_ratio")) - 1)
            axis.plot(x, y, "o" if name in _routed(results) else "s", color=colours(i % 20), label=name)
        axis.set_xlabel("Omega")
        axis.set_ylabel("NLL above all layers full, %")
        axis.set_yscale("symlog", linthresh=1.0)
        axis.grid(alpha=0.3)
        axis.set_title(title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _routed(results: Mapping[str, Any]) -> set[str]:
    return {name for by in results["routes"].values() for name in by}


def main(argv: Sequence[str] | None = None) -> None:
    """Console entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of flux_mlx.evaluate")
    parser.add_argument("--ships", required=True, help="contender that ships")
    parser.add_argument("--seeds", nargs="+", required=True, help="contenders that differ by seed")
    parser.add_argument("--out", type=Path, required=True, help="folder of the table and the plots")
    args = parser.parse_args(argv)
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in args.results]
    results = merge(parts)
    (args.out / "training_table.md").write_text(report(parts, args.ships, args.seeds), encoding="utf-8")
    plot_omega(results, args.ships, args.out / "training_omega.png")
    plot_quality(merge(parts, same=contenders(results)), args.out / "training_quality.png")


if __name__ == "__main__":
    main()
