"""ADMM training towards a structured constraint (arXiv 1903.09769, section III; scaled dual form).

    minimise f(W)  subject to  W_l in S_l      S_l: at most so many filters, columns, channels or weights are non-zero

is split into W, trained by any optimizer, and Z in S, with the scaled dual U:

    W <- argmin f(W) + sum_l rho/2 * ||W_l - Z_l + U_l||_F^2       some epochs of training: `ADMM.penalty`
    Z <- P_S(W + U),   U <- U + W - Z                              `ADMM.update`
    W <- P_S(W)                                                    at the end: `ADMM.finish`
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from autocompress_fast import ops
from autocompress_fast._baked import check_plain
from autocompress_fast.graph import oriented
from autocompress_fast.plan import LayerPlan, Plan, apply_masks, filled
from autocompress_fast.quantize import LevelConstraint
from autocompress_fast.trace import check_unwrapped

if TYPE_CHECKING:
    import torch

    from autocompress_fast.graph import Report

BoolArray = npt.NDArray[np.bool_]

__all__ = ["ADMM", "Constraint", "Residuals", "RhoSchedule", "projected"]

_STRUCTURES = ("filter", "channel", "column", "element", "filter+column")


@dataclass(frozen=True)
class Constraint:
    """What may be non-zero in one layer's weight.

    Args:
        structure: "filter", "channel", "column", "element", or "filter+column" for both at once.
        keep: number of groups that may stay; for "filter+column" the pair (filters, columns).
        groups: of a grouped convolution.

    Raises:
        ValueError: an unknown structure or a count below 1.
        TypeError: counts that are no ints, or no pair for "filter+column".

    Example:
        >>> import numpy as np
        >>> Constraint("filter+column", (1, 1)).project(np.array([[3.0, 1.0], [2.0, 2.5]]))
        array([[3., 0.],
               [0., 0.]])
    """

    structure: str
    keep: int | tuple[int, int]
    groups: int = 1

    def __post_init__(self) -> None:
        if self.structure not in _STRUCTURES:
            raise ValueError(f"structure must be one of {', '.join(_STRUCTURES)}, got {self.structure!r}")
        counts = self.keep if isinstance(self.keep, (tuple, list)) else (self.keep,)
        if len(counts) != (2 if self.structure == "filter+column" else 1):
            raise TypeError(f"keep of {self.structure!r} must be {_keep_form(self.structure)}, got {self.keep!r}")
        for count in counts:
            if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
                raise TypeError(f"keep of {self.structure!r} must be {_keep_form(self.structure)}, got {self.keep!r}")
            if count < 1:
                raise ValueError(f"keep must be at least 1, got {self.keep!r}")
        if isinstance(self.groups, bool) or not isinstance(self.groups, (int, np.integer)) or self.groups < 1:
            raise ValueError(f"groups must be an int, 1 or more, got {self.groups!r}")
        pair = self.structure == "filter+column"
        object.__setattr__(self, "keep", tuple(map(int, counts)) if pair else int(counts[0]))
        object.__setattr__(self, "groups", int(self.groups))

    def project(self, weight: Any) -> Any:
        """The nearest point to `weight` (numpy or torch) that meets the constraint.

        Raises:
            ValueError: counts that do not fit the weight, NaN or infinity in it.
        """
        if isinstance(self.keep, int):
            return ops.project(weight, self.structure, keep=self.keep, groups=self.groups)
        filters, columns = self.keep
        return ops.project_filters_and_columns(weight, filters=filters, columns=columns, groups=self.groups)


@dataclass(frozen=True)
class RhoSchedule:
    """Penalty strength over the updates: multiplied by `factor` after every `every` updates, up to `maximum`.

    factor=1.3 per update is the papers' released "multi-rho"; factor=10, every=k gives their stages 1e-4 ... 1e-1.

    Raises:
        ValueError: rho not positive, factor below 1 (rho must not fall), every below 1, maximum below initial.

    Example:
        >>> [RhoSchedule(1e-4, factor=10, every=2, maximum=1e-2).at(updates) for updates in (0, 1, 2, 4, 99)]
        [0.0001, 0.0001, 0.001, 0.01, 0.01]
    """

    initial: float = 1e-3
    factor: float = 1.3
    every: int = 1
    maximum: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.initial < math.inf and 1 <= self.factor < math.inf and self.every >= 1):
            raise ValueError(f"rho needs initial > 0, factor >= 1 and every >= 1, got {self}")
        if not self.initial <= self.maximum < math.inf:
            raise ValueError(f"maximum of rho must be finite and {self.initial} or more, got {self.maximum}")

    def at(self, updates: int) -> float:
        """Rho after that many updates."""
        exponent = updates // self.every
        if self.factor > 1 and exponent * math.log(self.factor) >= math.log(self.maximum / self.initial):
            return self.maximum
        return self.initial * self.factor**exponent


@dataclass(frozen=True)
class Residuals:
    """Convergence of one layer after an update: both go to zero (equations of the papers' stopping rule).

    primal: ||W - Z||_F / ||W||_F; dual: ||Z - Z_before||_F / ||W||_F.
    """

    primal: float
    dual: float


class ADMM:
    """Pulls the weights of some layers towards a structure, in the user's own training loop.

    Args:
        model: trained in place by the caller; only `finish` changes it.
        constraints: per layer (module path) what may stay non-zero, or on which levels the weights are to lie.
        rho: strength of the penalty over the updates; a number for a constant one.
        report: of `acf.inspect` on the model. Filters that are tied to each other are then kept or dropped together, by
            their joint norm, as many as the smallest number that one of their layers may keep; and as a dropped filter
            leaves a channel that carries nothing, columns are kept on living channels alone.

    Raises:
        ValueError: no constraint, an unknown layer, one that computes its weight (`acf.baked` makes it plain) or is
            excluded from the report, counts that do not fit its weight, NaN or infinity in a weight, a model wrapped
            in DistributedDataParallel.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 2))
        >>> admm = ADMM(model, {"0": Constraint("filter", keep=4)}, rho=0.1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        >>> for epoch in range(3):
        ...     for _ in range(5):  # batches
        ...         x, y = torch.randn(16, 1, 8, 8), torch.randint(2, (16,))
        ...         loss = torch.nn.functional.cross_entropy(model(x), y) + admm.penalty()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         _ = optimizer.step()
        ...     residuals = admm.update()
        >>> plan = admm.finish()
        >>> int(plan["0"].filters.sum()), int((model[0].weight.abs().sum((1, 2, 3)) > 0).sum())
        (4, 4)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        constraints: Mapping[str, Constraint | LevelConstraint],
        *,
        rho: RhoSchedule | float | None = None,
        report: Report | None = None,
    ) -> None:
        import torch

        check_unwrapped(model)
        if not constraints:
            raise ValueError("constraints must name at least one layer, got none")
        if rho is None:
            rho = RhoSchedule()
        self.rho_schedule = rho if isinstance(rho, RhoSchedule) else RhoSchedule(rho, factor=1.0, maximum=rho)
        self.report = report
        order = [layer.name for layer in report.layers if layer.name in constraints] if report is not None else []
        self.constraints = {name: constraints[name] for name in (*order, *constraints)}
        self.model = model
        self.updates = 0
        self._weights: dict[str, torch.nn.Parameter] = {}
        modules = dict(model.named_modules())
        for name in self.constraints:
            if name in modules:
                check_plain("constraints", name, modules[name])
            weight = getattr(modules.get(name), "weight", None)
            if not isinstance(weight, torch.nn.Parameter) or weight.ndim < 2:
                raise ValueError(f"constraints names {name!r}, which is no layer of the model with a weight matrix")
            self._weights[name] = weight
        if report is not None:
            _check_report(report, self._weights)
        self.z = {name: z for name, (z, _) in self._projected(self.constraints).items()}
        self.u = {name: torch.zeros_like(z) for name, z in self.z.items()}
        self._set_targets()

    @property
    def rho(self) -> float:
        """The present strength of the penalty."""
        return self.rho_schedule.at(self.updates)

    def penalty(self) -> torch.Tensor:
        """sum_l rho/2 * ||W_l - Z_l + U_l||_F^2, to be added to the loss; a scalar.

        Z and U are constants here: the gradient is rho * (W - Z + U).
        """
        import torch

        terms = [(weight - self._targets[name]).square().sum() for name, weight in self._weights.items()]
        return torch.stack(terms).sum() * (0.5 * self.rho)

    def update(self) -> dict[str, Residuals]:
        """Z <- P(W + U), U <- U + W - Z, then the next rho, with U scaled by rho_old / rho_new.

        Returns:
            the residuals per layer.

        Raises:
            ValueError: NaN or infinity in a weight; nothing is changed then.
        """
        self._check_finite()
        values = {name: self._plain(name) for name in self.constraints}
        rows = _tied_rows({name: w + self.u[name] for name, w in values.items()}, self.constraints, self.report)
        residuals = {}
        living = _Living(self.report, rows)
        for name, constraint in self.constraints.items():
            weight, z, u = values[name], self.z[name], self.u[name]
            norm, outside = float(weight.norm()) or 1.0, 0.0
            if (dead := living.dead_columns(name, weight)) is not None:
                alive = weight.masked_fill(dead, 0)
                outside = float((weight - alive).norm())
                weight = alive
                u.masked_fill_(dead, 0)
            if name in rows or isinstance(constraint, LevelConstraint):
                primal, dual = self._update_by_projecting(weight, z, u, constraint, rows.get(name))
            else:
                keep, groups = constraint.keep, constraint.groups
                result = ops.admm_update(weight, z, u, constraint.structure, keep=keep, groups=groups)
                primal, dual = result.primal, result.dual
            living.found(name, _nonzero(z))
            residuals[name] = Residuals(math.hypot(primal, outside) / norm, dual / norm)
        before = self.rho
        self.updates += 1
        if self.rho != before:
            for u in self.u.values():
                u.mul_(before / self.rho)
        self._set_targets()
        return residuals

    def plan(self, constraints: Mapping[str, Constraint | LevelConstraint] | None = None) -> Plan:
        """What the projection of the weights as they are keeps, P(W); nothing is changed.

        Args:
            constraints: project onto these, of the same layers, instead of the ones trained towards.

        Raises:
            ValueError: NaN or infinity in a weight, other layers, counts that do not fit.
        """
        constraints = self.constraints if constraints is None else constraints
        if set(constraints) != set(self.constraints):
            raise ValueError(f"constraints must name {sorted(self.constraints)}, got {sorted(constraints)}")
        return _plan(self._projected(constraints), constraints, self.report)

    def finish(self) -> Plan:
        """Project the weights themselves, W <- P(W), and return what is kept.

        A dropped filter loses its bias, too. Continue with masked retraining (`MaskedParameters`).

        Raises:
            ValueError: NaN or infinity in a weight; nothing is changed then.
        """
        plan = self.plan()
        apply_masks(self.model, plan)
        return plan

    def check_ranks(self) -> None:
        """Check that all ranks of `torch.distributed` have the same constraints, weights, Z and U, bit for bit.

        A digest of each is sent, so every rank has to call this; without distributed training nothing happens. Z and U
        follow from the weights, which DistributedDataParallel keeps the same on all ranks. They differ when ADMM was
        made before the weights were the same, with constraints of a rank's own, or on devices of several kinds, which
        may add in different orders (processors do not).

        Raises:
            RuntimeError: on every rank; says what differs.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return
        own = {"the constraints": repr((sorted(self.constraints.items()), self.rho_schedule, self.updates))}
        for part, values in (("weight", self._weights), ("Z", self.z), ("U", self.u)):
            own |= {f"{part} of {name!r}": _digest(value) for name, value in values.items()}
        everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        first = everyone[0]
        if differing := [what for what in first if any(other.get(what) != first[what] for other in everyone)]:
            raise RuntimeError(
                f"the ranks differ in {', '.join(differing[:3])}{', ...' * (len(differing) > 3)}: make ADMM after "
                "DistributedDataParallel, which gives all ranks the weights of rank 0, and with the same constraints"
            )

    def state_dict(self) -> dict[str, Any]:
        """Z, U and the number of updates; tensors and ints only."""
        return {
            "updates": self.updates,
            "z": {name: z.clone() for name, z in self.z.items()},
            "u": {name: u.clone() for name, u in self.u.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: another set of layers or other shapes; nothing is changed then.
        """
        for part in ("z", "u"):
            shapes = {name: tuple(value.shape) for name, value in state.get(part, {}).items()}
            expected = {name: tuple(value.shape) for name, value in self.z.items()}
            if shapes != expected:
                raise ValueError(f"the state's {part} has layers {shapes}, expected {expected}")
        self.updates = int(state["updates"])
        for name in self.z:
            self.z[name].copy_(state["z"][name])
            self.u[name].copy_(state["u"][name])
        self._set_targets()

    def _check_finite(self) -> None:
        for name, weight in self._weights.items():
            # A sum that is finite has finite terms, and takes less to find out; finite terms may still overflow in it.
            if not bool(weight.detach().sum().isfinite()) and not bool(weight.detach().isfinite().all()):
                wrong = int((~weight.detach().isfinite()).sum())
                raise ValueError(
                    f"the weight of {name!r} has {wrong} values that are NaN or infinite; training diverged"
                )

    def _projected(
        self, constraints: Mapping[str, Constraint | LevelConstraint]
    ) -> dict[str, tuple[torch.Tensor, BoolArray]]:
        """P(W) of every layer in turn, and where it is not zero; tied filters together, columns on living channels."""
        self._check_finite()
        return _projected({name: self._plain(name) for name in self.constraints}, constraints, self.report)

    def _update_by_projecting(
        self,
        weight: torch.Tensor,
        z: torch.Tensor,
        u: torch.Tensor,
        constraint: Constraint | LevelConstraint,
        rows: npt.NDArray[np.bool_] | None,
    ) -> tuple[float, float]:
        """Z and U of a layer whose filters have been chosen, or that is to lie on levels; as `ops.admm_update` does it.

        Returns the norms of W - Z and of the change of Z.
        """
        v = weight + u
        new = constraint.project(v if rows is None else v.masked_fill(_row_mask(~rows, v), 0))
        dual = float((new - z).norm())
        z.copy_(new)
        u.copy_(v - new)
        return float((weight - new).norm()), dual

    def _plain(self, name: str) -> torch.Tensor:
        """A layer's weight as (P, C / groups, ...), without its graph, contiguous."""
        return _plain(
            oriented(self._weights[name].detach(), _groups(self.constraints[name]), transposed=self._turned(name))
        )

    def _turned(self, name: str) -> bool:
        return self.report is not None and self.report[name].transposed

    def _set_targets(self) -> None:
        """Z - U in the memory format of the weight, so that a training step does one subtraction per layer."""
        import torch

        self._targets = {
            name: torch.empty_like(weight)
            .copy_(
                oriented(self.z[name] - self.u[name], _groups(self.constraints[name]), transposed=self._turned(name))
            )
            .detach()
            for name, weight in self._weights.items()
        }


def projected(report: Report, constraints: Mapping[str, Constraint]) -> Plan:
    """What the projection of the weights that a report is on keeps: as `ADMM.plan` of the model, without it.

    Raises:
        ValueError: counts that do not fit a layer, NaN or infinity in a weight.
    """
    values = {layer.name: _plain(report.weight(layer.name)) for layer in report.layers if layer.name in constraints}
    return _plan(_projected(values, constraints, report), constraints, report)


def _projected(
    values: Mapping[str, torch.Tensor],
    constraints: Mapping[str, Constraint | LevelConstraint],
    report: Report | None,
) -> dict[str, tuple[torch.Tensor, BoolArray]]:
    """P(W) of every layer in turn, and where it is not zero; tied filters together, columns on living channels."""
    rows = _tied_rows(values, constraints, report)
    living = _Living(report, rows)
    found: dict[str, tuple[torch.Tensor, BoolArray]] = {}
    for name, weight in values.items():
        if (dead := living.dead_columns(name, weight)) is not None:
            weight = weight.masked_fill(dead, 0)
        if name in rows:
            weight = weight.masked_fill(_row_mask(~rows[name], weight), 0)
        try:
            projection = constraints[name].project(weight)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        found[name] = projection, _nonzero(projection)
        living.found(name, found[name][1])
    return found


def _plan(
    projections: Mapping[str, tuple[torch.Tensor, BoolArray]],
    constraints: Mapping[str, Constraint | LevelConstraint],
    report: Report | None,
) -> Plan:
    """What is not zero of projected weights."""
    plans = {}
    for name, (_, kept) in projections.items():
        transposed = report is not None and report[name].transposed
        constraint, groups = constraints[name], _groups(constraints[name])
        if isinstance(constraint, LevelConstraint) or constraint.structure == "element":
            plans[name] = replace(LayerPlan.from_mask(kept, groups), transposed=transposed)
        else:  # single zeros inside kept filters and columns (exact zeros happen) are no constraint
            plans[name] = LayerPlan(kept.shape, *filled(kept, groups), None, groups, transposed)
    return Plan(plans) if report is None else Plan(plans).tied(report)


def _tied_rows(
    values: Mapping[str, torch.Tensor],
    constraints: Mapping[str, Constraint | LevelConstraint],
    report: Report | None,
) -> dict[str, npt.NDArray[np.bool_]]:
    """Layer -> which of its filters stay, for layers whose filters are tied: those with the largest joint norm."""
    pruned = {name: c for name, c in constraints.items() if isinstance(c, Constraint)}
    rows: dict[str, npt.NDArray[np.bool_]] = {}
    for tied in report.sets if report is not None else ():
        members = [name for name in tied.layers if name in pruned and "filter" in pruned[name].structure]
        whole = all((tied.rows[name] >= 0).all() and tied.size == len(tied.rows[name]) for name in members)
        if not members or (len(tied.layers) == 1 and whole):
            continue
        norms = {name: _plain(values[name]).double().flatten(1).norm(dim=1).cpu().numpy() for name in members}
        norms |= {name: np.zeros(len(tied.rows[name])) for name in tied.layers if name not in norms}
        keep = {name: pruned[name].keep for name in members}
        counts = {name: k[0] if isinstance(k, tuple) else k for name, k in keep.items()}
        groups = min(tied.groups(name, count) for name, count in counts.items())
        chosen = np.append(tied.chosen(tied.joint(norms), groups), True)  # the last is for frozen filters
        rows.update({name: chosen[tied.rows[name]] for name in members})
    return rows


class _Living:
    """Which channels carry anything, as far as the filters of the layers before are chosen."""

    def __init__(self, report: Report | None, rows: Mapping[str, npt.NDArray[np.bool_]]) -> None:
        self.report = report
        layers = report.layers if report is not None else ()
        self.filters = {layer.name: rows.get(layer.name, np.ones(layer.shape[0], bool)) for layer in layers}

    def found(self, name: str, kept: BoolArray) -> None:
        """A layer's filters are chosen: those of which anything is kept."""
        if self.report is not None:
            self.filters[name] = kept.reshape(len(kept), -1).any(axis=1).ravel()

    def dead_columns(self, name: str, weight: torch.Tensor) -> torch.Tensor | None:
        """Bool, of the weight's shape: the columns of channels to which nothing arrives; None when all live."""
        import torch

        if self.report is None:
            return None
        layer = self.report[name]
        living = self.report.living_columns(self.report.channels.alive(self.filters), name)
        if living.all():
            return None
        blocks = torch.from_numpy(~living).reshape(layer.groups, 1, -1)
        rows = layer.shape[0] // layer.groups
        return blocks.expand(layer.groups, rows, blocks.shape[2]).reshape(layer.shape).to(weight.device)


def _check_report(report: Report, weights: Mapping[str, torch.nn.Parameter]) -> None:
    for name, weight in weights.items():
        if name not in report:
            raise ValueError(f"constraints names {name!r}, which the report does not have")
        if held := report[name].held:
            raise ValueError(f"constraints names {name!r}, which stays as it is: {held}")
        found = tuple(oriented(weight, report[name].groups, transposed=report[name].transposed).shape)
        if found != report[name].shape:
            raise ValueError(f"the report is on another model: {name!r} has a weight {report[name].shape}, not {found}")


def _row_mask(rows: npt.NDArray[np.bool_], weight: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.from_numpy(rows).to(weight.device).reshape(-1, *[1] * (weight.dim() - 1))


def _plain(weight: torch.Tensor) -> torch.Tensor:
    """The weight without its graph, contiguous (a channels_last weight is copied)."""
    return weight.detach().contiguous()


def _nonzero(weight: torch.Tensor) -> BoolArray:
    found: BoolArray = (weight != 0).cpu().numpy()
    return found


def _groups(constraint: Constraint | LevelConstraint) -> int:
    return constraint.groups if isinstance(constraint, Constraint) else 1


def _digest(values: torch.Tensor) -> str:
    return hashlib.sha256(_plain(values).cpu().numpy().tobytes()).hexdigest()


def _keep_form(structure: str) -> str:
    return "a pair of ints (filters, columns)" if structure == "filter+column" else "an int"
