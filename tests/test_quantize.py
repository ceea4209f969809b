"""Weights on levels: the projection against brute force, portions, and ADMM towards levels."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from autocompress_fast.admm import ADMM, RhoSchedule
from autocompress_fast.data import UserBatches
from autocompress_fast.plan import FixedParameters, MaskedParameters, Plan
from autocompress_fast.quantize import KINDS, LevelConstraint, LevelError, LevelParameters, bits_of, snap
from autocompress_fast.training import Trainer, TrainingConfig, evaluate

CONSTRAINTS = [
    LevelConstraint(1),
    LevelConstraint(2),
    LevelConstraint(4),
    LevelConstraint(8),
    LevelConstraint(3, "power"),
    LevelConstraint(2, "ternary"),
    LevelConstraint(1, "binary"),
    LevelConstraint(2, per_filter=True),
    LevelConstraint(1, "binary", per_filter=True),
]


def sparse(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) * (rng.random(shape) < 0.6)


def test_levels_are_ascending_symmetric_and_as_many_as_the_bits_allow():
    for bits in range(1, 9):
        for kind in ("equal", "power"):
            levels = LevelConstraint(bits, kind).levels
            assert len(levels) == 2**bits
            assert 0 not in levels
            assert list(levels) == sorted(levels)
            assert [-level for level in reversed(levels)] == list(levels)
    assert LevelConstraint(3).levels == (-4, -3, -2, -1, 1, 2, 3, 4)
    assert LevelConstraint(3, "power").levels == (-1, -0.5, -0.25, -0.125, 0.125, 0.25, 0.5, 1)
    assert LevelConstraint(1).levels == LevelConstraint(1, "binary").levels == LevelConstraint(1, "power").levels


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (5, 7), (1, 1), (2, 1, 1, 1)])
def test_weights_lie_on_levels_and_zeros_stay(constraint, shape):
    weight = sparse(shape, 1)
    projected = constraint.project(weight)
    assert projected.shape == weight.shape
    assert (projected[weight == 0] == 0).all()
    if constraint.kind != "ternary":
        assert (projected[weight != 0] != 0).all()
    parts = [projected] if not constraint.per_filter else list(projected)
    for part in parts:
        magnitudes = np.unique(np.abs(part[part != 0]))
        if len(magnitudes):
            units = np.abs(np.array([level for level in constraint.levels if level != 0]))
            candidates = [magnitudes[0] / unit for unit in units]  # one of these is the scale
            assert any(all(np.isclose(m, c * units, rtol=1e-12).any() for m in magnitudes) for c in candidates), (
                magnitudes
            )


def error_by_brute_force(values: np.ndarray, levels: tuple[float, ...]) -> float:
    """The least squared error over all assignments, each with its own best scale."""
    best = float((values**2).sum())  # scale 0
    for chosen in itertools.product(levels, repeat=len(values)):
        q = np.array(chosen)
        if q.any():
            scale = max(0.0, float(values @ q) / float(q @ q))
            best = min(best, float(((values - scale * q) ** 2).sum()))
    return best


@pytest.mark.parametrize("constraint", [LevelConstraint(1), LevelConstraint(2), LevelConstraint(2, "power")], ids=str)
def test_no_point_on_levels_is_nearer(constraint):
    for seed in range(8):
        weight = np.random.default_rng(seed).standard_normal((1, 5))
        error = float(((weight - constraint.project(weight)) ** 2).sum())
        assert error == pytest.approx(error_by_brute_force(weight.ravel(), constraint.levels), rel=1e-9)


def test_more_bits_and_scales_of_filters_are_nearer():
    weight = sparse((6, 4, 3, 3), 2)

    def error(constraint: LevelConstraint) -> float:
        return float(((weight - constraint.project(weight)) ** 2).sum())

    errors = [error(LevelConstraint(bits)) for bits in (1, 2, 3, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert error(LevelConstraint(2, per_filter=True)) < error(LevelConstraint(2))


def test_what_lies_on_levels_stays():
    for constraint in CONSTRAINTS:
        once = constraint.project(sparse((4, 3, 3, 3), 3))
        np.testing.assert_allclose(constraint.project(once), once, rtol=1e-12)


def test_tensors_give_tensors_of_the_same_values():
    weight = sparse((4, 9), 4).astype(np.float32)
    for constraint in CONSTRAINTS:
        found = constraint.project(torch.from_numpy(weight))
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), constraint.project(weight))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "bits must be an int from 1 to 8, got 0"),
        ((9,), "bits must be an int from 1 to 8, got 9"),
        ((True,), "bits must be an int"),
        ((4, "even"), f"kind must be one of {', '.join(KINDS)}, got 'even'"),
        ((2, "binary"), "binary levels have 1 bits, got 2"),
        ((1, "ternary"), "ternary levels have 2 bits, got 1"),
    ],
)
def test_levels_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LevelConstraint(*arguments)


def test_nan_is_refused():
    with pytest.raises(LevelError, match="NaN or infinit"):
        LevelConstraint(2).project(np.array([[1.0, np.nan]]))


# Portions


def test_the_closest_share_is_chosen_and_zeros_always():
    for seed in range(5):
        weight = sparse((7, 11), seed)
        target = LevelConstraint(2).project(weight)
        distance = np.abs(weight - target)
        for share in (0.0, 0.3, 0.5, 1.0):
            chosen = snap(weight, target, share)
            kept = weight != 0
            assert chosen[~kept].all()
            assert chosen[kept].sum() == round(share * kept.sum())
            if 0 < chosen[kept].sum() < kept.sum():
                assert distance[kept & chosen].max() <= distance[kept & ~chosen].min()
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share must be from 0 to 1"):
            snap(weight, target, share)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_fixed_values_stay_and_the_others_are_trained(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    chosen = {"0.weight": torch.rand(5, 6) < 0.5, "2.bias": torch.tensor([True, False])}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    used = kind(model.parameters(), lr=0.1, weight_decay=0.1)
    with FixedParameters(model, chosen, used):
        for _ in range(5):
            used.zero_grad()
            model(torch.randn(8, 6)).square().sum().backward()
            used.step()
    for name, parameter in model.named_parameters():
        stays = chosen.get(name, torch.zeros_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[stays], before[name][stays])
        assert (parameter[~stays] != before[name][~stays]).any()
    model(torch.randn(8, 6)).square().sum().backward()
    used.step()
    assert not torch.equal(model[0].weight[chosen["0.weight"]], before["0.weight"][chosen["0.weight"]])


def test_what_cannot_be_fixed_is_refused():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="fixed names 'w', which is no parameter"):
        FixedParameters(model, {"w": torch.zeros(2, 3, dtype=torch.bool)}, optimizer)
    with pytest.raises(ValueError, match=r"fixed is \(3, 2\) for 'weight' of \(2, 3\)"):
        FixedParameters(model, {"weight": torch.zeros(3, 2, dtype=torch.bool)}, optimizer)


# Training on levels


def _levelled(kind: str, bits: int, per_filter: bool) -> tuple[nn.Module, dict[str, LevelConstraint]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight[torch.rand(5, 7) < 0.3] = 0
        model[0].weight[4] = 0  # a filter that is not there
    return model, {"0": LevelConstraint(bits, kind, per_filter)}


@pytest.mark.parametrize("per_filter", [False, True])
@pytest.mark.parametrize(("kind", "bits"), [("binary", 1), ("ternary", 2), ("equal", 2), ("equal", 4), ("power", 3)])
def test_steps_on_levels_are_those_of_the_formulas(kind, bits, per_filter):
    """Against plain loops: V moves by the gradient at its nearest levels, and the scales fit V for those."""
    model, constraints = _levelled(kind, bits, per_filter)
    constraint, weight = constraints["0"], model[0].weight
    latent = weight.detach().double().numpy().copy()
    levels, kept = np.array(constraint.levels), latent != 0
    scales = np.array(constraint.scales(weight.detach()))
    owner = np.arange(5) if per_filter else np.zeros(5, dtype=int)

    seen: list[np.ndarray] = []

    def nearest() -> np.ndarray:
        chosen = np.zeros_like(latent)
        for i, j in zip(*np.nonzero(kept), strict=True):
            chosen[i, j] = levels[np.abs(levels * scales[owner[i]] - latent[i, j]).argmin()]
        for part in set(owner):
            rows = owner == part
            if (chosen[rows] ** 2).sum() > 0 and (chosen[rows] * latent[rows]).sum() > 0:
                scales[part] = (chosen[rows] * latent[rows]).sum() / (chosen[rows] ** 2).sum()
        seen.append(chosen)
        return chosen * scales[owner][:, None]

    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    masks = Plan.from_masks({"0": kept, "2": np.ones((3, 5), dtype=bool)})
    with MaskedParameters(model, masks, optimizer), LevelParameters(model, constraints, optimizer):
        for _ in range(6):
            np.testing.assert_allclose(weight.detach().numpy(), nearest(), rtol=1e-5, atol=1e-7)
            optimizer.zero_grad()
            model(torch.randn(16, 7)).square().sum(dim=1).mean().backward()
            latent -= 2.0 * weight.grad.double().numpy()
            optimizer.step()
        expected = nearest()
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5, atol=1e-7)
    again = constraint.project(weight.detach())
    np.testing.assert_allclose(weight.detach().numpy(), again.numpy(), rtol=1e-5, atol=1e-7)  # they are on levels
    assert bool((weight[~torch.from_numpy(kept)] == 0).all())
    assert (seen[0] != seen[-1]).any()  # some went to other levels


class StopBatches(UserBatches):
    """Ends the training in its third epoch, as Ctrl-C does."""

    def epoch(self, index):
        if index == 2:
            raise KeyboardInterrupt
        return super().epoch(index)


def test_training_on_levels_is_better_than_setting_weights_to_them():
    model, batches = problem()
    constraints = {"0": LevelConstraint(1), "2": LevelConstraint(1)}
    Trainer(model, batches, TrainingConfig(12, "adam", lr=0.01)).run()
    at_once = copy.deepcopy(model)
    with torch.no_grad():
        for name, constraint in constraints.items():
            layer = at_once.get_submodule(name)
            layer.weight.copy_(constraint.project(layer.weight.detach()))
    Trainer(model, batches, TrainingConfig(12, "adam", lr=0.01), levels=constraints).run()
    for name in constraints:
        assert len(model.get_submodule(name).weight.unique()) == 2
    assert evaluate(model, batches).accuracy > evaluate(at_once, batches).accuracy + 5


def test_a_training_on_levels_goes_on_after_a_stop(tmp_path):
    config, constraints = TrainingConfig(4, "adam", lr=0.02), {"0": LevelConstraint(2), "2": LevelConstraint(1)}

    def trained(stop: bool) -> nn.Module:
        model, batches = problem()

        if stop:
            with pytest.raises(KeyboardInterrupt):
                Trainer(
                    model, StopBatches(list(batches.epoch(0))), config, levels=constraints, checkpoint=tmp_path / "c"
                ).run()
            model, _ = problem()
            with pytest.raises(ValueError, match="is of a run with another levels"):
                Trainer(model, batches, config, checkpoint=tmp_path / "c").run()
        Trainer(model, batches, config, levels=constraints, checkpoint=tmp_path / "c" if stop else None).run()
        return model

    for a, b in zip(trained(True).parameters(), trained(False).parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_trained_on_levels_is_refused():
    model, constraints = _levelled("binary", 1, False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="given for '1', which is no layer with a weight; layers: 0, 2"):
        LevelParameters(model, {"0": LevelConstraint(1), "1": LevelConstraint(1)}, optimizer)
    with pytest.raises(ValueError, match=r"the state must have the shapes .*0\.latent.*, got \{\}"):
        LevelParameters(model, constraints, optimizer, state={})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(LevelError, match="NaN"):
        LevelParameters(model, constraints, optimizer)


# ADMM towards levels


def problem() -> tuple[nn.Module, UserBatches]:
    torch.manual_seed(1)
    x = torch.randn(256, 8)
    y = (x @ torch.randn(8, 3)).argmax(dim=1)
    batches = UserBatches(list(zip(x.split(32), y.split(32), strict=True)))
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), batches


def test_updates_are_those_of_the_formulas():
    model, _ = problem()
    constraint = LevelConstraint(2)
    admm = ADMM(model, {"0": constraint}, rho=0.1)
    u = torch.zeros(16, 8)
    for _ in range(3):
        with torch.no_grad():
            model[0].weight += 0.1 * torch.randn(16, 8)
        weight = model[0].weight.detach().clone()
        admm.update()
        z = constraint.project(weight + u)
        u = u + weight - z
        torch.testing.assert_close(admm.z["0"], z)
        torch.testing.assert_close(admm.u["0"], u, atol=1e-6, rtol=1e-5)


def test_training_brings_the_weights_to_levels():
    model, batches = problem()
    constraints = {"0": LevelConstraint(2), "2": LevelConstraint(1)}
    admm = ADMM(model, constraints, rho=RhoSchedule(0.1, 1.3, maximum=100.0))
    config = TrainingConfig(80, "adam", lr=0.01, schedule="constant", warmup=0)
    rows = Trainer(model, batches, config, admm=admm, admm_every=5).run()  # an update after 40 steps
    assert rows[4]["primal"] > 0.3
    assert rows[-1]["primal"] < 0.03


def test_a_training_with_fixed_values_goes_on_after_a_stop(tmp_path):
    config = TrainingConfig(4, "adam", lr=0.01)

    def trained(stop: bool) -> nn.Module:
        model, batches = problem()
        fixed = {"0.weight": snap(model[0].weight.detach(), LevelConstraint(1).project(model[0].weight.detach()), 0.5)}

        if stop:
            stopping = StopBatches(list(batches.epoch(0)))
            with pytest.raises(KeyboardInterrupt):
                Trainer(model, stopping, config, fixed=fixed, checkpoint=tmp_path / "c").run()
            with pytest.raises(ValueError, match="is of a run with another fixed"):
                Trainer(model, batches, config, checkpoint=tmp_path / "c").run()
        Trainer(model, batches, config, fixed=fixed, checkpoint=tmp_path / "c" if stop else None).run()
        return model

    for a, b in zip(trained(stop=True).parameters(), trained(stop=False).parameters(), strict=True):
        assert torch.equal(a, b)


def test_bits_of_codes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[:2] = 0
    assert bits_of(model, {"0": LevelConstraint(3), "1": LevelConstraint(1)}) == 3 * 8 + 8
