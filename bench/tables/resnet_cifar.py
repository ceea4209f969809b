"""ResNet-20 and ResNet-56 on CIFAR-10: what purification takes away after ADMM, and what that costs.

    python bench/tables/resnet_cifar.py --data DIR --pretrained DIR      # runs what is missing, then writes the table

Every run has a work directory of its own with a checkpoint of each stage: interrupted, it goes on where it was.

    base      published weights, fine-tuned on the images of DIR (whose decoding may differ from the original's)
    admm      filters and columns at once, as in the papers: every convolution but the first keeps the same shares of
              its filters and of its columns and knows nothing of the others, which leaves dead paths
    retrain   masked retraining of what ADMM keeps: "before purification"
    control   the same network trained on as long as purification trains: what more training alone does (--control)
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
from autocompress_fast.training import Trainer, TrainingConfig, evaluate, evaluate_together
from autocompress_fast.unused import unused_paths

HERE = pathlib.Path(__file__).resolve().parent


@dataclass(frozen=True)
class Setting:
    """What is run; lengths in epochs."""

    model: str
    weights: str
    filters: float  # share that every layer keeps
    columns: float
    base: int
    admm: int
    retrain: int
    seeds: tuple[int, ...]
    rounds: int = 1  # of purification
    tolerance: float = 3.0  # points of accuracy before retraining
    tune: int = 5  # after each round of purification


R20, R56 = ("resnet20", "resnet20-12fca82f.th"), ("resnet56", "resnet56-4bfd9763.th")
SETTINGS = {
    "ResNet-20": Setting(*R20, filters=0.3, columns=0.8, base=2, admm=5, retrain=6, seeds=(0, 1, 2)),
    "ResNet-56": Setting(*R56, filters=0.3, columns=0.8, base=1, admm=4, retrain=5, seeds=(0,), tune=4),
}
COMMON = {"precision": "bfloat16", "channels_last": True, "compile": True, "weight_decay": 1e-4}


class Run:
    """One network and seed."""

    def __init__(self, name: str, seed: int, options: argparse.Namespace) -> None:
        self.name, self.seed, self.setting = name, seed, SETTINGS[name]
        self.folder = options.runs / f"{self.setting.model}-seed{seed}"
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
        layers = [layer for layer in report.layers if layer.is_conv][1:]
        shares = self.setting.filters, self.setting.columns
        counts = {c.name: (round(c.shape[0] * shares[0]), round(c.columns * shares[1])) for c in layers}
        constraints = {name: Constraint("filter+column", pair) for name, pair in counts.items()}
        admm = ADMM(model, constraints, rho=RhoSchedule(1e-2, 2.0, maximum=1.0))
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
        "*before*: after ADMM and masked retraining; every convolution but the first keeps 30% of its filters and 80%",
        "of its columns, as in the papers without regard to the other layers. *unused*: the same network without its",
        "unused paths, which computes the same. *after*: one round of purification (columns, channels, filters; at",
        "most 3 points of accuracy on those images before retraining) and masked retraining.",
        *(
            ["*control*: *before*, trained for as many epochs in the same way, with nothing removed."]
            if any("control" in run["accuracy"]["test"] for runs in results.values() for run in runs.values())
            else []
        ),
        "",
        "| network | seeds | | test accuracy, % | CONV weights | of the dense | MACs | of the dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        for what in ("base", "before", "unused", "control", "after"):
            network = {"unused": "before"}.get(what, what)
            having = [run for run in runs.values() if network in run["accuracy"]["test"]]
            if not having:
                continue
            size = {"base": "dense", "control": "unused"}.get(what, what)
            accuracy = spread([run["accuracy"]["test"][network] for run in having])
            cells = [
                name,
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
                f"then {steps}: unused paths are {before / unused:.2f}x, with purification {before / after:.2f}x"
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
    parser.add_argument("--control", action="store_true", help="also run the control, of the first seed")
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
