"""CIFAR-10: whole automatic compressions, beside torch-pruning with as many epochs, and weights of few bits.

    python bench/tables/cifar10.py --data DIR --pretrained DIR      # runs what is missing, then writes the table

Every run has a work directory of its own with a checkpoint of each stage: interrupted, it goes on where it was.

    base            published weights fine-tuned on the images of DIR; where there are none, trained from scratch
    ours            `acf.compress`: rates found by search, ADMM, masked retraining, in rounds; nothing is set by hand
    torch-pruning   its group-norm pruner as in its own benchmark: sparse training for as many epochs as our ADMM has,
                    pruning step by step until the same target is met, as many epochs of the same fine-tuning as ours;
                    rows of a quantized network do without
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import functools
import json
import pathlib
import platform
import re
import statistics
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

import autocompress_fast as acf
from autocompress_fast import data, models
from autocompress_fast.admm import RhoSchedule
from autocompress_fast.cli.benchmark import measured
from autocompress_fast.data import batches
from autocompress_fast.graph import Counts
from autocompress_fast.pipeline import train
from autocompress_fast.progress import default_progress
from autocompress_fast.training import Trainer, TrainingConfig, evaluate_together

_STEPS = 400  # in which torch-pruning goes from all channels to none, as in its own benchmark
HERE = pathlib.Path(__file__).resolve().parent


@dataclass(frozen=True)
class Setting:
    """What is run; lengths in epochs."""

    model: str
    target: str
    base: TrainingConfig
    weights: str | None = None  # published
    recipe: dict[str, Any] = field(default_factory=dict)
    pruned: bool = True  # or quantized
    whole_for_torch_pruning: str = "$^"  # names of layers whose filters it cannot prune
    seeds: tuple[int, ...] = (0,)


_SHARED = {"channels_last": True}
_RECIPE = {
    "optimizer": "sgd",
    "weight_decay": 2e-4,
    "distillation": 0.7,
    "rho": RhoSchedule(1e-2, 1.7, maximum=1.0),
    **_SHARED,
}
_LARGE = _RECIPE | {
    "rounds": 4,
    "search": 60,
    "admm_epochs": 5,
    "retrain_epochs": 2,
    "final_epochs": 60,
    "admm_lr": 0.02,
    "retrain_lr": 0.05,
    "final_lr": 0.1,
}
_RESNET20 = {
    "model": "resnet20",
    "base": TrainingConfig(8, lr=0.02, weight_decay=5e-4, warmup=0.05, compile=True, precision="bfloat16", **_SHARED),
    "weights": "resnet20-12fca82f.th",
}
# Nothing is pruned: one epoch before every portion of the weights.
_QUANTIZED = _SHARED | {"quantize_epochs": 1, "compile": True}
SETTINGS = {
    "ResNet-20": Setting(
        target="conv=4,macs=3",
        recipe=_RECIPE
        | {
            "rounds": 2,
            "search": 64,
            "admm_epochs": 3,
            "retrain_epochs": 1,
            "final_epochs": 60,
            "admm_lr": 0.02,
            "retrain_lr": 0.05,
            "final_lr": 0.1,
        },
        seeds=(0, 1, 2),
        # Shortcuts pad channels by numbers in the code, which torch-pruning does not follow.
        whole_for_torch_pruning=r"conv1$|.*\.conv2$",
        **_RESNET20,
    ),
    "ResNet-20 by shrinking": Setting(
        target="conv=4,macs=3",
        recipe=_SHARED
        | {
            "method": "shrink",
            "optimizer": "sgd",
            "weight_decay": 2e-4,
            "distillation": 0.7,
            "shrink_epochs": 24,
            "shrink_lr": 0.05,
            "final_epochs": 160,
            "final_lr": 0.1,
        },
        # Shortcuts pad channels by numbers in the code, which torch-pruning does not follow.
        whole_for_torch_pruning=r"conv1$|.*\.conv2$",
        **_RESNET20,
    ),
    "ResNet-20, 8-bit weights and activations": Setting(
        target="params=1", recipe=_QUANTIZED | {"activation_bits": 8}, pruned=False, **_RESNET20
    ),
    "ResNet-20, 4-bit weights": Setting(target="params=1", recipe=_QUANTIZED | {"bits": 4}, pruned=False, **_RESNET20),
    "ResNet-20, binary weights": Setting(
        target="params=1", recipe=_QUANTIZED | {"bits": 1, "levels": "binary"}, pruned=False, **_RESNET20
    ),
    "VGG-16": Setting(
        "vgg16",
        "conv=50,macs=8.8",
        TrainingConfig(60, lr=0.1, weight_decay=5e-4, warmup=0.05, **_SHARED),
        recipe=_LARGE,
    ),
    "ResNet-18": Setting(
        "resnet18",
        "conv=54,macs=12",
        TrainingConfig(40, lr=0.1, weight_decay=5e-4, warmup=0.05, **_SHARED),
        recipe=_LARGE,
    ),
}


class Run:
    """One network and seed."""

    def __init__(self, name: str, seed: int, options: argparse.Namespace) -> None:
        self.name, self.seed, self.setting, self.options = name, seed, SETTINGS[name], options
        self.folder = options.runs / f"{self.setting.model}-seed{seed}"  # with the base, which rows share
        self.own = self.folder / re.sub("[^a-z0-9]+", "-", name.lower())
        self.kept = self.own / "table.json"
        self.recipe = acf.Recipe(**self.setting.recipe, seed=seed)

    @functools.cached_property
    def splits(self) -> data.Splits:
        """The images."""
        return data.load(self.options.data, dataset="cifar10", seed=self.seed)

    def base(self) -> torch.nn.Module:
        """The dense network."""
        model = models.create(self.setting.model)
        if self.setting.weights is not None:
            models.load_pretrained(model, self.options.pretrained / self.setting.weights)
        config = dataclasses.replace(self.setting.base, seed=self.seed)
        with default_progress() as told:
            return train(model, self.splits, config, workdir=self.folder, progress=told).eval()

    def ours(self, base: torch.nn.Module) -> tuple[torch.nn.Module, Counts]:
        """Compressed by this package, and written as a file."""
        unread = dataclasses.replace(self.splits, test=self.splits.validation)  # the test set is read once, for all
        result = acf.compress(base, unread, target=self.setting.target, recipe=self.recipe, workdir=self.own / "ours")
        result.save(self.own / "ours.acf")
        return result.model, result.small

    def torch_pruning(self, base: torch.nn.Module) -> tuple[torch.nn.Module, Counts]:
        """Compressed by torch-pruning: sparse training, pruning, fine-tuning."""
        import torch_pruning as tp

        model, example = copy.deepcopy(base), torch.zeros(1, *self.splits.input_shape)
        target, dense = acf.Target.parse(self.setting.target), acf.inspect(base, example).counts()
        rounds, recipe = self.recipe.rounds_for(acf.Target.parse(self.setting.target)), self.recipe

        whole = re.compile(self.setting.whole_for_torch_pruning)
        ignored = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) or whole.match(name)]
        pruner = tp.pruner.GroupNormPruner(
            model,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2, normalizer="max"),
            reg=5e-4,
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=_STEPS,
            ignored_layers=ignored,
        )
        sparse = dataclasses.replace(recipe.training("admm", 0), epochs=recipe.admm_epochs * rounds, distillation=0.0)
        self._trained(_Regularized, model, "tp.sparse", sparse, pruner=pruner)
        while not target.met(dense, acf.inspect(model, example).counts()):
            pruner.step()
        epochs = recipe.final_epochs + (rounds - 1) * recipe.retrain_epochs
        tuned = dataclasses.replace(recipe.training("final", 0), epochs=epochs)
        self._trained(Trainer, model, "tp.final", tuned, teacher=base)
        return model.eval(), acf.inspect(model, example).counts()

    def _trained(self, kind: Any, model: torch.nn.Module, name: str, config: TrainingConfig, **more: Any) -> None:
        moved = self.splits.augmentation
        kind(
            model,
            batches(self.splits.train, 128, shuffle=True, seed=self.seed, augmentation=moved, drop_last=True),
            config,
            validation=batches(self.splits.validation, 1000),
            checkpoint=self.own / f"{name}.ckpt",
            log=self.own / "log.jsonl",
            name=name,
            progress=default_progress(),
            **more,
        ).run()

    def figures(self) -> dict[str, Any]:
        """Everything, once; the test set is read at the very end."""
        if self.kept.exists():
            return dict(json.loads(self.kept.read_text()))
        self.own.mkdir(parents=True, exist_ok=True)
        base = self.base()
        networks, sizes = {"base": base}, {"base": acf.inspect(base, torch.zeros(1, *self.splits.input_shape)).counts()}
        networks["ours"], sizes["ours"] = self.ours(base)
        if self.setting.pruned and not self.options.ours_only:
            networks["torch-pruning"], sizes["torch-pruning"] = self.torch_pruning(base)
        accuracy = {}
        for part in ("validation", "test"):
            found = evaluate_together(list(networks.values()), batches(getattr(self.splits, part), 1000))
            accuracy[part] = {name: value.accuracy for name, value in zip(networks, found, strict=True)}
        accuracy["test"]["the file"] = self.accuracy_of_file()
        log = (self.own / "ours" / "log.jsonl").read_text().splitlines()
        minutes = sum(json.loads(line)["seconds"] for line in log) / 60
        result = {"accuracy": accuracy, "sizes": {k: asdict(v) for k, v in sizes.items()}, "minutes": minutes}
        result["file_bytes"] = (self.own / "ours.acf").stat().st_size
        result["options"] = self.setting.recipe | {"target": self.setting.target}
        result["measured"] = f"{datetime.date.today()} on {self.options.machine}, threads: {self.options.threads}"
        result["versions"] = f"autocompress_fast {acf.__version__}, torch {torch.__version__}"
        self.keep(result)
        return result

    def accuracy_of_file(self) -> float:
        """Of what was saved, in the engine, on the test set."""
        engine, test = acf.load(self.own / "ours.acf"), self.splits.test
        values = test.normalized()
        classes = [engine(values[i : i + 500]).argmax(axis=1) for i in range(0, len(values), 500)]
        return 100 * float(np.mean(np.concatenate(classes) == test.labels))

    def keep(self, result: dict[str, Any]) -> None:
        """In the folder of the run, for the table."""
        self.kept.write_text(json.dumps(result, indent=1, default=asdict))

    def latency(self) -> dict[str, Any]:
        """Of the compressed network in the engine, and of the dense one in its quickest runtime; seconds."""
        options = {"against": None, "samples": [1], "rounds": 100, "data": None, "dataset": None, "seed": 0}
        dense = self.setting.model
        rows = measured(self.own / "ours.acf", dense=dense, threads=self.options.threads, **options).rows
        best = min((row for row in rows[1:] if row.network == "dense"), key=lambda row: row.median)
        return {"ours": rows[0].median, "dense": best.median, "runtime": best.runtime}


class _Regularized(Trainer):
    """A training in which torch-pruning adds its gradient to that of the loss before every step."""

    def __init__(self, *given: Any, pruner: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        pruner.update_regularizer()
        self.optimizer.register_step_pre_hook(lambda *_: pruner.regularize(self.model))


def spread(values: list[float], digits: int = 2) -> str:
    """Mean, and standard deviation where there is one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    """The page."""
    lines = [
        "# CIFAR-10: automatic compression",
        "",
        "The images are a JPEG copy of CIFAR-10: accuracies lie some points below those published. 5,000 training",
        "images decide everything; the test set is read once, at the end, for all networks of a run. Published weights",
        "have seen those 5,000, too, so what a network loses of them is more than what it loses of the test set.",
        "Seeds: mean ± standard deviation. Weights without biases and normalisations. Latencies: one image, one",
        "thread, medians in turns; the dense network in its quickest runtime.",
        "",
        "| network | seeds | | test accuracy, % | drop, points | CONV | all weights | MACs | file, kB | latency, ms | "
        "faster |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        for what in ("base", "ours", "torch-pruning"):
            having = [run for run in runs.values() if what in run["accuracy"]["test"]]
            if not having:
                continue
            test = [run["accuracy"]["test"] for run in having]
            cells = [name, ", ".join(str(seed) for seed, run in runs.items() if run in having), what]
            cells += [spread([a[what] for a in test]), spread([a["base"] - a[what] for a in test])]
            for count in ("conv", "params", "macs"):
                rates = [run["sizes"]["base"][count] / run["sizes"][what][count] for run in having]
                cells.append(f"{statistics.mean(rates):.2f}x")
            cells.append(f"{statistics.mean(run['file_bytes'] for run in having) / 1e3:.1f}" if what == "ours" else "")
            cells += _latency(having, what)
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Every run, and how:", ""]
    for name, runs in results.items():
        for seed, run in runs.items():
            parts = {
                part: ", ".join(f"{what} {value:.2f}" for what, value in values.items())
                for part, values in run["accuracy"].items()
            }
            lines.append(
                f"- {name}, seed {seed}: test {parts['test']}; validation {parts['validation']}; {run['minutes']:.0f} "
                f"minutes of training after the base, {run['measured']}; {run['versions']}"
            )
            lines.append(f"  `{json.dumps(run['options'])}`")
    return "\n".join([*lines, "", "`python bench/tables/cifar10.py --data DIR --pretrained DIR`", ""])


def _latency(runs: list[dict[str, Any]], what: str) -> list[str]:
    """Milliseconds, and how many times quicker than the dense network."""
    timed = [run["latency"] for run in runs if run.get("latency")]
    if not timed or what == "torch-pruning":
        return ["", ""]
    dense = statistics.mean(t["dense"] for t in timed)
    if what == "base":
        return [f"{1e3 * dense:.3f} ({', '.join(sorted({t['runtime'] for t in timed}))})", ""]
    ours = statistics.mean(t["ours"] for t in timed)
    return [f"{1e3 * ours:.3f}", f"{dense / ours:.2f}x"]


def recorded() -> dict[str, dict[int, dict[str, Any]]]:
    """What the table has so far, of runs on other machines too."""
    page = HERE / "cifar10.json"
    kept = json.loads(page.read_text()) if page.exists() else {}
    return {name: {int(seed): run for seed, run in runs.items()} for name, runs in kept.items()}


def main() -> None:
    """Run, and write the table of all that has been run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds CIFAR-10")
    parser.add_argument("--pretrained", type=pathlib.Path, required=True, help="folder with the published weights")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/cifar10"))
    parser.add_argument("--rows", nargs="+", choices=SETTINGS, default=[name for name in SETTINGS if "20" in name])
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--machine", default=platform.processor() or platform.machine())
    parser.add_argument("--ours-only", action="store_true", help="leave out torch-pruning, which takes as long again")
    parser.add_argument("--latency", action="store_true", help="measure latencies, of runs that have finished")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.rows:
        for seed in options.seeds or SETTINGS[name].seeds:
            run = Run(name, seed, options)
            found = run.figures()
            if options.latency:
                found["latency"] = run.latency()
                run.keep(found)
            print(name, seed, found["accuracy"], found["sizes"], file=sys.stderr)
    results = recorded()
    for name, setting in SETTINGS.items():
        for folder in sorted(options.runs.glob(f"{setting.model}-seed*")):
            run = Run(name, int(folder.name.rpartition("seed")[2]), options)
            if run.kept.exists():
                results.setdefault(name, {})[run.seed] = run.figures()
    results = {name: dict(sorted(results[name].items())) for name in SETTINGS if name in results}
    (HERE / "cifar10.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "cifar10.md").write_text(table(results))


if __name__ == "__main__":
    main()
