"""The whole job on scikit-learn's handwritten digits, small enough to watch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from autocompress_fast.cli.job import Job, Outcome, threads_set
from autocompress_fast.data import Augmentation

_TARGET = "8x"
_RECIPE = {
    "rounds": 2,
    "admm_epochs": 20,
    "retrain_epochs": 10,
    "final_epochs": 80,
    "admm_lr": 1e-3,
    "retrain_lr": 2e-3,
    "final_lr": 6e-3,
    "distillation": 0.9,
    "batch_size": 64,
    "precision": "float32",
    "channels_last": False,
}
_AUGMENTATION = Augmentation(rotation=5, scale=0.05)  # 1,146 images are few


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
            recipe={**_RECIPE, "seed": seed},
            base={},
            checkpoint=None,
            workdir=folder,
        )
        varied = dataclasses.replace(job.data, augmentation=_AUGMENTATION)
        return dataclasses.replace(job, data=varied, base_data=varied).run()
