"""One compression from the command line: from the names of a network and a data set to files in a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress_fast import data as datasets
from autocompress_fast import models
from autocompress_fast._files import write_atomically
from autocompress_fast.bits import Bits
from autocompress_fast.config import show_config
from autocompress_fast.data import Augmentation, Dataset, Splits
from autocompress_fast.engine import load
from autocompress_fast.graph import Pattern, Report, inspect
from autocompress_fast.models import load_pretrained
from autocompress_fast.pipeline import DryRun, Recipe, Result, compress, meter_for, train
from autocompress_fast.progress import default_progress
from autocompress_fast.rates import Target, allocate
from autocompress_fast.report import Document, Inspection, Outlook, Table
from autocompress_fast.training import TrainingConfig

_BATCH = 500  # images that go through the engine at once
_MOST_VALIDATION = 5000  # unless the user says otherwise


@dataclass(frozen=True)
class Base:
    """How a network is trained before it is compressed."""

    config: TrainingConfig
    batch_size: int = 128


_SMALL_BASE = Base(TrainingConfig(8, "adam", 2e-3, weight_decay=1e-2))
_BASES = {
    "lenet5": _SMALL_BASE,
    "lenet300": Base(TrainingConfig(15, "adam", 2e-3, weight_decay=1e-2)),
    "lenet_digits": Base(TrainingConfig(40, "adam", 3e-3, weight_decay=0.1, label_smoothing=0.05), batch_size=64),
}
_CIFAR_BASE = Base(TrainingConfig(60, "sgd", 0.1, weight_decay=5e-4, warmup=0.05))


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that a run needs."""

    model: nn.Module
    data: Splits
    base_data: Splits  # the same images, varied or not while the base is trained
    target: Target | None
    recipe: Recipe
    base: Base | None  # None: the model comes trained
    folder: Path
    select: list[Pattern] | None = None
    exclude: list[Pattern] | None = None
    max_drop: float | None = None

    @classmethod
    def prepared(
        cls,
        model: str,
        data: str,
        target: str | None,
        *,
        max_drop: float | None = None,
        dataset: str | None,
        validation: str | None,
        augment: bool,
        elastic: float = 0.0,
        base_augment: bool = True,
        recipe: Mapping[str, Any],
        base: Mapping[str, Any],
        checkpoint: Path | None,
        workdir: Path | None,
        select: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> Job:
        """Check all that was asked for, before anything is trained or written.

        Args:
            model, data, target, max_drop: as the user wrote them.
            recipe, base: fields of `Recipe` and `TrainingConfig` that differ from the defaults.
            augment, base_augment: vary the training images as usual for the data set, while compressing and while the
                base is trained.
            elastic: distort them as well while compressing (`Augmentation`).
            select, exclude: patterns as the user wrote them.
        """
        if target is None and max_drop is None:
            raise ValueError("compress needs --target, such as --target 20x, or --max-drop, or both")
        goal = None if target is None else Target.parse(target)
        whole = Recipe(**recipe)
        splits = datasets.load(data, dataset=dataset, validation=_size(validation), seed=whole.seed)
        if validation is None and len(splits.validation) > _MOST_VALIDATION:
            splits = datasets.load(data, dataset=dataset, validation=_MOST_VALIDATION, seed=whole.seed)
        still = dataclasses.replace(splits, augmentation=None)
        varied = splits
        if elastic > 0:
            if not augment:
                raise ValueError(f"--elastic {elastic:g} and --no-augment contradict each other")
            usual = splits.augmentation or Augmentation()
            varied = dataclasses.replace(splits, augmentation=dataclasses.replace(usual, elastic=elastic))
        network = build(model, splits, whole.seed)
        given: Base | None = None
        if checkpoint is None:
            given = base_recipe(model, whole, base)
        else:
            if base:
                raise ValueError("--base-epochs and --base-lr train the network that --checkpoint gives already")
            load_pretrained(network, checkpoint)
        folder = Path("runs", run_name(model, splits.name, goal, max_drop, whole)) if workdir is None else workdir
        return cls(
            network,
            varied if augment else still,
            splits if base_augment else still,
            goal,
            whole,
            given,
            folder,
            patterns(select, network),
            patterns(exclude, network),
            max_drop,
        )

    def outlook(self) -> Outlook | Impossible:
        """What would happen."""
        report = self._report()
        try:
            self._check_target(report)
        except ValueError as error:
            return Impossible(str(error))
        dry_run = compress(
            self.model,
            self.data,
            target=self.target,
            max_drop=self.max_drop,
            recipe=self.recipe,
            dry_run=True,
            select=self.select,
            exclude=self.exclude,
        )
        assert isinstance(dry_run, DryRun)
        return Outlook(dry_run, base_epochs=0 if self.base is None else self.base.config.epochs)

    def run(self, output: Path | None = None) -> Outcome:
        """Train the base if need be, compress it, and leave everything in the folder."""
        self._check_target(self._report())
        network = self.model
        if self.base is not None:
            with default_progress() as told:
                network = train(
                    network,
                    self.base_data,
                    self.base.config,
                    batch_size=self.base.batch_size,
                    workdir=self.folder,
                    progress=told,
                )
            _save_weights(network, self.folder / "base.safetensors")
        result = compress(
            network,
            self.data,
            target=self.target,
            max_drop=self.max_drop,
            recipe=self.recipe,
            workdir=self.folder,
            select=self.select,
            exclude=self.exclude,
        )
        assert isinstance(result, Result)
        return finished(result, self.data.test, self.folder, output)

    def _report(self) -> Report:
        example = torch.from_numpy(self.data.validation.normalized(slice(2)))
        return inspect(self.model, example, select=self.select, exclude=self.exclude)

    def _check_target(self, report: Report) -> None:
        """Raise ValueError if no network of this shape can be as small as the target."""
        if self.target is not None:
            meter = meter_for(report, self.target, self.data, self.recipe, self.folder)
            allocate(report, self.target, meter, self.recipe.structure, keep=self.recipe.keep)


@dataclass(frozen=True)
class Impossible(Document):
    """A dry run of a target that cannot be met."""

    reason: str

    def parts(self) -> list[Table | str]:
        """The reason."""
        return [self.reason]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"can_be_met": False, "reason": self.reason}


@dataclass(frozen=True, eq=False)
class Outcome(Document):
    """A finished run with its files.

    Attributes:
        result: of the compression.
        file: the compressed network.
        engine: what the engine, which does not use torch, makes of it on the test set: "accuracy" (percent), "samples",
            "different_classes" (images to which it gives another class than the torch model).
        dense_bytes, bytes: of the dense weights as float32; of the file.
        config: of this installation, see `show_config`.
    """

    result: Result
    file: Path
    engine: Mapping[str, float]
    dense_bytes: int
    bytes: int
    config: Mapping[str, object]

    @property
    def agrees(self) -> bool:
        """Whether file and torch model put every image of the test set into the same class."""
        return self.engine["different_classes"] == 0

    def parts(self) -> Iterator[Table | str]:
        """The tables of the run, and the check of the file."""
        yield from self.result.report().parts()
        yield (
            f"{self.file.name}: {self.bytes / 1000:,.1f} kB, the dense weights {self.dense_bytes / 1000:,.1f} kB\n"
            f"{self.verdict}"
        )

    @property
    def verdict(self) -> str:
        """Whether the file does what the torch model did."""
        count = f"{self.engine['samples']:,} test images"
        verdict = f"the same class as in torch for all {count}"
        if not self.agrees:
            verdict = f"NOT the class of torch for {self.engine['different_classes']:,} of {count}"
        return f"read back and run without torch: {self.engine['accuracy']:.2f}%, {verdict}"

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {
            **self.result.to_json(),
            "file": str(self.file),
            "bytes": self.bytes,
            "dense_bytes": self.dense_bytes,
            "engine": {**self.engine, "agrees": self.agrees},
            "config": {key: list(v) if isinstance(v, tuple) else v for key, v in self.config.items()},
        }


def finished(result: Result, test: Dataset, folder: Path, output: Path | None = None) -> Outcome:
    """Save the network, read it back, compare it on the test set, and write the report."""
    file = folder / "model.acf" if output is None else output
    file.parent.mkdir(parents=True, exist_ok=True)
    result.save(file)
    outcome = Outcome(
        result, file, _compared(result.model, file, test), 4 * result.dense.params, file.stat().st_size, show_config()
    )
    write_atomically(folder / "result.json", json.dumps(outcome.to_json(), indent=1).encode())
    write_atomically(folder / "report.txt", f"{outcome}\n".encode())
    result.report().save_plots(folder / "plots")
    result.report().save_html(folder / "report.html", file=file, notes=[f"{file.name}, {outcome.verdict}"])
    return outcome


def _compared(model: nn.Module, file: Path, test: Dataset) -> dict[str, float]:
    engine = load(file)
    correct = different = 0
    for start in range(0, len(test), _BATCH):
        part = slice(start, start + _BATCH)
        images = test.normalized(part)
        found = np.argmax(engine(images), axis=1)
        with torch.no_grad():
            expected = model(torch.from_numpy(images)).argmax(dim=1).numpy()
        correct += int((found == test.labels[part]).sum())
        different += int((found != expected).sum())
    return {"accuracy": 100.0 * correct / len(test), "samples": len(test), "different_classes": different}


def build(name: str, data: Splits, seed: int) -> nn.Module:
    """The network called `name` in `models`, or made by the user's "package.module:callable", for images like `data`'s.

    Raises:
        ValueError: an unknown name, or a network that does not turn these images into so many classes.
    """
    torch.manual_seed(seed)
    if ":" in name:
        model = _own(name)
    else:
        channels, height, width = data.input_shape
        options: dict[str, Any] = {}
        if name in ("lenet5", "lenet300") and height == width:
            options["image_size"] = height
        model = models.create(name, classes=len(data.classes), in_channels=channels, **options)
    _check_fits(model, name, data)
    return model


def _own(name: str) -> nn.Module:
    """What the user's callable returns; modules are also looked for in the current folder."""
    path, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"{name}: there is no module {error.name!r} here or among the installed packages") from None
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(f"{name}: {path} has nothing callable named {attribute!r}")
    model = factory()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _check_fits(model: nn.Module, name: str, data: Splits) -> None:
    shape = "x".join(map(str, data.input_shape))
    try:
        with torch.no_grad():
            output = model.eval()(torch.from_numpy(data.validation.normalized(slice(2))))
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{name} does not take the {shape} images of {data.name}: {reason}") from error
    finally:
        model.train()
    found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if found != (2, len(data.classes)):
        raise ValueError(f"{name} must put out (2, {len(data.classes)}) for 2 images of {data.name}, got {found}")


def base_recipe(name: str, recipe: Recipe, changes: Mapping[str, Any]) -> Base:
    """How the dense network is trained: as fits `name`, with precision, layout, batch size and seed of `recipe`."""
    known = _BASES.get(name, _CIFAR_BASE)
    like = recipe.training("final", 0)
    same = {name: getattr(like, name) for name in ("precision", "channels_last", "kernels", "compile")}
    config = dataclasses.replace(known.config, **same, seed=recipe.seed, **changes)
    return Base(config, known.batch_size)


def run_name(model: str, data: str, target: Target | None, max_drop: float | None, recipe: Recipe) -> str:
    """The folder of a run, as "lenet5-mnist-conv40-seed0"."""
    goal = {} if target is None else target.given()
    parts = [model.rpartition(":")[2], data, *(f"{name}{value:g}" for name, value in goal.items())]
    parts += [] if max_drop is None else [f"drop{max_drop:g}"]
    if recipe.structure != Recipe().structure:
        parts.append(recipe.structure)
    return re.sub(r"[^\w.+-]", "_", "-".join([*parts, f"seed{recipe.seed}"]))


def inspected(
    name: str,
    input_shape: str | None,
    *,
    select: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    groups: bool = False,
) -> Inspection:
    """The report on a network with random weights."""
    torch.manual_seed(0)
    if input_shape is not None:
        shape = _shape(input_shape)
    elif ":" in name:
        raise ValueError(f"{name} is your own: say what images it takes, for example --input-shape 3,32,32")
    else:
        shape = models.input_shape(name)
    model = named(name, shape)
    selected, excluded = patterns(select, model), patterns(exclude, model)
    report = inspect(model.eval(), torch.zeros(1, *shape), select=selected, exclude=excluded)
    return Inspection(report, groups=groups)


def named(name: str, shape: Sequence[int]) -> nn.Module:
    """The user's own network ("module:callable"), or one of ours, for images of that shape."""
    return _own(name) if ":" in name else models.create(name, in_channels=shape[0])


def shares(texts: Sequence[str]) -> dict[str, float | tuple[float, float]]:
    """What `Recipe` takes as `keep`, from the user's words.

    Raises:
        ValueError: something else.

    Example:
        >>> shares(["conv1=0.5", "layer4.*=0.1:0.3"])
        {'conv1': 0.5, 'layer4.*': (0.1, 0.3)}
    """
    found: dict[str, float | tuple[float, float]] = {}
    for text in texts:
        pattern, _, given = text.rpartition("=")
        try:
            least, *most = map(float, given.split(":"))
        except ValueError:
            least, most = math.nan, []
        if not pattern or math.isnan(least) or len(most) > 1 or pattern in found:
            raise ValueError(f"--keep is PATTERN=SHARE or PATTERN=LEAST:MOST, each pattern once, got {text!r}")
        found[pattern] = (least, most[0]) if most else least
    return found


def bits_asked(texts: Sequence[str]) -> Bits:
    """What `Recipe` takes as `bits`, from the user's words.

    Raises:
        ValueError: something else.

    Example:
        >>> bits_asked(["4"]), bits_asked(["2:6"]), bits_asked(["conv*=4", "fc1=2:3"])
        (4, (2, 6), {'conv*': 4, 'fc1': (2, 3)})
    """
    found: dict[str, int | tuple[int, int]] = {}
    for text in texts:
        pattern, equals, given = text.rpartition("=")
        least, colon, most = given.partition(":")
        of_all_and_more = (not equals and found) or "" in found
        if of_all_and_more or pattern in found or not all(map(str.isdecimal, [least, most] if colon else [least])):
            raise ValueError(
                f"--bits is BITS, FEWEST:MOST, or PATTERN=BITS or PATTERN=FEWEST:MOST, each pattern once, got {text!r}"
            )
        found[pattern] = (int(least), int(most)) if colon else int(least)
    return found.get("", found)


def patterns(texts: Sequence[str] | None, model: nn.Module) -> list[Pattern] | None:
    """What `inspect` takes, from the user's words: a path or a glob, "re:REGEX", or "type:CLASS".

    A class is meant by its name among those of the model's modules and what they derive from.

    Raises:
        ValueError: no regular expression, no such class.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
        >>> patterns(["0", "re:[12]", "type:Linear"], model)
        ['0', re.compile('[12]'), <class 'torch.nn.modules.linear.Linear'>]
    """
    if not texts:
        return None
    bases = {kind for module in model.modules() for kind in type(module).__mro__ if issubclass(kind, nn.Module)}
    classes = {kind.__name__: kind for kind in bases - {nn.Module}}
    found: list[Pattern] = []
    for text in texts:
        kind, colon, rest = text.partition(":")
        if kind == "re" and colon:
            try:
                found.append(re.compile(rest))
            except re.error as error:
                raise ValueError(f"{text!r} is no regular expression: {error}") from error
        elif kind == "type" and colon:
            if rest not in classes:
                raise ValueError(f"no module is of a class {rest!r}; there are {', '.join(sorted(classes))}")
            found.append(classes[rest])
        else:
            found.append(text)
    return found


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"--input-shape must be numbers such as 1,28,28, got {text!r}")
    return shape


def _size(text: str | None) -> int | float | None:
    """A count such as "5000", or a share such as "0.1"."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < 1 or (value >= 1 and value == int(value))):
        raise ValueError(f"--validation must be a count such as 5000 or a share such as 0.1, got {text!r}")
    return value if value < 1 else int(value)


def _save_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save

    write_atomically(path, save({name: value.contiguous().clone() for name, value in model.state_dict().items()}))


@contextlib.contextmanager
def threads_set(count: int | None) -> Iterator[None]:
    """Torch, and what asks it, use so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
