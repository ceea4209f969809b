"""LeNet-5 on MNIST: the compressions of the table in lenet5-mnist.md, three seeds each.

    python bench/tables/lenet5_mnist.py --data DIR          # runs what is missing, then writes the table

Every run is one `autocompress compress` command with a work directory of its own: interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import pathlib
import platform
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent

# For networks of a few thousand weights: nothing but the classes is asked of them, they train long, with dropout. What
# is pruned shrinks while they train, which finds the rates of the layers.
LONG = ["--method", "shrink", "--distillation", "0", "--precision", "float32"]
TINY = [*LONG, "--rounds", "2", "--shrink-epochs", "40", "--final-epochs", "100", "--final-lr", "5e-3"]
TINY += ["--dropout", "0.1"]
SHRUNK = [*LONG, "--structure", "element", "--shrink-epochs", "60", "--final-epochs", "120", "--final-lr", "3e-3"]

# name -> (what it is, target, further options)
ROWS = {
    "structured-40x": (
        "filters + columns, CONV 40x",
        "conv=40,params=8",
        ["--no-base-augment", "--final-epochs", "40"],
    ),
    "structured-88x": (
        "filters + columns, CONV 88x",
        "conv=88,params=12",
        ["--admm-epochs", "6", "--final-epochs", "30"],
    ),
    "irregular-100x": (
        "single weights, all 100x",
        "params=100",
        ["--structure", "element", "--rounds", "2", "--final-epochs", "30"],
    ),
    "tiny-40x": ("filters + columns, CONV 40x, all 60x", "conv=40,params=60", ["--no-base-augment", *TINY]),
    "tiny-88x": ("filters + columns, CONV 88x, all 60x", "conv=88,params=60", TINY),
    "tiny-232x": ("filters + columns, CONV 232x, all 60x", "conv=232,params=60", TINY),
    "tiny-232x-4bit": (
        "filters + columns, CONV 232x, all 60x, CONV weights of 4 bits",
        "conv=232,params=60",
        [*TINY, "--bits", "conv*=4"],
    ),
    "irregular-240x-4bit": (
        "single weights, all 240x, those of 4 bits",
        "params=240",
        [*SHRUNK, "--bits", "4"],
    ),
    "irregular-280x": ("single weights, all 280x", "params=280", SHRUNK),
    "irregular-350x": ("single weights, all 350x", "params=350", SHRUNK),
    "binary": (
        "nothing; every weight -s or +s",
        "params=1",
        ["--bits", "1", "--levels", "binary", "--quantize-epochs", "4", "--no-augment"],
    ),
}


def command(row: str, seed: int, options: argparse.Namespace) -> list[str]:
    _, target, further = ROWS[row]
    return [
        *("autocompress", "compress", "lenet5", "--data", options.data, "--dataset", "mnist", "--target", target),
        *(*further, "--seed", str(seed), "--threads", str(options.threads)),
        *("--workdir", str(options.runs / f"{row}-seed{seed}"), "--json"),
    ]


def run(row: str, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """The figures of one run; measured anew unless it has finished before."""
    workdir = options.runs / f"{row}-seed{seed}"
    kept = workdir / "table.json"
    if not kept.exists():
        done = subprocess.run(command(row, seed, options), check=True, stdout=subprocess.PIPE, text=True)
        kept.write_text(json.dumps(json.loads(done.stdout), indent=1))
    epochs = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    figures = json.loads(kept.read_text()) | {"training_seconds": sum(epoch["seconds"] for epoch in epochs)}
    figures.pop("history"), figures.pop("file")
    print(row, seed, figures["accuracy"], figures["rates"], f"{figures['training_seconds']:.0f} s", file=sys.stderr)
    return figures


def spread(values: list[float], digits: int = 2) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(results: dict[str, list[dict[str, object]]], options: argparse.Namespace) -> str:
    import torch

    import autocompress_fast

    lines = [
        "# LeNet-5 (20-50-500-10, 430.5K weights) on MNIST",
        "",
        f"Measured {datetime.date.today()} on {options.machine}, {options.threads} thread a run, "
        f"{options.jobs} runs at a time; autocompress_fast {autocompress_fast.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}. Seeds {', '.join(map(str, options.seeds))}: mean ± standard deviation.",
        "5,000 training images decide everything; the test set is read once, at the end of each run. Training images",
        "are moved by up to one pixel, except where a command says --no-augment (compression) or --no-base-augment",
        "(base). Weights are counted without biases. Minutes are of all trainings, that of the base included.",
        "",
        "| pruned | base, test % | small, test % | drop, points | CONV | all weights | MACs | .acf, KB | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, figures in results.items():
        accuracy = [f["accuracy"] for f in figures]
        rates = {name: [f["rates"][name] for f in figures] for name in ("conv", "params", "macs")}
        lines.append(
            f"| {ROWS[row][0]} | {spread([a['base_test'] for a in accuracy])} "
            f"| {spread([a['final_test'] for a in accuracy])} "
            f"| {spread([a['base_test'] - a['final_test'] for a in accuracy])} "
            + "".join(f"| {statistics.mean(rates[name]):.1f}x " for name in ("conv", "params", "macs"))
            + f"| {statistics.mean([f['bytes'] for f in figures]) / 1e3:.1f} "
            f"| {statistics.mean([f['training_seconds'] for f in figures]) / 60:.1f} |"
        )
    lines += ["", "Every run (base test % -> small test %, CONV rate, all rate):", ""]
    for row, figures in results.items():
        for seed, f in zip(options.seeds, figures, strict=True):
            a, r = f["accuracy"], f["rates"]
            lines.append(
                f"- {row}, seed {seed}: {a['base_test']:.2f} -> {a['final_test']:.2f}, {r['conv']:.1f}x, "
                f"{r['params']:.1f}x, engine on the saved file {f['engine']['accuracy']:.2f}"
            )
    shown = argparse.Namespace(**{**vars(options), "data": "DIR", "runs": pathlib.Path("runs")})
    lines += ["", "Commands (seed 0):", "", "```"]
    lines += [" ".join(command(row, 0, shown)) for row in results]
    chosen = "" if set(results) == set(ROWS) else f" --rows {' '.join(results)} --name {options.name}"
    lines += ["```", "", f"All of them, and this table: `python bench/tables/lenet5_mnist.py --data DIR{chosen}`.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds MNIST")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/lenet5-mnist"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--name", default="lenet5-mnist", help="of the table's files, beside this one")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    parser.add_argument("--machine", default=platform.processor() or platform.machine())
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        running = {row: [pool.submit(run, row, seed, options) for seed in options.seeds] for row in options.rows}
        results = {row: [future.result() for future in futures] for row, futures in running.items()}
    (HERE / f"{options.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / f"{options.name}.md").write_text(table(results, options))


if __name__ == "__main__":
    main()
