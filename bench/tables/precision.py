"""What bfloat16 and 8 bits cost a trained network, in the engine and in the torch module that simulates it.

    python bench/tables/precision.py --data DIR --checkpoint FILE [--model resnet20] [--test]

8-bit ranges come from training samples. Validation images decide everything; --test reads the test set too, for the
last line of a table only. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np
import torch

import autocompress_fast as acf
from autocompress_fast import data, models

SAMPLES = 500  # at once


def logits(run: object, samples: data.Dataset) -> np.ndarray:
    """Of all samples, as their normalised values come."""
    assert callable(run)
    values = samples.normalized()
    return np.concatenate([np.asarray(run(values[i : i + SAMPLES])) for i in range(0, len(values), SAMPLES)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds CIFAR-10")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the samples that set ranges")
    parser.add_argument("--test", action="store_true")
    options = parser.parse_args()

    splits = data.load(options.data, dataset="cifar10", seed=options.seed)
    model = models.create(options.model).eval()
    models.load_pretrained(model, options.checkpoint)
    wide = acf.compile(model, torch.zeros(1, 3, 32, 32))
    small = acf.quantize(wide, splits.train)
    engines = {"float32": wide, "int8": small}
    engines["int8, residuals in float32"] = acf.quantize(wide, splits.train, residual_bits=32)
    if acf.show_config()["bfloat16_units"]:
        engines["bfloat16"] = acf.compile(model, torch.zeros(1, 3, 32, 32), precision="bfloat16")
    simulated = acf.simulate(small).eval()

    figures: dict[str, object] = {"model": options.model, "checkpoint": options.checkpoint.name}
    for name in ("validation", "test") if options.test else ("validation",):
        samples = getattr(splits, name)
        made = {precision: logits(engine, samples).argmax(axis=1) for precision, engine in engines.items()}
        with torch.no_grad():
            made["int8, simulated"] = logits(lambda x: simulated(torch.from_numpy(x)).numpy(), samples).argmax(axis=1)
        right = {precision: 100 * float(np.mean(classes == samples.labels)) for precision, classes in made.items()}
        agree = 100 * float(np.mean(made["int8"] == made["int8, simulated"]))
        figures[name] = {"right_percent": right, "int8_agrees_with_simulation_percent": agree, "images": len(samples)}
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
