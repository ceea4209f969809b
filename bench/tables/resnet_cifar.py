"""ResNet-20 and ResNet-56 on CIFAR-10: what purification takes away after ADMM, and what that costs.

    python bench/tables/resnet_cifar.py --data DIR --pretrained DIR      # runs what is missing, then writes the table

Every run has a work directory of its own with a checkpoint of each stage: interrupted, it goes on where it was.

    base      published weights, fine-tuned on the images of DIR (whose decoding may differ from the original's)
    admm      filters and columns at once. "separate", as in the papers: every convolution but the first keeps the same
              shares of its filters and of its columns and knows nothing of the others, which leaves dead paths.
              "coupled", as this package does by itself: tied filters together, columns on living channels alone, rates
              by layer for a rate of all weights
    retrain   masked retraining of what ADMM keeps: "before purification"
    control   the same network trained on as long as purification trains: what more training alone does
    purify    thresholds per layer, unused paths, masked fine-tuning, in rounds: "after purification"
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import pathlib
import platform
import statistics
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

import autocompress_fast as acf
from autocompress_fast import data, models
from autocompress_fast.admm import ADMM, Constraint, RhoSchedule
from autocompress_fast.compact import compact
from autocompress_fast.data import batches
from autocompress_fast.pipeline import train
from autocompress_fast.progress import default_progress
from autocompress_fast.rates import Target, allocate
from autocompress_fast.training import Trainer, TrainingConfig, evaluate, evaluate_together
from autocompress_fast.unused import unused_paths

HERE = pathlib.Path(__file__).resolve().parent


@dataclass(frozen=True)
class Setting:
    """What is run; lengths in epochs, `keep` the shares of filters and columns, or the rate of all weights."""

    model: str
    weights: str
    keep: tuple[float, float] | float
    base: int
    admm: int
    retrain: int
    seeds: tuple[int, ...]
    rounds: int  # of purification
    tolerance: float  # points of accuracy before retraining
    tune: int = 8  # after each round of purification

    @property
    def title(self) -> str:
        """For the table."""
        return f"{self.model}, {'separate' if isinstance(self.keep, tuple) else 'coupled'}"


R20, R56 = ("resnet20", "resnet20-12fca82f.th"), ("resnet56", "resnet56-4bfd9763.th")
SETTINGS = {
    "resnet20-separate": Setting(*R20, (0.4, 0.4), 2, 6, 8, (0, 1, 2), rounds=2, tolerance=6.0),
    "resnet56-separate": Setting(*R56, (0.4, 0.4), 1, 4, 6, (0,), rounds=2, tolerance=6.0, tune=6),
    "resnet20-coupled": Setting(*R20, 3.0, 2, 6, 8, (0,), rounds=2, tolerance=6.0),
}
COMMON = {"precision": "bfloat16", "channels_last": True, "weight_decay": 1e-4}


class Run:
    """One network and seed."""

    def __init__(self, name: str, seed: int, options: argparse.Namespace) -> None:
        self.name, self.seed, self.setting = name, seed, SETTINGS[name]
        self.folder = options.runs / f"{name}-seed{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.progress = default_progress()
        self.splits = data.load(options.data, dataset="cifar10", seed=seed)
        moved = self.splits.augmentation
        self.loader = batches(self.splits.train, 128, shuffle=True, seed=seed, augmentation=moved, drop_last=True)
        self.validation = batches(self.splits.validation, 1000)
        self.example = torch.from_numpy(self.splits.validation.normalized(slice(0, 2)))
        model = models.create(self.setting.model)
        models.load_pretrained(model, options.pretrained / self.setting.weights)
        self.model = model.eval()

    def stage(self, model: torch.nn.Module, name: str, config: TrainingConfig, **options: object) -> None:
        """Train in place, with a checkpoint of its own."""
        Trainer(
            model,
            self.loader,
            config,
            validation=self.validation,
            checkpoint=self.folder / f"{name}.ckpt",
            log=self.folder / "log.jsonl",
            name=f"{self.setting.model} seed {self.seed} {name}",
            progress=self.progress,
            **options,
        ).run()

    def base(self) -> torch.nn.Module:
        """The published network, fine-tuned."""
        config = TrainingConfig(self.setting.base, lr=0.01, seed=self.seed, **COMMON)
        return train(self.model, self.splits, config, workdir=self.folder, progress=self.progress).eval()

    def pruned(self, base: torch.nn.Module) -> tuple[torch.nn.Module, acf.Plan, acf.Plan]:
        """After ADMM and masked retraining: the network without its dead filters, its plan, and the plan of ADMM."""
        model = copy.deepcopy(base)
        report = acf.inspect(model, self.example)
        rho, keep = RhoSchedule(1e-2, 2.0, maximum=1.0), self.setting.keep
        if isinstance(keep, tuple):
            convolutions = [layer for layer in report.layers if layer.is_conv][1:]
            counts = {c.name: (round(c.shape[0] * keep[0]), round(c.columns * keep[1])) for c in convolutions}
            admm = ADMM(model, {name: Constraint("filter+column", pair) for name, pair in counts.items()}, rho=rho)
        else:
            constraints = allocate(report, Target(params=keep), report.counts())
            admm = ADMM(model, constraints, rho=rho, report=report)
        config = TrainingConfig(
            self.setting.admm, lr=0.02, schedule="constant", warmup=0.0, seed=self.seed + 1, **COMMON
        )
        self.stage(model, "admm", config, admm=admm)
        plan = admm.plan().tied(report)
        cut = compact(model, plan, self.example, columns=False, report=report)
        config = TrainingConfig(self.setting.retrain, lr=0.05, distillation=0.7, seed=self.seed + 2, **COMMON)
        self.stage(cut.model, "retrain", config, plan=cut.plan, teacher=base)
        return cut.model.eval(), cut.plan, plan

    def tuning(self, number: int) -> TrainingConfig:
        """Of the masked retraining after round `number` of purification, and of the control."""
        return TrainingConfig(self.setting.tune, lr=0.05, distillation=0.7, seed=self.seed + 10 + number, **COMMON)

    def purified(
        self, base: torch.nn.Module, model: torch.nn.Module, plan: acf.Plan
    ) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
        """Purification and masked retraining in rounds; the network, and what every round left."""
        quick = {key: COMMON[key] for key in ("precision", "channels_last")}
        some = batches(self.splits.validation.subset(slice(0, 1000)), 500)
        rounds = []

        def score(net: torch.nn.Module) -> float:
            return evaluate(net, some, **quick).accuracy

        for number in range(1, self.setting.rounds + 1):
            decided, found = self.folder / f"purify{number}.plan.json", self.folder / f"purify{number}.json"
            if not decided.exists():
                tolerance = self.setting.tolerance
                result = acf.purify(model, score, self.example, plan=plan, tolerance=tolerance, progress=self.progress)
                found.write_text(json.dumps(result.to_json(), indent=1))
                result.plan.save(decided)
            plan = acf.Plan.load(decided)
            rounds.append(json.loads(found.read_text()))
            cut = compact(model, plan, self.example, columns=False)
            model, plan = cut.model, cut.plan
            self.stage(model, f"purify{number}", self.tuning(number), plan=plan, teacher=base)
        return compact(model.eval(), plan, self.example).model.eval(), rounds

    def control(self, base: torch.nn.Module, model: torch.nn.Module, plan: acf.Plan) -> torch.nn.Module:
        """The pruned network trained on as purification trains it, with nothing removed."""
        model = copy.deepcopy(model)
        for number in range(1, self.setting.rounds + 1):
            self.stage(model, f"control{number}", self.tuning(number), plan=plan, teacher=base)
        return model.eval()

    def figures(self, *, control: bool) -> dict[str, Any]:
        """Everything, once; the test set is read at the very end."""
        kept = self.folder / "table.json"
        if kept.exists():
            found = json.loads(kept.read_text())
            if not control or "control" in found["accuracy"]["test"]:
                return found
        base = self.base()
        model, plan, first = self.pruned(base)
        networks = {"base": base, "before": model}
        networks["after"], rounds = self.purified(base, model, plan)
        if control:
            networks["control"] = self.control(base, model, plan)
        report = acf.inspect(base, self.example)
        accuracy = {}
        for name, part in {"validation": self.splits.validation, "test": self.splits.test}.items():
            found = evaluate_together(list(networks.values()), batches(part, 1000))
            accuracy[name] = {key: value.accuracy for key, value in zip(networks, found, strict=True)}
        result = {
            "accuracy": accuracy,
            "dense": asdict(report.counts()),
            "before": asdict(report.counts(first)),
            "unused": asdict(report.counts(unused_paths(first, report))),
            "after": rounds[-1]["after"],
            "rounds": rounds,
        }
        kept.write_text(json.dumps(result, indent=1))
        return result


def spread(values: list[float]) -> str:
    """Mean, and standard deviation where there is one."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def table(results: dict[str, dict[int, dict[str, Any]]], options: argparse.Namespace) -> str:
    """The page."""
    lines = [
        "# ResNets on CIFAR-10: purification after ADMM",
        "",
        f"Measured {datetime.date.today()} on {options.machine}, {options.threads} thread a run; autocompress_fast "
        f"{acf.__version__}, torch {torch.__version__}, Python {platform.python_version()}.",
        "The images are a JPEG copy of CIFAR-10; the published weights, which were trained on all 50,000 training",
        "images (so on the validation images as well: validation accuracies of the base are too high), are fine-tuned",
        "on 45,000 of them. The first 1,000 validation images decide what purification removes; the test set is read",
        "once, at the end. Seeds: mean ± standard deviation. Weights without biases and normalisations.",
        "",
        "*before*: filters and columns by ADMM, masked retraining. *separate*, as in the papers: every convolution but",
        "the first keeps 40% of its filters and 40% of its columns, chosen without regard to the others. *coupled*, as",
        "this package does by itself: tied filters together, columns on living channels alone, rates by layer.",
        "*after*: two rounds of purification (columns, channels, filters; at most 6 points of accuracy on those images",
        "before retraining) with unused paths, each followed by as much masked retraining (8 epochs; ResNet-56: 6).",
        "*control*: *before*, trained for as many epochs in the same way, with nothing removed.",
        "",
        "| network | seeds | | test accuracy, % | CONV weights | of the dense | MACs | of the dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        for what in ("base", "before", "control", "after"):
            having = [run for run in runs.values() if what in run["accuracy"]["test"]]
            if not having:
                continue
            size = {"base": "dense", "control": "before"}.get(what, what)
            accuracy = spread([run["accuracy"]["test"][what] for run in having])
            cells = [
                SETTINGS[name].title,
                ", ".join(str(seed) for seed, run in runs.items() if run in having),
                what,
                accuracy,
            ]
            for count in ("conv", "macs"):
                values = [run[size][count] for run in having]
                rate = statistics.mean(run["dense"][count] / run[size][count] for run in having)
                cells += [f"{statistics.mean(values):,.0f}", f"{rate:.2f}x"]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Every run (test accuracy; weights of all layers):", ""]
    for name, runs in results.items():
        for seed, run in runs.items():
            test = ", ".join(f"{what} {value:.2f}" for what, value in run["accuracy"]["test"].items())
            steps = " -> ".join(f"{one['after']['params']:,}" for one in run["rounds"])
            dense, before, unused, after = (run[at]["params"] for at in ("dense", "before", "unused", "after"))
            lines.append(
                f"- {name}, seed {seed}: {test}; {dense:,} dense, {before:,} by ADMM, {unused:,} without unused paths, "
                f"then {steps}: purification removes another {before / after:.2f}x"
            )
    lines += ["", "`python bench/tables/resnet_cifar.py --data DIR --pretrained DIR`", ""]
    return "\n".join(lines)


def main() -> None:
    """Run, and write the table of all that has been run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds CIFAR-10")
    parser.add_argument("--pretrained", type=pathlib.Path, required=True, help="folder with the published weights")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/resnet-cifar"))
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--machine", default=platform.processor() or platform.machine())
    parser.add_argument("--no-control", dest="control", action="store_false", help="leave out the control")
    parser.add_argument("--until", choices=["pruned", "table"], default="table", help="stop each run after that")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for name in options.models:
        for seed in options.seeds or SETTINGS[name].seeds:
            run = Run(name, seed, options)
            if options.until == "pruned":
                run.pruned(run.base())
                continue
            found = run.figures(control=options.control and seed == SETTINGS[name].seeds[0])
            results.setdefault(name, {})[seed] = found
            print(name, seed, found["accuracy"], found["before"], found["after"], file=sys.stderr)
    if results:
        (HERE / "resnet-cifar.json").write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "resnet-cifar.md").write_text(table(results, options))


if __name__ == "__main__":
    main()
