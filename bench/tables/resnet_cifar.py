"""ResNet-20 and ResNet-56 on CIFAR-10: what purification takes away after ADMM, and what that costs.

    python bench/tables/resnet_cifar.py --data DIR --pretrained DIR      # runs what is missing, then writes the table

Every run has a work directory of its own with a checkpoint of each stage: interrupted, it goes on where it was.

    base      published weights, fine-tuned on the images of DIR (whose decoding may differ from the original's)
    admm      filters and columns at once, to `target` of all weights
    retrain   masked retraining of what ADMM keeps: "before purification"
    control   the same network trained on as long as purification trains: what more training alone does
    purify    thresholds per layer, unused paths, masked fine-tuning, in rounds: "after purification"
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import sys
from dataclasses import dataclass

import torch

import autocompress_fast as acf
from autocompress_fast import data, models
from autocompress_fast.admm import ADMM, RhoSchedule
from autocompress_fast.compact import compact
from autocompress_fast.data import batches
from autocompress_fast.pipeline import train
from autocompress_fast.progress import default_progress
from autocompress_fast.rates import Target, allocate
from autocompress_fast.training import Trainer, TrainingConfig

HERE = pathlib.Path(__file__).resolve().parent


@dataclass(frozen=True)
class Setting:
    """What is run for one network; lengths in epochs."""

    weights: str
    target: float
    base: int
    admm: int
    retrain: int
    seeds: tuple[int, ...]


SETTINGS = {
    "resnet20": Setting("resnet20-12fca82f.th", 3.0, 2, 6, 8, (0, 1, 2)),
    "resnet56": Setting("resnet56-4bfd9763.th", 4.0, 1, 4, 6, (0,)),
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
        model = models.create(name)
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
            name=f"{self.name} seed {self.seed} {name}",
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
        constraints = allocate(report, Target(params=self.setting.target), report.counts())
        admm = ADMM(model, constraints, rho=RhoSchedule(1e-2, 2.0, maximum=1.0), report=report)
        config = TrainingConfig(
            self.setting.admm, lr=0.02, schedule="constant", warmup=0.0, seed=self.seed + 1, **COMMON
        )
        self.stage(model, "admm", config, admm=admm)
        plan = admm.plan()
        cut = compact(model, plan, self.example, columns=False, report=report)
        config = TrainingConfig(self.setting.retrain, lr=0.05, distillation=0.7, seed=self.seed + 2, **COMMON)
        self.stage(cut.model, "retrain", config, plan=cut.plan, teacher=base)
        return cut.model.eval(), cut.plan, plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds CIFAR-10")
    parser.add_argument("--pretrained", type=pathlib.Path, required=True, help="folder with the published weights")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/resnet-cifar"))
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.models:
        for seed in options.seeds or SETTINGS[name].seeds:
            run = Run(name, seed, options)
            base = run.base()
            model, plan, first = run.pruned(base)
            print(name, seed, first.dense_weights / first.weights, file=sys.stderr)


if __name__ == "__main__":
    main()
