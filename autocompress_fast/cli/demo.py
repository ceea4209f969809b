"""The whole job on scikit-learn's handwritten digits, small enough to watch."""

from __future__ import annotations

from pathlib import Path

from autocompress_fast.admm import RhoSchedule
from autocompress_fast.cli.job import Job, Outcome, threads_set

_TARGET = "8x"
_RECIPE = {
    "rounds": 2,
    "admm_epochs": 20,
    "retrain_epochs": 10,
    "final_epochs": 80,
    "admm_lr": 1e-3,
    "retrain_lr": 2e-3,
    "final_lr": 6e-3,
    "rho": RhoSchedule(1e-2, factor=1.3),
    "distillation": 0.9,
    "batch_size": 64,
    "precision": "float32",
    "channels_last": False,
}


def run_demo(folder: Path, seed: int) -> Outcome:
    """Train, compress, verify, save, read back and run; on one thread, which is fastest for a network this small."""
    with threads_set(1):
        job = Job.prepared(
            "lenet_digits",
            "digits",
            _TARGET,
            dataset=None,
            validation=None,
            augment=True,
            base_augment=True,
            recipe={**_RECIPE, "seed": seed},
            base={},
            checkpoint=None,
            workdir=folder,
        )
        return job.run()
