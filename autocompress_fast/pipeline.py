"""The whole job: a trained network, data and a target in; a compacted network that meets the target out.

    round r of R:   rates  ->  ADMM training  ->  hard projection  ->  unused paths, compaction  ->  masked retraining
      or            training in which weights shrink to zero       ->  unused paths, compaction  ->  masked retraining
    at the end:     longer masked retraining with distillation
    with max_drop:  a round that costs too much accuracy is taken back; the next one is gentler
    if asked for:   purification, unused paths, compaction  ->  masked retraining, in rounds of its own
    then:           columns cut out
    if asked for:   8-bit weights and activations, from samples  ->  training that rounds as the engine does
    then:           test set, read once

Every stage is a training with its own checkpoint in the work directory. Whatever lies between two trainings is a
function of its inputs, so a run that was killed is continued by calling the same thing again: finished stages load
their last checkpoint, and the next one goes on.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from autocompress_fast._baked import baked
from autocompress_fast._files import remove_partial, write_atomically
from autocompress_fast.admm import ADMM, Constraint, RhoSchedule, projected
from autocompress_fast.bits import Bits, BitSearch, checked, level_score, middle, numbers, ranges
from autocompress_fast.compact import Kept, compact, restore
from autocompress_fast.data import Augmentation, Batches, Dataset, Splits, UserBatches, batches
from autocompress_fast.engine import compile as compile_engine
from autocompress_fast.engine import file
from autocompress_fast.engine.lower import lower
from autocompress_fast.engine.narrow import quantize
from autocompress_fast.engine.simulation import Simulation, simulate
from autocompress_fast.graph import Counts, Pattern, Report, inspect
from autocompress_fast.latency import LATENCIES
from autocompress_fast.meter import FileSize, Meter, Numbers, Size
from autocompress_fast.plan import Plan, apply_masks
from autocompress_fast.progress import Progress, default_progress
from autocompress_fast.purify import purify
from autocompress_fast.quantize import LevelConstraint, snap
from autocompress_fast.rates import STRUCTURES, Keep, Target, allocate, between, fill, relative, smallest
from autocompress_fast.search import Found, Search, quick_score
from autocompress_fast.shrink import Shrinkage, check_rates, epsilons, largest_left
from autocompress_fast.shrink_groups import GroupShrinkage, largest_columns_left
from autocompress_fast.training import Trainer, TrainingConfig, evaluate, evaluate_together

if TYPE_CHECKING:
    from autocompress_fast.report import Summary

__all__ = ["DryRun", "Recipe", "Result", "compress", "meter_for", "train"]

Example = torch.Tensor | Sequence[torch.Tensor]

_KINDS = ("admm", "retrain", "final", "purify", "quantize", "activation", "level", "shrink")  # of stages
_EVALUATION_BATCH = 1000
_QUICK_BATCHES = 2  # of validation, on which searches and purification score networks
_CALIBRATION_BATCHES = 8  # of training, before a search scores a network
_BIT_TRIALS = 100  # of a search for bits, which trains nothing
_SEARCH_BATCH = 4  # candidates of a search that are proposed together
_TIMED_BATCHES = 8  # of a dry run
_METHODS = ("admm", "shrink")
_SHRINKING = ("element", "column", "filter+column")  # structures that may shrink
_EACH_ROUND = 4.0  # rate, unless the recipe says how many rounds there are
_AHEAD = 6.0  # rate from what there is: so far a search looks, where the target is not nearer and the round not longer
_PORTIONS = (0.5, 0.8, 0.95, 1.0)  # of the weights of a layer, set to their levels one after the other
_MOST_REFUSED = 3  # rounds that cost too much accuracy, before a run ends with what it has


@dataclass(frozen=True)
class Recipe:
    """How long and how strongly to train in every stage.

    Args:
        structure: what is pruned: "filter+column" (both at once), "filter-then-column" (the papers' order, two ADMM
            trainings a round), "filter", "column" or "element".
        method: "admm": the rates of the layers come from `search` or experience, and ADMM trains towards them; or
            "shrink", for the structures "element", "column" and "filter+column" and for rates of weights or
            multiply-adds: single weights (`ShrunkParameters`), or columns and channels (`ShrunkGroups`), shrink to zero
            while the network trains, which finds the rates by itself.
        rounds: how many times to prune and compact; the steps become smaller, from 2 to 1 in the logarithm of the
            rate. None: as many as make it about 4x a round; with "shrink" one.
        search: how many candidates to try in every round for the rates of the layers (`acf.Search`), scored by the loss
            of the network pruned so on some validation samples. Candidates are of the target, or 6x smaller than what
            is left where the target is further away; a round goes its part of the way to the best. 0 leaves the rates
            to experience: larger layers lose more.
        keep: pattern of layers (a path, a glob) -> share of its weights that each keeps at least, or (at least, at
            most), as of `acf.allocate`.
        search_steps: of training with masks, at the rate of `retrain_lr` and always on the same batches, before a
            candidate is scored; most of what a search takes. 0 scores what pruning breaks at once, which is quicker and
            says less of what training cannot mend.
        search_workers: processes that score candidates at the same time, each on one thread; up to 4 find the same as
            one. They are worth it where a candidate takes about a second or more and cores would wait.
        admm_epochs or shrink_epochs, and retrain_epochs: in every round; final_epochs: instead of the latter in the
            last round.
        purify_rounds: rounds of purification (`acf.purify`) after the target is met; they remove more, as far as the
            accuracy on some validation samples stays within `purify_tolerance` points of what it was before, until
            `purify_epochs` of masked retraining follow, which may win it back for the next round.
        bits: of every weight that is left: at the end the weights are brought to 2^bits levels (`LevelConstraint`) by
            ADMM, and set to them in portions, the closest first; first and last layer after the others. Patterns of
            layers with theirs, as {"conv*": 4}, leave the others float32; (at least, at most) instead of a number lets
            a search find how many each layer gets, so that the file has the bytes of the target, or those it would have
            with the bits in the middle. A target in bytes counts weights of so many bits, or of those in the middle,
            but for ternary ones. Not given: float32.
        levels: "equal", "power", "ternary" or "binary".
        quantize_epochs: of the ADMM training towards levels, and after every portion; ten such trainings in all.
        level_epochs: of a training after them in which weights may go to other levels (`LevelParameters`); it is taken
            back where it does not help the validation accuracy.
        activation_bits: 8 for a network that computes with 8-bit weights and activations (`acf.quantize`), and is then
            trained for `activation_epochs` with their rounding (`acf.simulate`), which is what the result's model is.
            Targets are met before: rates and latencies in float32, bytes as they will be. Not given: float32.
        admm_lr, shrink_lr, retrain_lr, final_lr, purify_lr, quantize_lr, level_lr, activation_lr: peak learning rates.
        rho: strength of the ADMM penalty over its updates, one after every epoch.
        optimizer, weight_decay, momentum: of all stages.
        distillation: share of the loss that compares with the dense network. Try 0 for networks of a few thousand
            weights, which may not be able to follow it.
        temperature: of the distributions compared.
        dropout: share of the inputs of fully connected layers but the last one that every step of the final training
            leaves out, and of purification and of the trainings towards levels. About 0.1 helps networks of a few
            thousand weights that know their training set by heart.
        batch_size: of training.
        precision: "float32", "bfloat16", or "auto", which chooses for every stage, see `TrainingConfig`.
        channels_last: memory layout of images while training.
        kernels: "kept" or "torch", see `TrainingConfig`.
        compile: train through torch.compile, see there.
        seed: of everything random.

    Raises:
        ValueError: a value out of range.
    """

    structure: str = "filter+column"
    method: str = "admm"
    rounds: int | None = None
    search: int = 0
    search_steps: int = 25
    keep: Keep = field(default_factory=dict)
    search_workers: int = 1
    admm_epochs: int = 5
    shrink_epochs: int = 40
    retrain_epochs: int = 2
    final_epochs: int = 25
    purify_rounds: int = 0
    purify_tolerance: float = 0.5
    purify_epochs: int = 5
    bits: Bits | None = None
    levels: str = "equal"
    quantize_epochs: int = 3
    level_epochs: int = 10
    activation_bits: int | None = None
    activation_epochs: int = 3
    admm_lr: float = 1e-3
    shrink_lr: float = 1e-3
    retrain_lr: float = 2e-3
    final_lr: float = 6e-3
    purify_lr: float = 2e-3
    quantize_lr: float = 1e-3
    level_lr: float = 1e-3
    activation_lr: float = 1e-4
    rho: RhoSchedule = field(default_factory=lambda: RhoSchedule(1e-2, 2.0, maximum=1.0))
    optimizer: str = "adam"
    weight_decay: float = 0.0
    momentum: float = 0.9
    distillation: float = 0.95
    temperature: float = 4.0
    dropout: float = 0.0
    batch_size: int = 128
    precision: str = "auto"
    channels_last: bool = True
    kernels: str = "kept"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.structure not in STRUCTURES:
            raise ValueError(f"structure must be one of {', '.join(STRUCTURES)}, got {self.structure!r}")
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"rounds must be 1 or more, got {self.rounds}")
        if self.method not in _METHODS:
            raise ValueError(f"method must be {' or '.join(_METHODS)}, got {self.method!r}")
        if self.method == "shrink":
            if self.structure not in _SHRINKING:
                allowed = ", ".join(_SHRINKING)
                raise ValueError(f'method "shrink" is for the structures {allowed}, got {self.structure!r}')
            if self.search or self.keep:
                raise ValueError(
                    f'method "shrink" finds the rates by itself: give no search and no keep, got {self.search} '
                    f"and {dict(self.keep)}"
                )
        for name in ("search_workers", "admm_epochs", "shrink_epochs", "final_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if isinstance(self.search_steps, bool) or not isinstance(self.search_steps, int) or self.search_steps < 0:
            raise ValueError(f"search_steps must be an integer of 0 or more, got {self.search_steps!r}")
        for name in ("search", "purify_rounds"):
            if isinstance(getattr(self, name), bool) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.bits is not None:
            checked(self.bits, self.levels)
        elif self.levels != "equal":
            raise ValueError(f"levels={self.levels!r} needs bits, got none")
        if self.activation_bits not in (None, 8) or isinstance(self.activation_bits, bool):
            raise ValueError(f"activation_bits must be 8 or not given, got {self.activation_bits!r}")
        if self.activation_bits is not None and self.bits is not None:
            raise ValueError(
                f"activation_bits go with weights of 8 bits, found on the way: give no bits, got {self.bits}"
            )
        if self.activation_bits is not None and self.structure == "element":
            raise ValueError("single weights are stored as float32: activation_bits need another structure")
        if not self.purify_tolerance >= 0:
            raise ValueError(f"purify_tolerance must be 0 or more, got {self.purify_tolerance}")
        for stage in _KINDS:
            self.training(stage, 0)  # checks the rest

    def training(self, kind: str, number: int) -> TrainingConfig:
        """The configuration of a stage of one of `_KINDS`, of round `number`."""
        return TrainingConfig(
            epochs=getattr(self, f"{kind}_epochs"),
            optimizer=self.optimizer,
            lr=getattr(self, f"{kind}_lr"),
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="constant" if kind == "admm" else "cosine",
            warmup=0.0 if kind in ("admm", "shrink") else 0.1,
            distillation=self.distillation,
            temperature=self.temperature,
            dropout=self.dropout if kind in ("final", "purify", "quantize", "level") else 0.0,
            precision="float32" if kind == "activation" else self.precision,  # bfloat16 would round what is rounded
            channels_last=self.channels_last,
            kernels=self.kernels,
            compile=self.compile,
            seed=self.seed + 1000 * number + _KINDS.index(kind),
        )

    def rounds_for(self, target: Target, dense: Counts) -> int:
        """Number of rounds for a network of these sizes: as given, or so that each is about 4x; 0 if it needs none."""
        if target.met(dense, dense) and not self.keep:
            return 0
        if self.rounds is None and self.method == "shrink":
            return 1
        return self.rounds or max(1, round(target.excess(dense, dense) / math.log(_EACH_ROUND)))


@dataclass(frozen=True, eq=False)
class DryRun:
    """What a run would do.

    Attributes:
        report: of the dense network.
        target: of the run.
        rounds: the target of each round and the constraints it would set; those of later rounds are estimates, as
            they are decided anew from the weights that the round before leaves. None where nothing is to be pruned.
        dense, small: sizes of the network, and of what the last of these constraints would leave of it now; with the
            predicted latency and the bytes of the file (`Size`) if the target limits them.
        epochs: of all trainings.
        seconds: at most: at the speed of the dense network, measured on a few batches.
    """

    report: Report
    target: Target
    rounds: tuple[tuple[Target, dict[str, Constraint]], ...]
    dense: Counts
    small: Counts
    epochs: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run.

    Attributes:
        model: the compacted network; plain torch, trainable. With `Recipe(activation_bits=8)` a simulation of the
            network of 8 bits, which `acf.compile` makes an engine of (`acf.simulate`).
        plan: what is kept, in the shapes of the network that was given.
        dense, small: sizes before and after; with the predicted latency and the bytes of the file (`Size`) if the
            target limits them.
        accuracy: "base" and "final" on the validation set, and on the test set as "base_test" and "final_test"
            when there is one; percent.
        history: a row of metrics for every epoch of every stage.
        rounds: what each left: its target, whether it was accepted, validation accuracy in percent and sizes.
        purification: what every round of it removed and how the score fell, as `Purified.to_json` has it.
        max_difference: between the masked and the compacted network, relative to the largest output.
        target, recipe: what was asked for.
        layers: the report on the dense network.
        info: what `save` writes beside the network.
        sizes: of the network in the stages that retrain it, by their names; those before one are of the stage before.
        searches: what the search of every round has found, when the recipe has one.
        bits: of the layers whose weights lie on levels.
    """

    model: nn.Module
    plan: Plan
    dense: Counts
    small: Counts
    accuracy: dict[str, float]
    history: list[dict[str, Any]]
    rounds: list[dict[str, Any]]
    purification: list[dict[str, Any]]
    max_difference: float
    target: Target
    recipe: Recipe
    layers: Report
    example_input: tuple[torch.Tensor, ...]
    info: dict[str, Any]
    sizes: dict[str, Counts] = field(default_factory=dict)
    searches: list[Found] = field(default_factory=list)
    bits: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Time spent in training, over all stages."""
        return float(sum(row["seconds"] for row in self.history))

    @property
    def rates(self) -> dict[str, float]:
        """Dense / remaining of CONV weights ("conv"), all weights ("params") and multiply-adds ("macs").

        Of predicted latency ("seconds") and the bytes of the file ("bytes") as well, if the target limits them.
        """
        small = {name: value for name, value in asdict(self.small).items() if value}
        return {name: getattr(self.dense, name) / value for name, value in small.items()}

    def to_json(self) -> dict[str, Any]:
        """The figures of the run as plain numbers and strings."""
        return {
            "target": str(self.target),
            "rates": self.rates,
            "accuracy": self.accuracy,
            "dense": asdict(self.dense),
            "small": asdict(self.small),
            "sizes": {stage: asdict(counts) for stage, counts in self.sizes.items()},
            "max_difference": self.max_difference,
            "seconds": round(self.seconds, 1),
            "recipe": asdict(self.recipe),
            "layers": {
                name: {"filters": int(p.filters.sum()), "columns": int(p.columns.sum()), "weights": p.weights}
                | ({"bits": self.bits[name]} if name in self.bits else {})
                for name, p in self.plan.items()
            },
            "rounds": self.rounds,
            "purification": self.purification,
            "history": self.history,
        }

    def report(self) -> Summary:
        """Tables of the run; print it, or use its `to_json()`, `save_html(path)` and `save_plots(folder)`."""
        from autocompress_fast.report import Summary

        return Summary(self)

    def save(self, path: str | Path) -> Path:
        """Write the network as one `.acf` file, which `acf.load` runs without torch."""
        engine = compile_engine(self.model, self.example_input, info=self.info)
        engine.save(path)
        return Path(path)


def train(
    model: nn.Module,
    data: Splits,
    config: TrainingConfig,
    *,
    batch_size: int = 128,
    workdir: str | Path | None = None,
    name: str = "base",
    progress: Progress | None = None,
) -> nn.Module:
    """Train a copy of `model` on `data.train` and return it; resumable with a work directory.

    Args:
        model: not changed.
        data: with its own augmentation, if it has one.
        config: how long and how.
        batch_size: of training.
        workdir: for the checkpoint and the log; the same call continues a run that was stopped.
        name: of the stage.
        progress: who is told.
    """
    trained = copy.deepcopy(model)
    loader = _training_batches(data.train, batch_size, config.seed, data.augmentation)
    folder = None if workdir is None else Path(workdir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)
    Trainer(
        trained,
        loader,
        config,
        validation=batches(data.validation, _EVALUATION_BATCH),
        checkpoint=None if folder is None else folder / f"{name}.ckpt",
        log=None if folder is None else folder / "log.jsonl",
        name=name,
        progress=progress,
    ).run()
    return trained


def compress(
    model: nn.Module,
    data: Splits | tuple[Any, Any] | tuple[Any, Any, Any],
    *,
    target: Target | str | float | None = None,
    max_drop: float | None = None,
    example_input: Example | None = None,
    recipe: Recipe | None = None,
    workdir: str | Path | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    select: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
) -> Result | DryRun:
    """Compress a trained network until it meets the target, or as far as its accuracy holds.

    Args:
        model: trained; it is not changed.
        data: `acf.data.Splits`, or (train, validation) or (train, validation, test) of data sets or re-iterable
            batches (x, y). The validation part decides; the test part is read once, at the end.
        target: "20x" (all weights), "conv=40", "macs=4", "3x faster", "latency_ms=2.5", "bytes=100k", several with
            commas, a number (all weights) or a `Target`. "1x" prunes nothing, and what follows, such as bits, is done
            to the whole network. Not given: the smallest network that `max_drop` allows,
            counted in all weights.
        max_drop: points of validation accuracy that may be lost. A round that loses more is taken back, the next one
            goes half as far, and after three such rounds the smallest network that held is the result, whether it meets
            the target or not.
        example_input: what the model takes; the first validation images when not given.
        recipe: how to train.
        workdir: for checkpoints and the log; the same call continues a run that was stopped.
        progress: who is told; bars on the terminal by default.
        dry_run: say what would happen, and train nothing.
        select, exclude: which layers may be pruned, and which may not; patterns as of `inspect`.

    Returns:
        the `Result`, or a `DryRun`.

    Raises:
        ValueError: neither target nor max_drop, a negative one, a target that cannot be met, a model that cannot be
            read, a pattern that no layer matches, a work directory of another run.
    """
    recipe = recipe or Recipe()
    if target is None and max_drop is None:
        raise ValueError("compress needs a target, such as target='20x', or max_drop, or both; got neither")
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise ValueError(f"max_drop is in points of accuracy, from 0 to 100, got {max_drop}")
    goal = None if target is None else target if isinstance(target, Target) else Target.parse(str(target))
    train_part, validation_part, test_part = _three_parts(data)
    augmentation = getattr(data, "augmentation", None)
    loader = _training_batches(train_part, recipe.batch_size, recipe.seed, augmentation)
    validation = batches(validation_part, _EVALUATION_BATCH)
    example = _example(example_input, validation)
    report = inspect(model, example, select=select, exclude=exclude)  # classes are those of the model that was given
    if recipe.activation_bits is not None:
        lower(model, example)  # says now what the engine cannot run
    model = baked(model)  # weights that are computed cannot be pulled towards zero
    if goal is None:
        goal = Target(params=report.counts().params / smallest(report, recipe.structure, keep=recipe.keep).params)
    if recipe.method == "shrink":
        check_rates(goal)
    meter = meter_for(report, goal, data, recipe, workdir, progress)
    rounds = recipe.rounds_for(goal, meter.dense)
    if dry_run:
        return _dry_run(model, loader, validation, meter, goal, recipe, rounds)
    allocate(report, goal, meter, recipe.structure, keep=recipe.keep)  # says now what cannot be met
    folder = (
        None
        if workdir is None
        else _claimed(Path(workdir), model, meter, goal, max_drop, recipe, train_part, augmentation)
    )

    told = progress or default_progress()
    with told:
        stages = _Stages(loader, validation, copy.deepcopy(model).eval(), folder, told)
        base = evaluate(model, validation)
        told.note(f"dense: {base.accuracy:.2f}% of {base.samples} validation samples, {report.params:,} weights")
        run = _Run(report, meter, example, goal, recipe, stages, _expected_info(data, report, goal))
        kept = {n.name: Kept(np.arange(n.shape[0]), np.arange(n.weights // n.shape[0])) for n in report.layers}
        state = _State(copy.deepcopy(model), None, kept, base.accuracy, polished=True)
        floor = -math.inf if max_drop is None else base.accuracy - max_drop
        if rounds == 0:
            told.note(f"{goal}: nothing needs to be pruned")
            state = dataclasses.replace(state, masks=Plan.dense(report))
        else:
            state = _rounds(run, state, rounds) if max_drop is None else _rounds_within(run, state, rounds, floor)
        state, steps = _purified(run, state, floor)
        state = _quantized(run, state)
        plan = Plan.dense(report) if state.masks is None else run.whole(state)
        final = compact(state.small, plan if state.masks is None else state.masks, example)
        found, reached = _narrowed(run, final.model, train_part, floor)
        accuracy = {"base": base.accuracy, "final": reached}
        if test_part is not None:
            test = batches(test_part, _EVALUATION_BATCH)
            before, after = evaluate_together([model, found], test)
            accuracy |= {"base_test": before.accuracy, "final_test": after.accuracy}
    info, small = _info(data, report, plan, accuracy, goal), meter.measure(plan, settled=True)
    if isinstance(found, Simulation):
        info["provenance"] |= found.info["provenance"]
    if isinstance(small, Size) and small.bytes is not None:
        program = found.program() if isinstance(found, Simulation) else lower(found, example)
        small = dataclasses.replace(small, bytes=file.size(program, info))
    result = Result(
        model=found.eval(),
        plan=plan,
        dense=meter.dense,
        small=small,
        accuracy=accuracy,
        history=stages.history,
        rounds=run.rounds,
        purification=steps,
        max_difference=final.max_difference,
        target=goal,
        recipe=recipe,
        layers=report,
        example_input=example,
        sizes=stages.sizes,
        searches=stages.searches,
        bits=state.bits,
        info=info,
    )
    if folder is not None:
        plan.save(folder / "plan.json")
        write_atomically(folder / "result.json", json.dumps(result.to_json(), indent=1).encode())
    return result


@dataclass(frozen=True, eq=False)
class _State:
    """What a round leaves: the small network, whose dropped columns are still zeros in it, and where that came from."""

    small: nn.Module
    masks: Plan | None  # of the small network; None before the first round
    kept: dict[str, Kept]  # where its weights were in the network that was given
    accuracy: float  # on the validation set
    polished: bool  # by the long training of the end
    bits: dict[str, int] = field(default_factory=dict)  # of the layers whose weights lie on levels


@dataclass(frozen=True)
class _Run:
    """What all rounds of a run share."""

    report: Report
    meter: Meter
    example: tuple[torch.Tensor, ...]
    goal: Target
    recipe: Recipe
    stages: _Stages
    info: dict[str, Any]  # that will be saved, as far as its size goes
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def whole(self, state: _State) -> Plan:
        """What is kept, in the shapes of the network that was given."""
        assert state.masks is not None
        return restore(state.masks, state.kept, self.report)

    def counts(self, state: _State) -> Counts:
        """Sizes of what is kept."""
        return self.meter.measure(self.whole(state), settled=True)

    def tell(self, number: int, part: Target, state: _State, *, accepted: bool = True) -> None:
        """Keep, and say, what a round left."""
        counts = self.counts(state)
        found = {"round": number, "target": str(part), "accepted": accepted, "validation": state.accuracy}
        self.rounds.append(found | asdict(counts))
        self.stages.progress.note(
            f"round {number}: {_rates(self.meter.dense, counts)} at {state.accuracy:.2f}%"
            + ("" if accepted else ", which is too little: taken back")
        )


def _rounds(run: _Run, state: _State, rounds: int) -> _State:
    """Prune, compact and retrain round by round, until the target is met."""
    for number in range(1, rounds + 1):
        way = _Way(run.goal, run.meter.dense, _share(number - 1, rounds), _share(number, rounds))
        run.stages.progress.note(f"round {number} of {rounds}: to {way.part}")
        state = _round(run, state, number, way)
        state = _trained(run, state, f"round{number}", number, "final" if number == rounds else "retrain")
        run.tell(number, way.part, state)
    return state


def _rounds_within(run: _Run, state: _State, rounds: int, floor: float) -> _State:
    """As far towards the target as the accuracy stays at `floor` or above.

    A round that ends below is given the long training; when that does not bring it back, the round is taken back and
    the next one goes half as far.
    """
    shares = [_share(number, rounds) for number in range(rounds + 1)]
    reached, scale, refused, number = 0.0, 1.0, 0, 0
    while reached < 1 and refused < _MOST_REFUSED:
        number += 1
        begun = sum(share <= reached + 1e-9 for share in shares)  # which of the planned steps
        share = reached + scale * (shares[begun] - shares[begun - 1])
        share = share if share < 1 - 1e-9 else 1.0
        way = _Way(run.goal, run.meter.dense, reached, share)
        run.stages.progress.note(f"round {number}: to {way.part}")
        trial = _trained(run, _round(run, state, number, way), f"round{number}", number, "retrain")
        if trial.accuracy < floor:
            trial = _trained(run, trial, f"round{number}", number, "final")
        accepted = trial.accuracy >= floor
        run.tell(number, way.part, trial, accepted=accepted)
        if accepted:
            state, reached = trial, share
        else:
            refused, scale = refused + 1, scale / 2
    if state.masks is None or state.polished:
        return state
    polished = _trained(run, state, "final", number + 1, "final")
    return polished if polished.accuracy >= floor else state


@dataclass(frozen=True)
class _Way:
    """Of a round, in shares of the logarithm of the rates: from where, and to where."""

    goal: Target
    dense: Counts
    reached: float
    share: float

    @property
    def part(self) -> Target:
        """The target of the round."""
        return self.goal.part(self.share, self.dense)

    @property
    def ahead(self) -> float:
        """How far a search looks: what costs least in this round may lead nowhere in the next ones."""
        whole = max(self.goal.excess(self.dense, self.dense), 1e-9)
        return min(1.0, max(self.share, self.reached + math.log(_AHEAD) / whole))


def _share(number: int, rounds: int) -> float:
    """How far of the way, in the logarithm of the rates, round `number` of `rounds` ends: steps that become smaller.

    The first step is twice the last one.
    """
    steps = [1.0] if rounds == 1 else [2 - r / (rounds - 1) for r in range(rounds)]
    return 1.0 if number == rounds else sum(steps[:number]) / sum(steps)


def _round(run: _Run, state: _State, number: int, way: _Way) -> _State:
    """Prune until the target of the round is met, and compact."""
    report, recipe, stages = run.report, run.recipe, run.stages
    small, masks = copy.deepcopy(state.small), state.masks
    now = report if masks is None else inspect(small, run.example, exclude=sorted(report.held))
    meter = run.meter if masks is None else run.meter.after(now, state.kept)
    if recipe.method == "shrink":
        masks = _shrunk(run, small, masks, now, meter, number, way.part)
        return _compacted(run, state, small, masks, now)
    keep = recipe.keep if masks is None else relative(recipe.keep, report, now, recipe.structure)
    allowed = _allowed(small, masks, meter, way, recipe, keep, number, stages)
    filled = functools.partial(fill, now, way.part, meter, allowed, keep=keep)
    constraints = filled(ADMM(small, allowed, report=now).plan)
    for step, step_constraints in enumerate(_steps(constraints, recipe.structure)):
        admm = ADMM(small, step_constraints, rho=recipe.rho, report=now)
        name = f"round{number}.admm" + (f"{step + 1}" if step else "")
        stages.run(small, name, recipe.training("admm", number), admm=admm, masks=masks)
        masks = admm.plan(filled(admm.plan) if step_constraints == constraints else None).tied(now)
        apply_masks(small, masks)
    assert masks is not None
    return _compacted(run, state, small, masks, now)


def _compacted(run: _Run, state: _State, small: nn.Module, masks: Plan, now: Report) -> _State:
    cut = compact(small, masks, run.example, columns=False, report=now)
    kept = state.kept | {name: state.kept[name].then(inner) for name, inner in cut.kept.items()}
    return _State(cut.model, cut.plan, kept, 0.0, polished=False)


def _shrunk(
    run: _Run, small: nn.Module, masks: Plan | None, now: Report, meter: Meter, number: int, part: Target
) -> Plan:
    """Train while weights shrink, in place, until what is left meets the target; what that is."""
    recipe, stages = run.recipe, run.stages
    config = recipe.training("shrink", number)
    strength = next((row["strength"] for row in reversed(stages.history) if "strength" in row), None)
    steps = config.epochs * len(stages.loader)
    towards: Shrinkage | GroupShrinkage
    if recipe.structure == "element":
        epsilon = epsilons(run.report)  # of the network that was given: zeros would make it smaller
        towards = Shrinkage.towards(now, part, steps=steps, dense=meter.dense, epsilon=epsilon, strength=strength)
    else:
        towards = GroupShrinkage.towards(now, part, recipe.structure, steps=steps, dense=meter.dense, strength=strength)
    stages.run(small, f"round{number}.shrink", config, masks=masks, shrinkage=towards)
    after = inspect(small, run.example, exclude=sorted(run.report.held))
    left = (largest_left if recipe.structure == "element" else largest_columns_left)(after, part, meter)
    apply_masks(small, left)
    return left


def _trained(run: _Run, state: _State, prefix: str, number: int, kind: str) -> _State:
    """The network of a state, trained under its masks."""
    small = copy.deepcopy(state.small)
    name = prefix if prefix.startswith(kind) else f"{prefix}.{kind}"
    rows = run.stages.run(small, name, run.recipe.training(kind, number), masks=state.masks)
    accuracy = rows[-1]["validation"] if rows else evaluate(small, run.stages.validation).accuracy
    run.stages.sizes[name] = run.counts(state)
    return dataclasses.replace(state, small=small, accuracy=accuracy, polished=kind == "final")


def _allowed(
    small: nn.Module,
    masks: Plan | None,
    meter: Meter,
    way: _Way,
    recipe: Recipe,
    keep: Keep,
    number: int,
    stages: _Stages,
) -> dict[str, Constraint]:
    """What every layer may keep in a round: by experience, or on the way to the best that a search finds ahead."""
    now, structure = meter.report, recipe.structure
    if recipe.search == 0:
        return allocate(now, way.part, meter, structure, keep=keep)
    target = way.goal.part(way.ahead, way.dense)
    score = _search_score(small, now, stages.loader, stages.validation, recipe)
    trace = None if stages.folder is None else stages.folder / f"round{number}.search.jsonl"
    seed = recipe.seed + 1000 * number
    workers = recipe.search_workers
    options: dict[str, Any] = {"batch": max(_SEARCH_BATCH, workers), "workers": workers, "seed": seed, "trace": trace}
    before = stages.searches[-1].action if stages.searches else None
    search = Search(now, target, score, dense=meter, structure=structure, keep=keep, before=before, **options)
    found = search.run(recipe.search, progress=stages.progress)
    stages.searches.append(found)
    when = f"after {recipe.search_steps} steps" if recipe.search_steps else "in one shot"
    stages.progress.note(
        f"round {number}: at {target}, loss {when} {-found.score:.4g}, by experience {-found.start:.4g}"
    )
    share = (way.share - way.reached) / (way.ahead - way.reached)
    return found.constraints if share == 1 else between(now, masks, found.constraints, share)


def _search_score(
    model: nn.Module, report: Report, loader: Batches, validation: Batches, recipe: Recipe
) -> Callable[[dict[str, Constraint]], float]:
    # The order of candidates is the same without a teacher, who takes a third more time.
    training = dataclasses.replace(recipe.training("retrain", 0), distillation=0.0)
    return quick_score(
        model,
        report,
        UserBatches(list(itertools.islice(validation.epoch(0), _QUICK_BATCHES))),
        calibration=itertools.islice(loader.epoch(0), _CALIBRATION_BATCHES),
        train=loader,
        retrain_steps=recipe.search_steps,
        training=training,
        measure="loss",
        precision=training.precision,
        channels_last=training.channels_last,
    )


def _purified(run: _Run, state: _State, least: float) -> tuple[_State, list[dict[str, Any]]]:
    """Purify and retrain in rounds; what each decided is kept in the work directory, as it takes many evaluations.

    A round after which the accuracy is below `least` is taken back, and the last.
    """
    steps: list[dict[str, Any]] = []
    recipe, stages = run.recipe, run.stages
    if recipe.purify_rounds == 0 or state.masks is None:
        return state, steps

    some = UserBatches(list(itertools.islice(stages.validation.epoch(0), _QUICK_BATCHES)))
    quick = recipe.training("purify", 0).settled(state.small, state.masks)

    def accuracy(model: nn.Module) -> float:
        return evaluate(model, some, precision=quick.precision, channels_last=quick.channels_last).accuracy

    exclude = sorted(run.report.held)
    floor = accuracy(state.small) - recipe.purify_tolerance
    for number in range(1, recipe.purify_rounds + 1):
        name = f"purify{number}"
        now = inspect(state.small, run.example, exclude=exclude)
        masks, found = _decided(state.small, state.masks, name, accuracy, floor, run.example, now, stages)
        if masks.weights == state.masks.weights:
            steps.append(found)
            break
        before, after = run.counts(state), run.meter.measure(restore(masks, state.kept, run.report))
        if run.goal.met(run.meter.dense, before) and not run.goal.met(run.meter.dense, after):
            stages.progress.note(f"purification {number}: fewer weights would be slower here, nothing is removed")
            break  # fewer filters may fit the kernels less well
        cut = compact(state.small, masks, run.example, columns=False, report=now)
        kept = state.kept | {layer: state.kept[layer].then(inner) for layer, inner in cut.kept.items()}
        trial = _trained(run, _State(cut.model, cut.plan, kept, 0.0, polished=False), name, number, "purify")
        if trial.accuracy < least:
            stages.progress.note(f"purification {number}: {trial.accuracy:.2f}% is too little: taken back")
            break
        steps.append(found)
        state = trial
        rates = _rates(run.meter.dense, run.counts(state))
        stages.progress.note(f"purification {number} of {recipe.purify_rounds}: {rates}")
        assert state.masks is not None
    return state, steps


def _quantized(run: _Run, state: _State) -> _State:
    """Bring the weights that are left to levels: by ADMM, then in portions, of which each is trained around."""
    recipe, stages = run.recipe, run.stages
    if recipe.bits is None or state.masks is None:
        return state
    small, masks, bits = copy.deepcopy(state.small), state.masks, _bits(run, state)
    names = list(bits)
    left = [name for name, layer in masks.items() if layer.weights and name not in run.report.held]
    edges = [name for name in dict.fromkeys([*left[:1], *left[-1:]]) if name in bits]
    groups = {"inner": [name for name in names if name not in edges], "edge": edges}
    config = recipe.training("quantize", 0)
    towards = dataclasses.replace(config, schedule="constant", warmup=0.0)
    fixed: dict[str, torch.Tensor] = {}
    for group, layers in groups.items():
        if not layers:
            continue
        constraints = {name: LevelConstraint(bits[name], recipe.levels) for name in layers}
        admm = ADMM(small, constraints, rho=recipe.rho)
        stages.run(small, f"quantize.{group}.admm", towards, admm=admm, masks=masks, fixed=fixed)
        weights: dict[str, Any] = {name: small.get_submodule(name).weight for name in layers}
        scales = {name: constraints[name].scales(weight) for name, weight in weights.items()}
        for share in _PORTIONS:
            with torch.no_grad():
                for name, weight in weights.items():
                    target = constraints[name].project(weight, scales[name])
                    fixed[f"{name}.weight"] = chosen = snap(weight, target, share)
                    weight.copy_(torch.where(chosen, target, weight))
            stages.run(small, f"quantize.{group}.{round(100 * share)}", config, masks=masks, fixed=fixed)
    accuracy = evaluate(small, stages.validation).accuracy
    if bits and recipe.level_epochs:
        moved = copy.deepcopy(small)
        levels = {name: LevelConstraint(number, recipe.levels) for name, number in bits.items()}
        stages.run(moved, "quantize.levels", recipe.training("level", 0), masks=masks, levels=levels)
        after = evaluate(moved, stages.validation).accuracy
        note = f"weights that may go to other levels: {accuracy:.2f} -> {after:.2f}%"
        stages.progress.note(note + ("" if after > accuracy else ", taken back"))
        small, accuracy = (moved, after) if after > accuracy else (small, accuracy)
    fewest, most = min(bits.values(), default=0), max(bits.values(), default=0)
    said = f"{fewest} bits a weight" if fewest == most else f"{fewest} to {most} bits a weight"
    stages.progress.note(f"{said}: {state.accuracy:.2f} -> {accuracy:.2f}%")
    return dataclasses.replace(state, small=small, accuracy=accuracy, bits=bits)


def _bits(run: _Run, state: _State) -> dict[str, int]:
    """Of the weights that are left of every layer whose weights get levels; found by a search where it may choose."""
    recipe, stages = run.recipe, run.stages
    assert recipe.bits is not None
    assert state.masks is not None
    asked = ranges(recipe.bits, recipe.levels, [layer.name for layer in run.report.layers])
    held = run.report.held
    layers = {n: asked[n] for n, layer in state.masks.items() if n in asked and layer.weights and n not in held}
    if all(low == high for low, high in layers.values()):
        return middle(layers)
    quick = recipe.training("quantize", 0).settled(state.small, state.masks)
    score = level_score(
        state.small,
        UserBatches(list(itertools.islice(stages.validation.epoch(0), _QUICK_BATCHES))),
        calibration=itertools.islice(stages.loader.epoch(0), _CALIBRATION_BATCHES),
        precision=quick.precision,
        channels_last=quick.channels_last,
    )
    size, plan = FileSize(run.report, run.info), run.whole(state)
    alike = size.bytes(plan, numbers(middle(layers), recipe.levels))
    search = BitSearch(
        run.report,
        score,
        layers=layers,
        kind=recipe.levels,
        size=size,
        plan=plan,
        most=max(alike, run.goal.bytes or 0),  # more than the target where the accuracy did not let it be met
        batch=max(_SEARCH_BATCH, recipe.search_workers),
        workers=recipe.search_workers,
        seed=recipe.seed,
        trace=None if stages.folder is None else stages.folder / "bits.search.jsonl",
    )
    found = search.run(_BIT_TRIALS, progress=stages.progress)
    bits = {name: int(constraint.bits) for name, constraint in found.constraints.items()}
    each = ", ".join(f"{name} {number}" for name, number in bits.items())
    said = f"{search.bytes_with(bits):,} of {search.bytes:,} bytes, loss at once {-found.score:.4g}"
    stages.progress.note(f"bits: {each}; {said}, with all alike {-found.start:.4g}")
    return bits


def _narrowed(run: _Run, model: nn.Module, data: Any, floor: float) -> tuple[nn.Module, float]:
    """The network with 8-bit weights and activations, if asked for, and the validation accuracy.

    It stays in float32 where that would be below `floor`.
    """
    recipe, stages = run.recipe, run.stages
    before = evaluate(model, stages.validation).accuracy
    if recipe.activation_bits is None:
        return model, before
    samples = data if isinstance(data, Dataset) else stages.loader.epoch(0)
    simulation = simulate(quantize(compile_engine(model, run.example), samples))
    chosen = evaluate(simulation, stages.validation).accuracy
    stages.run(simulation, "activation", recipe.training("activation", 0))
    after = evaluate(simulation, stages.validation).accuracy
    said = f"8-bit weights and activations: {before:.2f} -> {chosen:.2f}%, trained {after:.2f}%"
    stages.progress.note(said + (", which is too little: it stays in float32" if after < floor else ""))
    return (model, before) if after < floor else (simulation, after)


def _decided(
    small: nn.Module,
    masks: Plan,
    name: str,
    accuracy: Callable[[nn.Module], float],
    floor: float,
    example: tuple[torch.Tensor, ...],
    report: Report,
    stages: _Stages,
) -> tuple[Plan, dict[str, Any]]:
    """What a round of purification keeps, and what it removed; from the work directory if it was decided before."""
    plan = None if stages.folder is None else stages.folder / f"{name}.json"  # written last
    if plan is not None and plan.exists():
        return Plan.load(plan), dict(json.loads(plan.with_suffix(".steps.json").read_text()))
    stages.progress.note(f"{name}: down to {floor:.2f}% of some validation samples, before retraining")
    purified = purify(
        small,
        accuracy,
        example,
        plan=masks,
        tolerance=max(0.0, accuracy(small) - floor),
        report=report,
        progress=stages.progress,
    )
    if plan is not None:
        write_atomically(plan.with_suffix(".steps.json"), json.dumps(purified.to_json(), indent=1).encode())
        purified.plan.save(plan)
    return purified.plan, purified.to_json()


def _steps(constraints: dict[str, Constraint], structure: str) -> list[dict[str, Constraint]]:
    """The ADMM trainings of a round: one, or filters first and then the columns of the filters that are left."""
    if structure != "filter-then-column":
        return [constraints]
    filters = {
        n: Constraint("filter", c.keep[0], c.groups) for n, c in constraints.items() if isinstance(c.keep, tuple)
    }
    return [filters, constraints]


@dataclass(frozen=True)
class _Stages:
    """What all trainings of a run share, and what is written down of them."""

    loader: Batches
    validation: Batches
    teacher: nn.Module
    folder: Path | None
    progress: Progress
    history: list[dict[str, Any]] = field(default_factory=list)
    sizes: dict[str, Counts] = field(default_factory=dict)
    searches: list[Found] = field(default_factory=list)

    def run(
        self,
        model: nn.Module,
        name: str,
        config: TrainingConfig,
        *,
        admm: ADMM | None = None,
        masks: Plan | None = None,
        fixed: Mapping[str, torch.Tensor] | None = None,
        levels: Mapping[str, LevelConstraint] | None = None,
        shrinkage: Shrinkage | GroupShrinkage | None = None,
    ) -> list[dict[str, Any]]:
        """One training, in place; its rows of the history."""
        rows = Trainer(
            model,
            self.loader,
            config,
            validation=self.validation,
            teacher=self.teacher,
            admm=admm,
            plan=masks,
            fixed=fixed,
            levels=levels,
            shrinkage=shrinkage,
            checkpoint=None if self.folder is None else self.folder / f"{name}.ckpt",
            log=None if self.folder is None else self.folder / "log.jsonl",
            name=name,
            progress=self.progress,
        ).run()
        self.history.extend(rows)
        return rows


def _dry_run(
    model: nn.Module,
    loader: Batches,
    validation: Batches,
    meter: Meter,
    goal: Target,
    recipe: Recipe,
    rounds: int,
) -> DryRun:
    report = meter.report
    chosen: list[tuple[Target, dict[str, Constraint]]] = []
    for number in range(rounds, 0, -1):  # what cannot be met is said of the whole target
        part = goal.part(_share(number, rounds), meter.dense)
        chosen.insert(0, (part, allocate(report, part, meter, recipe.structure, keep=recipe.keep)))
    epochs = recipe.purify_rounds * recipe.purify_epochs
    epochs += 0 if recipe.bits is None else 2 * (1 + len(_PORTIONS)) * recipe.quantize_epochs + recipe.level_epochs
    epochs += 0 if recipe.activation_bits is None else recipe.activation_epochs
    if chosen:
        steps = len(_steps(chosen[-1][1], recipe.structure))
        epochs += rounds * (recipe.shrink_epochs if recipe.method == "shrink" else steps * recipe.admm_epochs)
        epochs += (rounds - 1) * recipe.retrain_epochs + recipe.final_epochs
    seconds = epochs * _epoch_seconds(model, loader, recipe)
    if recipe.search and chosen:
        score = _search_score(model, report, loader, validation, recipe)
        begun = time.monotonic()
        score(chosen[0][1])
        seconds += rounds * recipe.search * (time.monotonic() - begun)
    small = meter.measure(projected(report, chosen[-1][1])) if chosen else meter.dense
    return DryRun(report, goal, tuple(chosen), meter.dense, small, epochs, seconds)


def _epoch_seconds(model: nn.Module, loader: Batches, recipe: Recipe) -> float:
    """Time of an epoch of the dense network, from a few of its batches."""
    first = list(itertools.islice(loader.epoch(0), _TIMED_BATCHES))
    timed = UserBatches(first)
    config = dataclasses.replace(recipe.training("retrain", 0), epochs=2)
    history = Trainer(copy.deepcopy(model), timed, config, teacher=copy.deepcopy(model)).run()
    return float(history[-1]["seconds"]) / len(first) * len(loader)


def _three_parts(data: Any) -> tuple[Any, Any, Any]:
    if isinstance(data, Splits):
        return data.train, data.validation, data.test
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
        raise TypeError(
            f"data must be Splits, (train, validation) or (train, validation, test), got {type(data).__name__}"
            + (f" of {len(data)}" if isinstance(data, (tuple, list)) else "")
        )
    return (*data, None)[:3]


def _training_batches(part: Any, batch_size: int, seed: int, augmentation: Augmentation | None) -> Batches:
    size = min(batch_size, len(part)) if isinstance(part, Dataset) else batch_size
    return batches(part, size, shuffle=True, seed=seed, augmentation=augmentation, drop_last=True)


def _example(example_input: Example | None, validation: Batches) -> tuple[torch.Tensor, ...]:
    if example_input is None:
        return (next(iter(validation.epoch(0)))[0][:2].clone(),)
    return (example_input,) if isinstance(example_input, torch.Tensor) else tuple(example_input)


def meter_for(
    report: Report,
    goal: Target,
    data: Any,
    recipe: Recipe,
    workdir: str | Path | None = None,
    progress: Progress | None = None,
) -> Meter:
    """Of all that the target asks for; with the latencies that an earlier run in the work directory went by.

    A run that goes on must decide as it did before, whatever else has been timed on this machine since.
    """
    known = workdir is not None and any(Path(workdir).glob(LATENCIES))
    info = _expected_info(data, report, goal)
    if recipe.activation_bits is not None:  # of what `quantize` says, the digits alone count
        info["provenance"]["quantization"] = {"method": "mse", "samples": 10**6, "layers": len(report.layers)}
    become = Numbers(narrow=recipe.activation_bits is not None)
    if recipe.bits is not None:
        layers = ranges(recipe.bits, recipe.levels, [layer.name for layer in report.layers])
        become = numbers(middle(layers), recipe.levels)
    return Meter.of(report, goal, info=info, numbers=become, directory=workdir if known else "", progress=progress)


def _claimed(
    folder: Path,
    model: nn.Module,
    meter: Meter,
    goal: Target,
    max_drop: float | None,
    recipe: Recipe,
    data: Any,
    augmentation: Augmentation | None,
) -> Path:
    """The work directory, made if need be, after checking that an earlier run in it was this one."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    settings = {
        "target": goal.given(),
        "max_drop": max_drop,
        "recipe": {name: value for name, value in asdict(recipe).items() if name != "search_workers"},
        "choice of layers": sorted(meter.report.held),
        "weights": digest.hexdigest(),
    }
    if isinstance(data, Dataset):
        settings["data"] = _digest_of(data)
        settings["augmentation"] = None if augmentation is None else asdict(augmentation)
    if "seconds" in goal.measured:
        settings["latency of the dense network (or machine)"] = asdict(meter.dense)["seconds"]
    settings = json.loads(json.dumps(settings))
    path = folder / "run.json"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        try:
            found = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} does not say what the run in {folder} is: {error}") from error
        if found != settings:
            differing = ", ".join(
                key + _options_between(found.get(key), value)
                for key, value in settings.items()
                if found.get(key) != value
            )
            raise ValueError(f"{folder} holds a run with another {differing}; choose another work directory")
    else:
        meter.keep_latencies(folder)
        write_atomically(path, json.dumps(settings, indent=1).encode())
    remove_partial(folder)
    return folder


def _options_between(found: Any, asked: Any) -> str:
    """What differs, as in " (seed 0 there, 5 here)", for what has options; nothing for what has none."""
    if not (isinstance(found, dict) and isinstance(asked, dict)):
        return ""
    names = [name for name in {**found, **asked} if found.get(name, ...) != asked.get(name, ...)]
    said = [f"{n} {found.get(n, 'not said')} there, {asked.get(n, 'not said')} here" for n in names]
    return f" ({'; '.join(said)})"


def _digest_of(data: Dataset) -> str:
    """Tells data sets apart: their shape, all labels and some of the images."""
    some = data.images[:: max(1, len(data) // 256)]
    return hashlib.sha256(f"{data.images.shape}".encode() + data.labels.tobytes() + some.tobytes()).hexdigest()


def _info(data: Any, report: Report, plan: Plan | None, accuracy: dict[str, float], goal: Target) -> dict[str, Any]:
    """What a reader of the saved file wants to know, and `predict` needs."""
    dense, small = report.counts(), report.counts(plan)
    info: dict[str, Any] = {
        "accuracy": accuracy.get("final_test", accuracy["final"]) / 100,
        "original": {"weights": dense.params, "conv_weights": dense.conv, "macs": dense.macs},
        "provenance": {"target": str(goal), "percent": accuracy, "small": asdict(small), "model": report.model_name},
    }
    if isinstance(data, Splits):
        part = data.train
        info |= {"classes": list(part.classes), "mean": list(part.mean), "std": list(part.std)}
        info["provenance"]["data"] = data.name
    return info


def _expected_info(data: Any, report: Report, goal: Target) -> dict[str, Any]:
    """As long as what `_info` will say of the result."""
    accuracy = dict.fromkeys(("base", "final", "base_test", "final_test"), 100 / 7)  # has as many digits as any
    return _info(data, report, None, accuracy, goal)


def _rates(dense: Counts, small: Counts) -> str:
    parts = {"CONV weights": "conv", "all weights": "params", "MACs": "macs", "latency": "seconds", "bytes": "bytes"}
    found = {what: (getattr(dense, n, None) or 0, getattr(small, n, None) or 0) for what, n in parts.items()}
    return ", ".join(f"{before / after:.1f}x {what}" for what, (before, after) in found.items() if after)
