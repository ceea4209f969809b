"""Training: epochs with a schedule, ADMM or masks, distillation, and a checkpoint after every epoch.

A run depends on its configuration, data and seed alone: order, augmentation and dropout of an epoch are derived from
(seed, epoch), and a checkpoint holds everything else, so that a run killed at any moment and continued ends with the
same weights as one that was not.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from autocompress_fast._files import write_atomically
from autocompress_fast._kept import KeptKernels
from autocompress_fast.admm import ADMM
from autocompress_fast.data import Batches, BatchLoader
from autocompress_fast.plan import FixedParameters, MaskedParameters, Plan
from autocompress_fast.progress import Progress
from autocompress_fast.quantize import LevelConstraint, LevelParameters
from autocompress_fast.shrink import Shrinkage, Shrinking
from autocompress_fast.shrink_groups import GroupShrinkage

__all__ = ["Evaluation", "Trainer", "TrainingConfig", "evaluate", "evaluate_together", "recalibrate"]

_CHECKPOINT_VERSION = 1
_PRECISIONS = ("float32", "bfloat16")
_TEACHER_BATCH = 500
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's <malloc.h>
_MOST_KNOWN_LOGITS = 2**26  # 256 MiB of float32


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained.

    Args:
        epochs: number of passes over the training set.
        optimizer: "sgd" (Nesterov momentum) or "adam".
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: L2 on weights of two and more dimensions.
        schedule: "cosine" to zero, "step" (x gamma at each of `milestones`, shares of the run), or "constant".
        warmup: share of the run in which the rate rises linearly.
        milestones, gamma: of "step".
        label_smoothing: of the cross entropy, 0 for none.
        distillation: share of the loss that compares with the teacher, 0 for none.
        temperature: of the softened distributions that are compared.
        dropout: share of the inputs of fully connected layers but the last one that every step leaves out (Srivastava
            et al., 2014), beside what the model itself leaves out.
        precision: "float32", or "bfloat16" for autocast (weights and optimizer stay float32), or "auto": bfloat16 where
            the CPU has instructions for it, unless so little of the network is kept that `kernels` are quicker; a
            checkpoint continues in the precision it began with.
        channels_last: memory layout of images while training.
        kernels: "kept" for convolutions, poolings and batch normalisations by kernels that compute what the plan keeps
            and nothing else, where that is quicker (float32, on the CPU, not compiled); "torch" for torch alone.
        compile: train through torch.compile: a third less time per step for networks with normalisations, after half a
            minute or more at the beginning of every stage; needs a C++ compiler where it runs.
        seed: of everything random.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> config = TrainingConfig(epochs=2, lr=1.0, warmup=0.2)
        >>> [round(config.rate(step, 10), 3) for step in range(10)]
        [0.5, 1.0, 1.0, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038]
    """

    epochs: int
    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    label_smoothing: float = 0.0
    distillation: float = 0.0
    temperature: float = 4.0
    dropout: float = 0.0
    precision: str = "float32"
    channels_last: bool = False
    kernels: str = "kept"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        allowed = {
            "optimizer": ("sgd", "adam"),
            "schedule": ("cosine", "step", "constant"),
            "precision": ("auto", *_PRECISIONS),
            "kernels": ("kept", "torch"),
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise ValueError(f"{field} must be one of {', '.join(values)}, got {getattr(self, field)!r}")
        for field, value in (("epochs", self.epochs), ("seed", self.seed)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{field} must be an int, 0 or more, got {value!r}")
        for field in ("lr", "temperature"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be positive and finite, got {getattr(self, field)}")
        for field in ("weight_decay", "gamma"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be finite and not negative, got {getattr(self, field)}")
        shares = [(field, getattr(self, field)) for field in ("warmup", "momentum", "label_smoothing", "distillation")]
        for field, value in (*shares, *(("milestones", share) for share in self.milestones)):
            if not 0 <= value <= 1:
                raise ValueError(f"{field} must be from 0 to 1, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step`, counted from 0, of `steps`."""
        share = step / max(1, steps)
        if share < self.warmup:
            return self.lr * min(1.0, (step + 1) / (self.warmup * steps))
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (share - self.warmup) / max(1e-9, 1 - self.warmup)))
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(share >= milestone for milestone in self.milestones)
        return self.lr

    def settled(self, model: nn.Module, plan: Plan | None = None) -> TrainingConfig:
        """This, with the precision that "auto" stands for when `model` is trained over what `plan` keeps."""
        if self.precision != "auto":
            return self
        narrow = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
        if narrow and self.kernels == "kept" and not self.compile:
            narrow = not KeptKernels(model, plan).beats_bfloat16
        return replace(self, precision="bfloat16" if narrow else "float32")


@dataclass(frozen=True)
class Evaluation:
    """Result on a data set: accuracy in percent, mean cross entropy, and the number of samples."""

    accuracy: float
    loss: float
    samples: int


def evaluate(
    model: nn.Module, batches: Batches, *, precision: str = "float32", channels_last: bool = False
) -> Evaluation:
    """Accuracy (percent) and mean cross entropy of `model` on one epoch of `batches`, in eval mode.

    The model's training mode and memory layout are as before afterwards.

    Args:
        model: puts out logits.
        batches: (x, y).
        precision: "float32"; "bfloat16" for autocast is quicker and a little less exact.
        channels_last: memory layout of images; quicker for many networks.

    Raises:
        ValueError: there is no batch, or an unknown precision.

    Example:
        >>> from autocompress_fast.data import UserBatches
        >>> points = torch.tensor([[2.0, 0.0], [0.0, 2.0], [3.0, 1.0], [1.0, 0.0]])
        >>> evaluate(nn.Identity(), UserBatches([(points, torch.tensor([0, 1, 0, 1]))])).accuracy
        75.0
    """
    return evaluate_together([model], batches, precision=precision, channels_last=channels_last)[0]


def evaluate_together(
    models: Sequence[nn.Module], batches: Batches, *, precision: str = "float32", channels_last: bool = False
) -> list[Evaluation]:
    """`evaluate` for several models that see the same batches, which are read once."""
    correct, losses, samples = [0] * len(models), [0.0] * len(models), 0
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(_PRECISIONS)}, got {precision!r}")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    layout = _laid_out(models, channels_last=True) if channels_last else nullcontext()
    with _modes_put_back(models), layout, torch.no_grad(), autocast:
        for model in models:
            model.eval()
        for x, y in batches.epoch(0):
            if channels_last and x.ndim == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            for index, model in enumerate(models):
                logits = model(x).float()
                correct[index] += int((logits.argmax(dim=1) == y).sum())
                losses[index] += float(F.cross_entropy(logits, y, reduction="sum"))
            samples += len(y)
    if samples == 0:
        raise ValueError("there is no batch to evaluate on")
    return [Evaluation(100.0 * c / samples, loss / samples, samples) for c, loss in zip(correct, losses, strict=True)]


def recalibrate(
    model: nn.Module, batches: Iterable[Any], *, precision: str = "float32", channels_last: bool = False
) -> None:
    """Measure the running statistics of batch normalisations anew, in place, on some batches (x, y).

    What was pruned before a normalisation shifts what arrives there; its old statistics then cost accuracy that the
    first steps of training would win back. Nothing else changes.

    Args:
        model: with normalisations that track statistics, or without.
        batches: of training data; the statistics are the means over all of them.
        precision, channels_last: as for `evaluate`.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> recalibrate(norm, [(torch.tensor([[1.0], [3.0]]), torch.zeros(2))])
        >>> norm.running_mean, norm.running_var, norm.training
        (tensor([2.]), tensor([2.]), True)
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    layout = _laid_out([model], channels_last=True) if channels_last else nullcontext()
    with _modes_put_back([model]), layout, torch.no_grad(), autocast:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        try:
            for x, _ in batches:
                model(x.contiguous(memory_format=torch.channels_last) if channels_last and x.ndim == 4 else x)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


class Trainer:
    """Trains a model in place, with a checkpoint after every epoch.

    The model's modes and memory layout are as before afterwards, and the global random generators are not touched.

    Args:
        model: trained in place.
        train: batches; `train.epoch(i)` is read in epoch i.
        config: how.
        validation: evaluated after every epoch, when given.
        teacher: the network to compare with when `config.distillation` is above 0; in eval mode.
        admm: its penalty is added to the loss; updated at the end of every `admm_every`-th epoch.
        plan: what of the weights is kept; the rest stays zero.
        fixed: parameter -> bools of its shape: values that stay as they are.
        levels: layer -> on which levels its weights are while they train (`LevelParameters`), and after it.
        shrinkage: towards which weights shrink meanwhile (`ShrunkParameters`).
        checkpoint: file that is written after every epoch; when it exists, the run goes on from there.
        log: file to which a line of JSON is added after every epoch.
        name: of this stage, in the log and the progress.
        progress: told about every batch.

    Raises:
        ValueError: distillation without a teacher, admm_every below 1.

    Example:
        >>> from autocompress_fast.data import UserBatches
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 2)
        >>> train = UserBatches([(x, (x[:, 0] > 0).long())])
        >>> model = nn.Linear(2, 2)
        >>> rows = Trainer(model, train, TrainingConfig(epochs=20, lr=1.0)).run()
        >>> rows[-1]["epoch"], evaluate(model, train).accuracy > 90
        (20, True)
    """

    def __init__(
        self,
        model: nn.Module,
        train: Batches,
        config: TrainingConfig,
        *,
        validation: Batches | None = None,
        teacher: nn.Module | None = None,
        admm: ADMM | None = None,
        admm_every: int = 1,
        plan: Plan | None = None,
        fixed: Mapping[str, torch.Tensor] | None = None,
        levels: Mapping[str, LevelConstraint] | None = None,
        shrinkage: Shrinkage | GroupShrinkage | None = None,
        checkpoint: Path | None = None,
        log: Path | None = None,
        name: str = "training",
        progress: Progress | None = None,
    ) -> None:
        if config.distillation > 0 and teacher is None:
            raise ValueError(f"distillation={config.distillation} needs a teacher, got none")
        if admm_every < 1:
            raise ValueError(f"admm_every must be 1 or more, got {admm_every}")
        self.model, self.train, self.config, self.validation = model, train, config.settled(model, plan), validation
        self._chosen = config.precision == "auto"  # then that of a checkpoint counts
        self.teacher = teacher if config.distillation > 0 else None
        self.admm, self.admm_every, self.plan, self.fixed = admm, admm_every, plan, fixed or {}
        self.levels = levels or {}
        self._levels: Mapping[str, torch.Tensor] | None = None  # the state of a LevelParameters
        self.shrinkage = shrinkage
        self._shrunk: Shrinking | None = None
        self._shrunk_state: Mapping[str, torch.Tensor] | None = None
        self.checkpoint, self.log, self.name = checkpoint, log, name
        self.progress = progress or Progress()
        self.history: list[dict[str, Any]] = []
        self._known_logits: torch.Tensor | None = None
        # The compiled functions share their parameters with the models, which stay what they are.
        self._forward: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model) if config.compile else model
        compiles = config.compile and self.teacher is not None
        self._teach: Any = torch.compile(self.teacher) if compiles else self.teacher
        self._kernels: AbstractContextManager[Any] = nullcontext()
        if config.kernels == "kept" and not config.compile:
            self._kernels = KeptKernels(model, plan)
        self.optimizer = _optimizer(model, config)

    def run(self) -> list[dict[str, Any]]:
        """Train to the end; return a row of metrics per epoch. Ctrl-C loses no more than the epoch under way.

        Raises:
            FloatingPointError: the loss or a weight is NaN or infinite.
            ValueError: the checkpoint is damaged or of another run; nothing is changed then.
        """
        models = [self.model] if self.teacher is None else [self.model, self.teacher]
        laid_out = _laid_out(models, channels_last=self.config.channels_last)
        with _modes_put_back(models), laid_out, _freed_memory_kept():
            if self.checkpoint is not None and self.checkpoint.exists():
                self._load(self.checkpoint)
            self._rewrite_log()
            done, batches = len(self.history), len(self.train)
            if done == self.config.epochs:
                return self.history
            if self.teacher is not None:
                self._known_logits = _known_logits(self.teacher.eval(), self.train)
            self.progress.start(self.name, self.config.epochs * batches, done * batches)
            masks = nullcontext() if self.plan is None else MaskedParameters(self.model, self.plan, self.optimizer)
            fixed = FixedParameters(self.model, self.fixed, self.optimizer)
            levels = LevelParameters(self.model, self.levels, self.optimizer, state=self._levels)
            self._levels = levels.state_dict()
            shrunk: AbstractContextManager[Any] = nullcontext()
            if self.shrinkage is not None:
                shrunk = self._shrunk = self.shrinkage.attach(self.model, self.optimizer, self._shrunk_state)
                self._shrunk_state = self._shrunk.state_dict()
            with masks, fixed, levels, shrunk, _dropout(self.model, self.config.dropout):
                for epoch in range(done, self.config.epochs):
                    self._epoch(epoch)
        self.progress.finish()
        return self.history

    def _epoch(self, epoch: int) -> None:
        begun = time.monotonic()
        _train_mode(self.model)
        total = torch.zeros(())
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.seed * 1_000_003 + epoch)
            for number, ((x, y), expected) in enumerate(
                zip(self.train.epoch(epoch), self._expected(epoch), strict=False)
            ):
                total += self._step(x, y, expected, epoch * len(self.train) + number)
                self.progress.advance()
        row: dict[str, Any] = {"stage": self.name, "epoch": epoch + 1, "loss": float(total) / len(self.train)}
        if not math.isfinite(row["loss"]) or not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise FloatingPointError(
                f"{self.name}: training diverged in epoch {epoch + 1} (loss {row['loss']:g}, or a weight, is NaN or "
                f"infinite); a learning rate below {self.config.lr:g} may help. "
                "The checkpoint of the epoch before is kept."
            )
        if self.admm is not None and (epoch + 1) % self.admm_every == 0:
            residuals = self.admm.update().values()
            row["rho"] = self.admm.rho
            row["primal"] = max(r.primal for r in residuals)
            row["dual"] = max(r.dual for r in residuals)
        if self._shrunk is not None:
            row["left"] = self._shrunk.left
            row["strength"] = self._shrunk.strength
        if self.validation is not None:
            row["validation"] = evaluate(self.model, self.validation).accuracy
        row["seconds"] = round(time.monotonic() - begun, 2)
        self.history.append(row)
        self._save()
        self._append_log(row)
        parts = [f"loss {row['loss']:.4f}"]
        parts += [f"{key} {row[key]:.3g}" for key in ("primal", "dual") if key in row]
        parts += [f"{row['left']:,} weights left"] if "left" in row else []
        parts += [f"validation {row['validation']:.2f}%"] if "validation" in row else []
        self.progress.tell(", ".join(parts))

    def _expected(self, epoch: int) -> Iterator[torch.Tensor | None]:
        """The teacher's logits for every batch of the epoch where they are known beforehand, else None."""
        if self._known_logits is None:
            return itertools.repeat(None)
        assert isinstance(self.train, BatchLoader)
        known = self._known_logits
        return (known[torch.from_numpy(chosen)] for chosen in self.train.indices(epoch))

    def _step(self, x: torch.Tensor, y: torch.Tensor, expected: torch.Tensor | None, step: int) -> torch.Tensor:
        """One optimizer step; returns the loss without the ADMM penalty."""
        rate = self.config.rate(step, self.config.epochs * len(self.train))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.config.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if self._shrunk is not None and self.config.compile:
            self._shrunk.measure(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bfloat16"), self._kernels:
            logits = self._forward(x)
            if self.teacher is not None and expected is None:
                with torch.no_grad():
                    expected = self._teach(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=self.config.label_smoothing)
        if expected is not None:
            share = self.config.distillation
            loss = (1 - share) * loss + share * _distance(logits.float(), expected.float(), self.config.temperature)
        whole = loss if self.admm is None else loss + self.admm.penalty()
        self.optimizer.zero_grad(set_to_none=True)
        whole.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        from safetensors.torch import save

        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        numbers: dict[str, float] = {}
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value
                elif value is not None:
                    numbers[f"{index}.{key}"] = value
        updates = None
        if self.admm is not None:
            state = self.admm.state_dict()
            updates = state["updates"]
            tensors |= {f"admm.{part}.{name}": v for part in ("z", "u") for name, v in state[part].items()}
        tensors |= {f"levels.{name}": value for name, value in (self._levels or {}).items()}
        tensors |= {f"shrunk.{name}": value for name, value in (self._shrunk_state or {}).items()}
        described = {
            "version": _CHECKPOINT_VERSION,
            "name": self.name,
            "run": self._described(),
            "history": self.history,
            "optimizer": numbers,
            "updates": updates,
        }
        # clone: parameters that share memory, and strided views, are no business of the file
        tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
        text = json.dumps(described)
        write_atomically(self.checkpoint, save(tensors, {"trainer": text, "crc32": _checksum(text, tensors)}))

    def _described(self) -> dict[str, Any]:
        """What a checkpoint must have in common with this run, as JSON gives it back."""
        described: dict[str, Any] = {**asdict(self.config), "batches": len(self.train)}
        if self.admm is not None:
            described["constraints"] = {name: asdict(c) for name, c in self.admm.constraints.items()}
            described["rho"] = asdict(self.admm.rho_schedule)
            described["admm_every"] = self.admm_every
        if self.plan is not None:
            digest = hashlib.sha256()
            for name, layer in self.plan.items():
                for part in (layer.mask(), layer.filters):
                    digest.update(name.encode() + np.packbits(part).tobytes())
            described["plan"] = digest.hexdigest()
        if self.levels:
            described["levels"] = {name: asdict(constraint) for name, constraint in self.levels.items()}
        if self.shrinkage is not None:
            described["shrinkage"] = self.shrinkage.described()
        if self.fixed:
            digest = hashlib.sha256()
            for name, stays in self.fixed.items():
                digest.update(name.encode() + np.packbits(stays.cpu().numpy()).tobytes())
            described["fixed"] = digest.hexdigest()
        decoded: dict[str, Any] = json.loads(json.dumps(described))
        return decoded

    def _load(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            text = metadata["trainer"]
            if metadata["crc32"] != _checksum(text, tensors):
                raise ValueError("its checksum is wrong")
            described = json.loads(text)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged, or no checkpoint of a training: {error}") from error
        if described["version"] != _CHECKPOINT_VERSION or described["name"] != self.name:
            raise ValueError(f"{path} is of {described['name']!r}, version {described['version']}, not {self.name!r}")
        found, expected = described["run"], self._described()
        if self._chosen and found.get("precision") in _PRECISIONS:
            expected["precision"] = found["precision"]
        if found != expected:
            differing = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
            raise ValueError(f"{path} is of a run with another {', '.join(differing)}; delete it or use its settings")
        part = _parts(tensors)
        shapes = {name: (tuple(value.shape), value.dtype) for name, value in part("model.").items()}
        for name, value in self.model.state_dict().items():
            if shapes.pop(name, None) != (tuple(value.shape), value.dtype):
                raise ValueError(f"{path} is of another model: {name} is {tuple(value.shape)}, {value.dtype} here")
        if shapes:
            raise ValueError(f"{path} is of another model: it has {', '.join(shapes)}, which is not here")
        if self.admm is not None:
            self.admm.load_state_dict({"updates": described["updates"], "z": part("admm.z."), "u": part("admm.u.")})
        if self.levels:
            self._levels = part("levels.")
        if self.shrinkage is not None:
            self._shrunk_state = part("shrunk.")
        self.config = replace(self.config, precision=expected["precision"])
        self.model.load_state_dict(part("model."))
        self._load_optimizer({**part("optimizer."), **described["optimizer"]})
        self.history = described["history"]

    def _load_optimizer(self, entries: Mapping[str, Any]) -> None:
        """Set the optimizer's state from entries "index.key", laid out in memory as the parameters are."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        states: dict[int, dict[str, Any]] = {}
        for name, value in entries.items():
            index, _, key = name.partition(".")
            like = parameters[int(index)]
            if isinstance(value, torch.Tensor) and value.shape == like.shape:
                value = torch.empty_like(like, requires_grad=False).copy_(value)
            states.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})

    def _rewrite_log(self) -> None:
        """The log as the checkpoint has it: an epoch that was logged twice, or not at all, stands there once."""
        if self.log is None:
            return
        rows = [row for row in _read_log(self.log) if row.get("stage") != self.name] + self.history
        write_atomically(self.log, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def _append_log(self, row: dict[str, Any]) -> None:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps(row) + "\n")


@contextmanager
def _freed_memory_kept() -> Iterator[None]:
    """Freed memory is used again inside, and given back to the system at the end.

    Every step frees activations of megabytes. glibc gives those back at once, and the next step gets them anew, page
    by page: 3,000 page faults a step, a fifth of its time, for ResNet-20 with batches of 128.
    """
    libc: Any = ctypes.CDLL(None) if os.name == "posix" else None
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):  # another C library
        yield
        return
    for option, value in ((_M_MMAP_THRESHOLD, 2**25), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26)):
        libc.mallopt(option, value)
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, 2**27)
        libc.mallopt(_M_TOP_PAD, 2**17)
        libc.malloc_trim(0)


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a line that was cut off when the machine stopped is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


@contextmanager
def _modes_put_back(models: Iterable[nn.Module]) -> Iterator[None]:
    """Every module trains or not, after the context, as it did before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _laid_out(models: Iterable[nn.Module], *, channels_last: bool) -> Iterator[None]:
    """Weights of four dimensions lie in memory as wanted inside the context, and as they did before after it."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    strides = {p: p.stride() for model in models for p in model.parameters() if p.ndim == 4}
    try:
        for parameter in strides:
            parameter.data = parameter.data.contiguous(memory_format=layout)
        yield
    finally:
        for parameter, stride in strides.items():
            if parameter.stride() != stride:
                before = torch.empty_strided(parameter.shape, stride, dtype=parameter.dtype, device=parameter.device)
                parameter.data = before.copy_(parameter.data)


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    total = zlib.crc32(text.encode())
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), total))
    return str(total)


def _known_logits(teacher: nn.Module, train: Batches) -> torch.Tensor | None:
    """The teacher's logits of the whole training set, when its images are the same in every epoch."""
    if not isinstance(train, BatchLoader) or train.augmentation is not None:
        return None
    in_order = BatchLoader(train.dataset, _TEACHER_BATCH, device=train.device)
    with torch.no_grad():
        logits: list[torch.Tensor] = []
        for x, _ in in_order.epoch(0):
            logits.append(teacher(x).float())
            if logits[0].shape[1] * len(train.dataset) > _MOST_KNOWN_LOGITS:
                return None
    return torch.cat(logits)


def _train_mode(model: nn.Module) -> None:
    """Training mode, but for batch normalisations that the user froze: they keep their statistics."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and own and not any(p.requires_grad for p in own):
            module.eval()


@contextmanager
def _dropout(model: nn.Module, share: float) -> Iterator[None]:
    """Fully connected layers that train get their inputs without a random `share` of them inside the context.

    Not the last one: LeNet-5 with 7,000 weights loses by that what it gains before it.
    """

    def left_out(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (F.dropout(inputs[0], share, layer.training), *inputs[1:])

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)] if share > 0 else []
    hooks = [layer.register_forward_pre_hook(left_out) for layer in layers[:-1]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=config.lr, foreach=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, foreach=True)


def _distance(logits: torch.Tensor, expected: torch.Tensor, temperature: float) -> torch.Tensor:
    """Kullback-Leibler divergence of the softened distributions, times T^2 to keep the gradient's size."""
    ours, theirs = F.log_softmax(logits / temperature, dim=1), F.log_softmax(expected / temperature, dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def _parts(tensors: Mapping[str, torch.Tensor]) -> Callable[[str], dict[str, torch.Tensor]]:
    return lambda prefix: {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}
