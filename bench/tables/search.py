"""What a search for the layers' rates finds, beside rules and beside chance, at equal numbers of evaluations.

    python bench/tables/search.py --data DIR --checkpoint FILE [--model resnet20]    # runs what is missing

All methods meet the same budgets of CONV weights exactly (`rates.allocate`), with filters and columns pruned at once.

    uniform       every layer keeps the same share of its weights
    global        one threshold for the root mean squares of all filters and columns of the network
    experience    larger layers lose more (`allocate` as it is)
    random        random departures from experience; the best of as many as the search has
    search        `acf.Search`

`random` and `search` see the same loss on some of the validation samples: of the network pruned in one shot, trained
with its masks for --steps steps (0: none), its normalisations recalibrated. All other figures are of other validation
samples; the test set is never read. All networks are then trained with their masks from the start, in the same short
way (--epochs 0 leaves that out). The folder of --runs keeps the trace of every search and every training, so a run that
was stopped goes on where it was; the table is written anew after every result.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import pathlib
import platform
import statistics
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import autocompress_fast as acf
from autocompress_fast import data, models
from autocompress_fast._files import write_atomically
from autocompress_fast.admm import Constraint
from autocompress_fast.data import UserBatches, batches
from autocompress_fast.graph import Report
from autocompress_fast.plan import mask
from autocompress_fast.rates import Action, Target, allocate
from autocompress_fast.search import Search, one_shot, quick_score
from autocompress_fast.training import Trainer, TrainingConfig, evaluate

HERE = pathlib.Path(__file__).resolve().parent
RULES, SEARCHED = ("uniform", "global", "experience"), ("random", "search")
DEPARTURE = 0.3  # of random search, the best of 0.15, 0.3 and 0.6
QUICK = {"precision": "bfloat16", "channels_last": True}

COMMAND = (
    "`python bench/tables/search.py --model {model} --data DIR --checkpoint FILE --evaluations {evaluations} --samples "
    "{samples} --others {others} --calibration {calibration} --steps {steps} --lr {lr} "
    "--epochs {epochs} --images {images}`"
)

Constraints = dict[str, Constraint]


class Bench:
    """The network, its data, and the results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        options.runs.mkdir(parents=True, exist_ok=True)
        self.file = options.runs / "results.json"
        self.results: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        model = models.create(options.model)
        models.load_pretrained(model, options.checkpoint)
        self.model = model.eval()
        self.splits = data.load(options.data, dataset="cifar10", seed=0)
        validation = self.splits.validation
        seen, others = slice(0, options.samples), slice(options.samples, options.samples + options.others)
        self.seen = UserBatches(list(batches(validation.subset(seen), 250).epoch(0)))
        self.others = batches(validation.subset(others), 250)
        self.rest = batches(validation.subset(slice(options.samples, len(validation))), 1000)
        training = batches(self.splits.train, 128, shuffle=True, seed=0, drop_last=True)
        self.report = acf.inspect(self.model, torch.from_numpy(validation.normalized(slice(0, 2))))
        self.calibration = list(itertools.islice(training.epoch(0), options.calibration))
        moved = batches(
            self.splits.train, 128, shuffle=True, seed=1, augmentation=self.splits.augmentation, drop_last=True
        )
        self.score = quick_score(
            self.model,
            self.report,
            self.seen,
            calibration=self.calibration,
            train=moved,
            retrain_steps=options.steps,
            training=TrainingConfig(1, lr=options.lr, weight_decay=0.0, **QUICK),
            measure="loss",
            **QUICK,
        )

    def keep(self, key: str, **values: float) -> None:
        """Add to the results, and write them."""
        self.results.setdefault(key, {}).update(values)
        write_atomically(self.file, json.dumps(self.results, indent=1).encode())
        print(key, values, file=sys.stderr, flush=True)
        write_table(self)

    def base(self) -> None:
        """The dense network."""
        if "dense" not in self.results:
            self.keep("dense", final=evaluate(self.model, self.rest, **QUICK).accuracy)

    def one(self, rate: float, method: str, seed: int) -> None:
        """The rates of one method, and what they are worth by the score."""
        key = f"{rate:g} {method} {seed}"
        if "accuracy" not in self.results.get(key, {}):
            constraints = self.found(rate, method, seed)
            model = self.score.network(constraints)
            seen, others = (evaluate(model, part, **QUICK) for part in (self.seen, self.others))
            self.keep(key, quick=seen.loss, others=others.loss, accuracy=others.accuracy)

    def retrained(self, rate: float, method: str, seed: int) -> None:
        """Its accuracy after a short masked training."""
        key = f"{rate:g} {method} {seed}"
        if "final" in self.results[key]:
            return
        plan = one_shot(self.model, self.report, self.found(rate, method, seed))
        model = mask(self.model, plan)
        some = self.splits.train.subset(slice(0, self.options.images))
        moved = self.splits.augmentation
        loader = batches(some, 128, shuffle=True, seed=seed, augmentation=moved, drop_last=True)
        config = TrainingConfig(self.options.epochs, lr=0.05, weight_decay=1e-4, seed=seed, **QUICK)
        checkpoint = self.options.runs / f"{key.replace(' ', '-')}.ckpt"
        Trainer(model, loader, config, plan=plan, checkpoint=checkpoint, name=key).run()
        self.keep(key, final=evaluate(model, self.rest, **QUICK).accuracy)

    def found(self, rate: float, method: str, seed: int) -> Constraints:
        """The constraints of a method."""
        target, dense = Target(conv=rate), self.report.counts()
        if method == "uniform":
            return allocate(self.report, target, dense, alpha=0.0)
        if method == "global":
            return allocate(self.report, target, dense, action=globally_ranked(self.report, target))
        if method == "experience":
            return allocate(self.report, target, dense)
        trace = self.options.runs / f"{rate:g}-{method}-{seed}.jsonl"
        if method == "random":
            return random_search(self.report, target, self.score, self.options.evaluations, seed, trace)
        search = Search(self.report, target, self.score, seed=seed, trace=trace)
        return search.run(self.options.evaluations).constraints


def globally_ranked(report: Report, target: Target) -> Action:
    """The shares of the layers that lie above one threshold for all filters and columns."""
    norms: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for layer in report.layers:
        weight = np.asarray(report.weight(layer.name)).reshape(layer.shape[0], -1)
        rows, columns = (np.sqrt((weight**2).mean(axis=axis)) for axis in (1, 0))
        norms[layer.name] = rows, columns

    def kept(threshold: float) -> dict[str, float]:
        shares = {n: (rows >= threshold).mean() * (columns >= threshold).mean() for n, (rows, columns) in norms.items()}
        return {layer.name: max(1.0, float(shares[layer.name]) * layer.weights) for layer in report.layers}

    low, high = 0.0, max(float(rows.max()) for rows, _ in norms.values())
    budget = report.counts().conv / target.rates()["conv"]
    for _ in range(50):
        middle = (low + high) / 2
        fits = sum(n for name, n in kept(middle).items() if report[name].is_conv) <= budget
        low, high = (low, middle) if fits else (middle, high)
    sizes = kept(high)
    alpha = 0.55  # that of `allocate`, whose part is taken out of the action again
    return Action({layer.name: math.log(sizes[layer.name] / layer.weights ** (1 - alpha)) for layer in report.layers})


def random_search(
    report: Report,
    target: Target,
    score: Callable[[Constraints], float],
    evaluations: int,
    seed: int,
    trace: pathlib.Path,
) -> Constraints:
    """The best of experience and random departures from it."""
    search = Search(report, target, score)
    lines = trace.read_text().splitlines() if trace.exists() else []
    known = [json.loads(line) for line in lines]
    random, best = np.random.default_rng(seed), (-math.inf, search.constraints(Action()))
    for number in range(evaluations):
        drawn = random.normal(0, DEPARTURE if number else 0.0, len(search.coordinates)).tolist()
        parts: dict[str, dict[str, float]] = {"weights": {}, "filters": {}}
        for (kind, name), value in zip(search.coordinates, drawn, strict=True):
            parts[kind][name] = value
        constraints = search.constraints(Action(**parts))
        if number >= len(known):
            known.append(score(constraints))
            with trace.open("a") as file:
                file.write(json.dumps(known[-1]) + "\n")
        best = max(best, (known[number], constraints), key=lambda one: one[0])
    return best[1]


def spread(values: list[float], digits: int) -> str:
    """Mean, and standard deviation where there is one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def write_table(bench: Bench) -> None:
    """The page, of all that is there."""
    options, results = bench.options, bench.results
    name = (
        "search" + ("" if options.model == "resnet20" else f"-{options.model}") + ("" if options.steps else "-one-shot")
    )
    trained = f"after {options.steps} steps of masked training in batches of 128" if options.steps else "in one shot"
    text = (
        f"Measured {datetime.date.today()} on {options.machine}, 1 thread; autocompress_fast {acf.__version__}, torch "
        f"{torch.__version__}, Python {platform.python_version()}. Filters and columns pruned at once; every method "
        "meets the budget of CONV weights exactly. Random search (the best of random departures from experience) and "
        f"the search have {options.evaluations} evaluations each, by the loss on {options.samples} validation images "
        f"{trained}, normalisations recalibrated on {128 * options.calibration} training images. *loss*: on those, "
        f"and on {options.others} others, which no method sees; *accuracy*: on the others, in percent; *after "
        "training*: validation accuracy (without the images that were searched on) after masked training from the "
        f"start, the same for all (epochs: {options.epochs}, of {options.images} training images). Mean ± standard "
        "deviation over the seeds of the searches; the rules have no seed. A dash: not run. The test set is not read. "
        f"{options.note}"
    )
    if "dense" in results:
        text += f" The dense network has {results['dense']['final']:.1f}% of the validation images not searched on."
    lines = [
        f"# What the search finds: {options.model} on CIFAR-10",
        "",
        *textwrap.wrap(text, 118),
        "",
        "| CONV weights | method | seeds | loss, searched on | loss, others | accuracy, others | after training |",
        "|---|---|---|---|---|---|---|",
    ]
    for rate in sorted(options.rates):
        for method in RULES + SEARCHED:
            runs = {key.split()[2]: run for key, run in results.items() if key.startswith(f"{rate:g} {method} ")}
            if not runs:
                continue
            cells = [f"{rate:g}x", method, ", ".join(runs) if method in SEARCHED else ""]
            for what, digits in (("quick", 3), ("others", 3), ("accuracy", 1), ("final", 1)):
                values = [run[what] for run in runs.values() if what in run]
                few = f" ({len(values)} of {len(runs)} seeds)" if method in SEARCHED and len(values) < len(runs) else ""
                cells.append(spread(values, digits) + few if values else "-")
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", COMMAND.format(**vars(options)), ""]
    settings = {key: value for key, value in vars(options).items() if key not in ("data", "checkpoint", "runs")}
    (HERE / f"{name}.json").write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    (HERE / f"{name}.md").write_text("\n".join(lines))


def main() -> None:
    """Run what is missing, budget by budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds CIFAR-10")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--checkpoint", required=True, help="trained weights of the model")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/search"))
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0, 3.0, 5.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--samples", type=int, default=500, help="validation images that are searched on")
    parser.add_argument("--others", type=int, default=2000)
    parser.add_argument("--calibration", type=int, default=2, help="batches of 128 training images")
    parser.add_argument("--steps", type=int, default=25, help="of masked training before a score is read")
    parser.add_argument("--lr", type=float, default=0.05, help="peak learning rate of these")
    parser.add_argument("--epochs", type=int, default=1, help="of masked training")
    parser.add_argument("--images", type=int, default=10000, help="of an epoch")
    parser.add_argument("--machine", default=platform.processor() or platform.machine())
    parser.add_argument("--note", default="", help="a sentence on the network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options)
    bench.base()
    for seed in options.seeds:
        for rate in options.rates:
            methods = (*(RULES if seed == options.seeds[0] else ()), *SEARCHED)
            for method in methods:
                bench.one(rate, method, seed)
            for method in methods if options.epochs else ():
                bench.retrained(rate, method, seed)


if __name__ == "__main__":
    main()
