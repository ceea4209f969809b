"""Whether a compressed network is as fast as it was told to be.

    python bench/tables/latency_target.py --data DIR [--model vgg16] [--target "8x faster"] [--images 1500]

A network is trained for a few epochs on some images of CIFAR-10, compressed to the target, and measured: the result in
the engine, the dense network in the engine and in every other runtime that is installed, in turns. It is about the
time alone: so few images make no good network, but what is pruned and measured is as large as with all of them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from dataclasses import asdict
from typing import Any

import torch

import autocompress_fast as acf
from autocompress_fast import data, models
from autocompress_fast.cli.benchmark import measured
from autocompress_fast.pipeline import train
from autocompress_fast.training import TrainingConfig

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from measuring import conditions, table  # noqa: E402

OURS = "autocompress_fast"


def main() -> None:
    """Train, compress, measure; add a row to the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds CIFAR-10")
    parser.add_argument("--model", default="vgg16")
    parser.add_argument("--target", default="8x faster")
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--search", type=int, default=0, help="candidates, see `acf.Recipe`")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/latency-target"))
    parser.add_argument("--note", default="", help="a sentence about the conditions, for the page")
    options = parser.parse_args()
    folder = options.runs / f"{options.model}-{options.target}-{options.search}-{options.images}".replace(" ", "-")

    torch.set_num_threads(options.threads)
    splits = data.load(options.data, dataset="cifar10", seed=0)
    held_out = splits.validation.subset(slice(500))
    few = data.Splits(splits.train.subset(slice(options.images)), held_out, held_out)
    torch.manual_seed(0)
    base = train(models.create(options.model), few, TrainingConfig(4, lr=0.05), workdir=folder)
    recipe = acf.Recipe(search=options.search, admm_epochs=1, retrain_epochs=1, final_epochs=1)
    target = f"{options.target}, threads={options.threads}"
    result = acf.compress(base, few, target=target, recipe=recipe, workdir=folder / "compressed")
    result.save(folder / "compressed.acf")

    found = measured(
        folder / "compressed.acf",
        dense=options.model,
        against=None,
        samples=[1],
        rounds=options.rounds,
        data=None,
        dataset=None,
        seed=0,
        threads=options.threads,
    )
    times = {(row.network, row.runtime): row.median for row in found.rows}
    others = {runtime: seconds for (network, runtime), seconds in times.items() if network == "dense"}
    row = {
        "network": options.model,
        "target": options.target,
        "sizes": {"dense": asdict(result.dense), "small": asdict(result.small)},
        "measured": times["compressed", OURS],
        "dense": others,
        "search": options.search,
        "threads": options.threads,
        "conditions": conditions(options.note),
    }
    page = HERE / "latency-target.json"
    rows = json.loads(page.read_text()) if page.exists() else []
    rows = [old for old in rows if any(old[key] != row[key] for key in ("network", "target", "search", "threads"))]
    page.write_text(json.dumps([*rows, row], indent=1) + "\n")
    page.with_suffix(".md").write_text(text([*rows, row]))


def text(rows: list[dict[str, Any]]) -> str:
    """The page."""
    lines = []
    for row in rows:
        goal, ours = row["sizes"]["small"]["seconds"], row["measured"]
        best = min(row["dense"], key=row["dense"].__getitem__)
        cells = [row["network"], row["target"], str(row["search"]), str(row["threads"])]
        cells += [f"{1e3 * value:.3f}" for value in (row["sizes"]["dense"]["seconds"], goal, ours)]
        cells += [f"{100 * (ours / goal - 1):+.1f}%", f"{1e3 * row['dense'][OURS]:.3f}"]
        cells += [f"{row['dense'][OURS] / ours:.2f}x"]
        cells += [f"{1e3 * row['dense'][best]:.3f} ({best})", f"{row['dense'][best] / ours:.2f}x"]
        cells += [f"{row['sizes']['dense'][what] / row['sizes']['small'][what]:.1f}x" for what in ("params", "macs")]
        lines.append(cells)
    header = ["network", "target", "search", "threads", "dense, predicted", "small, predicted", "small, measured"]
    header += ["off", "dense, ours", "faster", "dense, quickest runtime", "faster than that", "weights", "MACs"]
    return (
        "# Targets of latency\n\n"
        "Milliseconds a call, one image, float32, medians in turns. *Predicted* is what the run went by, from layers\n"
        "timed on the same machine; *off* is measured against predicted. Trained for a few epochs on few images: it\n"
        "is about the time alone. Where the machine has become slower since layers were timed, both networks are:\n"
        "*faster* compares them.\n\n"
        f"{table(header, lines)}\n\n" + "\n".join(f"- {row['network']}: {row['conditions']}" for row in rows) + "\n\n"
        "`python bench/tables/latency_target.py --data DIR`\n"
    )


if __name__ == "__main__":
    main()
