"""ADMM as mathematics: the penalty's gradient, the updates by the book, known optima, and what `finish` promises."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from autocompress_fast import _reference
from autocompress_fast.admm import ADMM, Constraint, RhoSchedule
from autocompress_fast.compact import compact
from autocompress_fast.graph import inspect
from autocompress_fast.plan import mask
from autocompress_fast.unused import unused_paths

pytestmark = pytest.mark.usefixtures("one_thread")

STRUCTURES = ("filter", "channel", "column", "element", "filter+column")


def layer(shape=(6, 4, 3, 3), *, dtype=torch.float64, seed=0, groups=1) -> nn.Sequential:
    torch.manual_seed(seed)
    if len(shape) == 2:
        return nn.Sequential(nn.Linear(shape[1], shape[0], dtype=dtype))
    return nn.Sequential(nn.Conv2d(shape[1] * groups, shape[0], shape[2:], groups=groups, dtype=dtype))


def constraint(structure: str, groups: int = 1) -> Constraint:
    return Constraint(
        structure, {"filter": 3, "channel": 2, "column": 10, "element": 40}.get(structure, (3, 10)), groups
    )


def disturb(model: nn.Module, seed: int, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def gradient(admm: ADMM, weight: torch.Tensor) -> torch.Tensor:
    weight.grad = None
    admm.penalty().backward()
    assert weight.grad is not None
    return weight.grad.clone()


# The penalty


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("updates", [0, 1, 4])
def test_the_gradient_is_rho_times_w_minus_z_plus_u_after_any_number_of_updates(structure, updates):
    model = layer()
    weight = model[0].weight
    admm = ADMM(model, {"0": constraint(structure)}, rho=RhoSchedule(0.1, factor=2.0, maximum=100.0))
    for seed in range(updates):
        disturb(model, seed)
        admm.update()
    disturb(model, 99)
    expected = admm.rho * (weight.detach() - admm.z["0"] + admm.u["0"])
    assert admm.rho == 0.1 * 2**updates
    torch.testing.assert_close(gradient(admm, weight), expected, rtol=1e-13, atol=1e-15)
    penalty = 0.5 * admm.rho * float((weight.detach() - admm.z["0"] + admm.u["0"]).square().sum())
    assert admm.penalty().item() == pytest.approx(penalty, rel=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_gradient_is_the_derivative(structure):
    """Central differences, exact for a quadratic up to rounding."""
    model = layer((4, 3, 2, 2))
    weight = model[0].weight
    admm = ADMM(model, {"0": Constraint(structure, (2, 5) if structure == "filter+column" else 2)}, rho=0.7)
    for seed in range(2):
        disturb(model, seed)
        admm.update()
    disturb(model, 7)
    slope, step = gradient(admm, weight), 1e-4
    for index in itertools.product(*map(range, weight.shape)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * step
                values.append(admm.penalty().item())
                weight[index] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(slope[index]), abs=1e-9)


def test_several_layers_add_up():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    both = ADMM(model, {"0": Constraint("filter", 2), "1": Constraint("column", 2)}, rho=0.3)
    alone = [ADMM(model, {name: both.constraints[name]}, rho=0.3) for name in ("0", "1")]
    disturb(model, 0)
    assert both.penalty().item() == pytest.approx(sum(a.penalty().item() for a in alone), rel=1e-12)


def test_z_and_u_carry_no_graph():
    model = layer()
    admm = ADMM(model, {"0": constraint("column")}, rho=0.1)
    for seed in range(3):
        disturb(model, seed)
        admm.update()
        for tensor in (admm.z["0"], admm.u["0"], *admm._targets.values()):
            assert not tensor.requires_grad
            assert tensor.grad_fn is None
    assert admm.penalty().requires_grad


def test_weights_in_any_memory_layout():
    model = layer().to(memory_format=torch.channels_last)
    plain = layer()
    admms = [ADMM(m, {"0": constraint("filter+column")}, rho=0.1) for m in (model, plain)]
    for seed in range(2):
        for m, admm in zip((model, plain), admms, strict=True):
            disturb(m, seed)
            admm.update()
    assert torch.equal(admms[0].z["0"], admms[1].z["0"])
    torch.testing.assert_close(gradient(admms[0], model[0].weight), gradient(admms[1], plain[0].weight))


# The updates


@pytest.mark.parametrize("structure", ["filter", "channel", "column", "element"])
@pytest.mark.parametrize("groups", [1, 2])
def test_updates_are_those_of_the_book(structure, groups):
    model = layer(groups=groups)
    weight = model[0].weight
    chosen = constraint(structure, groups)
    admm = ADMM(model, {"0": chosen}, rho=1.0)
    z = _reference.project(weight.detach().numpy(), structure, chosen.keep, groups)
    np.testing.assert_array_equal(admm.z["0"].numpy(), z)  # Z starts at P(W)
    assert not admm.u["0"].any()
    u = np.zeros_like(z)
    for seed in range(4):
        disturb(model, seed)
        residuals = admm.update()["0"]
        expected = _reference.admm_update(weight.detach().numpy(), z, u, structure, chosen.keep, groups)
        z, u = expected.z, expected.u
        np.testing.assert_allclose(admm.z["0"].numpy(), z, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(admm.u["0"].numpy(), u, rtol=1e-12, atol=1e-14)
        norm = float(weight.detach().norm())
        assert residuals.primal == pytest.approx(expected.primal / norm, rel=1e-9)
        assert residuals.dual == pytest.approx(expected.dual / norm, rel=1e-9)


def test_joint_updates_keep_u_equal_to_the_sum_of_all_differences():
    model = layer()
    admm = ADMM(model, {"0": constraint("filter+column")}, rho=1.0)
    total = torch.zeros_like(admm.u["0"])
    for seed in range(4):
        disturb(model, seed)
        admm.update()
        total += model[0].weight.detach() - admm.z["0"]
        torch.testing.assert_close(admm.u["0"], total, rtol=1e-12, atol=1e-14)
        rows = admm.z["0"].flatten(1).any(dim=1)
        assert rows.sum() <= 3
        assert admm.z["0"].flatten(1).any(dim=0).sum() <= 10


def test_u_is_rescaled_when_rho_changes_so_that_rho_times_u_stays():
    """rho * U is the multiplier of the constraint; it must not jump when rho does."""
    models = [layer(), layer()]
    constant = ADMM(models[0], {"0": constraint("column")}, rho=0.1)
    rising = ADMM(models[1], {"0": constraint("column")}, rho=RhoSchedule(0.1, factor=10, every=2, maximum=10.0))
    for update in range(2):
        for model, admm in zip(models, (constant, rising), strict=True):
            disturb(model, update)
            admm.update()
    assert rising.rho == pytest.approx(1.0)
    torch.testing.assert_close(rising.rho * rising.u["0"], constant.rho * constant.u["0"], rtol=1e-12, atol=0)
    assert torch.equal(rising.z["0"], constant.z["0"])


# Known optima


def test_the_nearest_matrix_with_so_many_columns_is_found():
    """min 1/2 ||W - T||^2: the optimum is P(T); W is minimised exactly in every iteration."""
    rng = np.random.default_rng(0)
    for structure in STRUCTURES:
        target = torch.from_numpy(rng.standard_normal((5, 8)))
        # one group stands out, and the constraint is met by T's largest: no local optimum in the way
        chosen = Constraint(structure, {"filter": 2, "channel": 3, "column": 3, "element": 11}.get(structure, (2, 3)))
        model = layer((5, 8))
        weight = model[0].weight
        with torch.no_grad():
            weight.copy_(target)
        admm = ADMM(model, {"0": chosen}, rho=1.0)
        for _ in range(60):
            with torch.no_grad():
                weight.copy_((target + admm.rho * (admm.z["0"] - admm.u["0"])) / (1 + admm.rho))
            residuals = admm.update()["0"]
        assert residuals.primal < 1e-6
        admm.finish()
        torch.testing.assert_close(weight.detach(), chosen.project(target), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("structure", ["filter", "column"])
def test_least_squares_under_a_constraint_reaches_its_enumerated_optimum(structure, seed):
    """min 1/2 ||X W' - B||^2 with at most k non-zero filters or columns: every support is tried, the best is found.

    W is minimised exactly in every iteration, rho rises slowly.
    """
    rng = np.random.default_rng(seed)
    inputs, outputs, keep = 6, 4, 2
    x = rng.standard_normal((40, inputs))
    truth = np.zeros((outputs, inputs))
    if structure == "column":
        truth[:, rng.choice(inputs, keep, replace=False)] = rng.standard_normal((outputs, keep)) + 2
    else:
        truth[rng.choice(outputs, keep, replace=False)] = rng.standard_normal((keep, inputs)) + 2
    b = x @ truth.T + 0.3 * rng.standard_normal((40, outputs))
    gram, right = x.T @ x, x.T @ b

    def loss(w):
        return 0.5 * float(((x @ w.T - b) ** 2).sum())

    def best(support):
        w = np.zeros((outputs, inputs))
        if structure == "column":
            columns = list(support)
            w[:, columns] = np.linalg.solve(gram[np.ix_(columns, columns)], right[columns]).T
        else:
            w[list(support)] = np.linalg.solve(gram, right).T[list(support)]
        return w

    groups = inputs if structure == "column" else outputs
    optimum = min((best(s) for s in itertools.combinations(range(groups), keep)), key=loss)

    model = layer((outputs, inputs))
    weight = model[0].weight
    with torch.no_grad():
        weight.copy_(torch.from_numpy(np.linalg.solve(gram, right).T))
    admm = ADMM(model, {"0": Constraint(structure, keep)}, rho=RhoSchedule(1.0, factor=1.05, maximum=100.0))
    for _ in range(300):
        z, u = admm.z["0"].numpy(), admm.u["0"].numpy()
        minimiser = np.linalg.solve(gram + admm.rho * np.eye(inputs), right + admm.rho * (z - u).T).T
        with torch.no_grad():
            weight.copy_(torch.from_numpy(minimiser))
        residuals = admm.update()["0"]
    assert residuals.primal < 1e-6
    admm.finish()
    assert loss(weight.detach().numpy()) == pytest.approx(loss(optimum), rel=1e-6)
    np.testing.assert_allclose(weight.detach().numpy(), optimum, atol=1e-5)


def test_gradient_descent_on_the_penalised_loss_reaches_the_optimum_too():
    """The same by the three calls of a training loop: penalty, update, finish."""
    torch.manual_seed(0)
    target = torch.randn(5, 8, dtype=torch.float64)
    model = layer((5, 8))
    admm = ADMM(model, {"0": Constraint("column", 3)}, rho=RhoSchedule(0.5, factor=1.2, maximum=5.0))
    with torch.no_grad():
        model[0].weight.copy_(target)
    for _ in range(40):
        optimizer = torch.optim.SGD([model[0].weight], lr=1 / (1 + admm.rho))
        for _ in range(5):
            optimizer.zero_grad()
            (0.5 * (model[0].weight - target).square().sum() + admm.penalty()).backward()
            optimizer.step()
        residuals = admm.update()["0"]
    assert residuals.primal < 1e-3
    plan = admm.finish()
    assert plan["0"].columns.sum() == 3
    expected = Constraint("column", 3).project(target)
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=0, atol=2e-2)


# finish


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("groups", [1, 2])
def test_finish_projects_the_weights_and_drops_biases(structure, groups):
    if structure == "filter+column" and groups == 2:
        chosen = Constraint(structure, (3, 10), groups)
    else:
        chosen = constraint(structure, groups)
    model = layer(dtype=torch.float32, groups=groups)
    admm = ADMM(model, {"0": chosen}, rho=0.1)
    for seed in range(2):
        disturb(model, seed)
        admm.update()
    before = copy.deepcopy(model[0])
    plan = admm.finish()["0"]
    weight = model[0].weight.detach()
    assert torch.equal(weight, chosen.project(before.weight.detach()))
    np.testing.assert_array_equal(weight.numpy() != 0, plan.mask())
    alive = weight.flatten(1).any(dim=1)
    assert torch.equal(model[0].bias, torch.where(alive, before.bias, 0))
    counts = {
        "filter": plan.filters.sum(),
        "column": plan.columns.sum(),
        "element": plan.weights,
        "channel": plan.columns.reshape(-1, 9).any(axis=1).sum(),
        "filter+column": (plan.filters.sum(), plan.columns.sum()),
    }
    assert counts[structure] == chosen.keep
    assert plan.groups == groups
    assert (plan.elements is None) == (structure != "element")


def test_only_finish_changes_the_model():
    model = layer()
    before = copy.deepcopy(model.state_dict())
    admm = ADMM(model, {"0": constraint("column")})
    admm.penalty().backward()
    admm.update()
    admm.plan()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_plan_is_what_finish_keeps(structure):
    model = layer()
    admm = ADMM(model, {"0": constraint(structure)})
    disturb(model, 5)
    expected = admm.plan()
    assert admm.finish() == expected


def test_a_plan_under_other_constraints():
    model = layer()
    admm = ADMM(model, {"0": Constraint("filter", 2)})
    assert int(admm.plan({"0": Constraint("filter", 4)})["0"].filters.sum()) == 4
    assert int(admm.plan()["0"].filters.sum()) == 2
    with pytest.raises(ValueError, match=r"constraints must name \['0'\], got \['1'\]"):
        admm.plan({"1": Constraint("filter", 4)})


def chain() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 10),
        nn.ReLU(),
        nn.Linear(10, 4),
    )


CHAIN = {
    "0": Constraint("filter+column", (4, 9)),
    "2": Constraint("filter+column", (3, 20)),
    "5": Constraint("filter+column", (5, 24)),
    "7": Constraint("filter+column", (4, 5)),
}


@pytest.mark.parametrize("order", [("0", "2", "5", "7"), ("7", "5", "2", "0"), ("2", "7", "0", "5")])
def test_a_report_keeps_columns_on_living_channels_so_that_the_counts_are_really_met(order):
    model = chain()
    report = inspect(model, torch.zeros(1, 2, 6, 6))
    admm = ADMM(model, {name: CHAIN[name] for name in order}, rho=0.1, report=report)
    for seed in range(3):
        disturb(model, seed, 0.1)
        admm.update()
    plan = admm.finish()
    purified = unused_paths(plan, report)
    for name, chosen in CHAIN.items():
        assert purified[name].columns.sum() == chosen.keep[1], name
        assert (plan[name].filters.sum(), plan[name].columns.sum()) == chosen.keep, name
    x = torch.randn(2, 2, 6, 6)
    torch.testing.assert_close(model(x), mask(model, purified)(x))


def test_without_a_report_columns_are_lost_on_dead_channels():
    """What the test above would miss if the report did nothing."""
    model = chain()
    report = inspect(model, torch.zeros(1, 2, 6, 6))
    purified = unused_paths(ADMM(model, CHAIN, rho=0.1).finish(), report)
    assert purified["2"].columns.sum() < 20


def test_u_is_zero_on_dead_channels_and_the_residual_counts_their_weights():
    model = chain().double()
    report = inspect(model, torch.zeros(1, 2, 6, 6, dtype=torch.float64))
    admm = ADMM(model, {"0": Constraint("filter", 4), "2": Constraint("column", 72)}, rho=0.1, report=report)
    disturb(model, 0)
    residuals = admm.update()
    dead = ~admm.z["0"].flatten(1).any(dim=1)
    assert dead.sum() == 4
    assert not admm.z["2"][:, dead].any()
    assert not admm.u["2"][:, dead].any()
    weight = model[2].weight.detach()
    assert residuals["2"].primal == pytest.approx(float(weight[:, dead].norm() / weight.norm()), rel=1e-9)


def test_reports_on_another_model_are_refused():
    model = chain()
    report = inspect(model, torch.zeros(1, 2, 6, 6))
    other = nn.Sequential(*model[:7], nn.Linear(10, 5), nn.Linear(5, 5))
    with pytest.raises(ValueError, match=r"'7' has a weight \(4, 10\), not \(5, 10\)"):
        ADMM(other, CHAIN, report=report)
    with pytest.raises(ValueError, match="names '8', which the report does not have"):
        ADMM(other, {"8": Constraint("filter", 2)}, report=report)


# Filters that are tied


class Residual(nn.Module):
    """`stem` and what `inner` and `narrow` put out are added; a depthwise and a transposed layer are on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.wide, self.depthwise = nn.Conv2d(8, 10, 1), nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.narrow, self.norm = nn.Conv2d(10, 8, 1), nn.BatchNorm2d(8)
        self.up, self.head = nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Conv2d(6, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = (x + self.inner(x)).relu()
        x = self.norm(x + self.narrow(self.depthwise(self.wide(x).relu()).relu())).relu()
        return self.head(self.up(x).relu())


RESIDUAL = torch.zeros(1, 2, 7, 7, dtype=torch.float64)
ADDED = ("stem", "inner", "narrow")


def residual() -> nn.Module:
    torch.manual_seed(1)
    model = Residual().double()
    nn.init.normal_(model.norm.bias)
    return model.eval()


def alike(norms: np.ndarray, groups: int) -> np.ndarray:
    """The sum over filters i, i + P / groups, ... in the places of all of them."""
    return np.tile(norms.reshape(groups, -1).sum(axis=0), groups)


def joint_norms(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(P,) squared norm of what each filter is tied to, by hand."""
    squares = {name: (w.reshape(len(w), -1) ** 2).sum(axis=1) for name, w in values.items()}
    added = sum(squares[name] for name in ADDED if name in squares)
    if "up" in values:  # its groups read channels i and i + 4 alike, so that these are one group
        added = alike(added, 2)
        squares["up"] = alike(squares["up"], 2)
    middle = sum(squares[name] for name in ("wide", "depthwise") if name in squares)
    return {**squares, **dict.fromkeys(ADDED, added), **dict.fromkeys(("wide", "depthwise"), middle)}


TIED = {
    "stem": Constraint("filter", 4),
    "inner": Constraint("filter", 4),
    "wide": Constraint("filter", 5),
    "depthwise": Constraint("filter", 5, 10),
    "narrow": Constraint("filter", 4),
    "up": Constraint("filter", 4, 2),
}


def oriented_weight(model: nn.Module, name: str) -> np.ndarray:
    """(P, C / groups, k, k), by hand."""
    weight = model.get_submodule(name).weight.detach().numpy()
    if name != "up":
        return weight.copy()
    found = np.empty((6, 4, 2, 2))
    for p in range(6):
        found[p] = weight[p // 3 * 4 : p // 3 * 4 + 4, p % 3]
    return found


@pytest.mark.parametrize("order", [list(TIED), list(reversed(TIED))])
def test_tied_filters_are_updated_together_by_the_book(order):
    """Z = W + U in the filters whose joint norm of W + U is largest, on living channels; U = U + W - Z."""
    model = residual()
    admm = ADMM(model, {name: TIED[name] for name in order}, rho=0.2, report=inspect(model, RESIDUAL))
    u = {name: np.zeros_like(oriented_weight(model, name)) for name in TIED}
    chosen = []
    for seed in range(4):
        disturb(model, seed)
        before = {name: z.numpy().copy() for name, z in admm.z.items()}
        residuals = admm.update()
        weights = {name: oriented_weight(model, name) for name in TIED}
        joint = joint_norms({name: weights[name] + u[name] for name in TIED})
        kept = {}
        for name, constraint in TIED.items():
            limit = np.sort(joint[name])[-constraint.keep]
            kept[name] = joint[name] >= limit
            assert kept[name].sum() == constraint.keep
        chosen.append(kept["stem"].tolist())
        for name in TIED:
            weight, norm = weights[name], np.linalg.norm(weights[name])
            living = np.ones_like(weight)
            reads = {"inner": "stem", "wide": "stem", "narrow": "wide"}.get(name)
            if reads:
                living[:, ~kept[reads]] = 0
            if name == "depthwise":
                living[~kept["wide"]] = 0
            if name == "up":
                living *= kept["stem"].reshape(2, 1, 4, 1, 1).repeat(3, axis=1).reshape(6, 4, 1, 1)
            v = (weight + u[name]) * living
            z = v * kept[name].reshape(-1, 1, 1, 1)
            u[name] = v - z
            np.testing.assert_allclose(admm.z[name].numpy(), z, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(admm.u[name].numpy(), u[name], rtol=1e-12, atol=1e-14)
            assert residuals[name].primal == pytest.approx(np.linalg.norm(weight - z) / norm, rel=1e-9)
            assert residuals[name].dual == pytest.approx(np.linalg.norm(z - before[name]) / norm, rel=1e-9, abs=1e-12)
    assert len({tuple(c) for c in chosen}) > 1  # the choice was not the same all the time


def test_the_gradient_of_turned_weights_lies_as_they_do():
    model = residual()
    admm = ADMM(model, TIED, rho=0.3, report=inspect(model, RESIDUAL))
    for seed in range(2):
        disturb(model, seed)
        admm.update()
    disturb(model, 9)
    admm.penalty().backward()
    for name in TIED:
        module = model.get_submodule(name)
        expected = 0.3 * (oriented_weight(model, name) - admm.z[name].numpy() + admm.u[name].numpy())
        found = module.weight.grad
        with torch.no_grad():
            module.weight.copy_(found)
        np.testing.assert_allclose(oriented_weight(model, name), expected, rtol=1e-10, atol=1e-12)


def test_finish_drops_tied_filters_with_all_that_is_theirs():
    model = residual()
    report = inspect(model, RESIDUAL)
    admm = ADMM(model, TIED, rho=0.2, report=report)
    disturb(model, 0)
    joint = joint_norms({name: oriented_weight(model, name) for name in TIED})
    expected = {name: joint[name] >= np.sort(joint[name])[-c.keep] for name, c in TIED.items()}
    plan = admm.finish()
    for name in TIED:
        assert plan[name].filters.tolist() == expected[name].tolist()
        rows = oriented_weight(model, name).reshape(len(expected[name]), -1).any(axis=1)
        assert rows.tolist() == expected[name].tolist()
        bias = model.get_submodule(name).bias.detach().numpy()
        assert (bias != 0).tolist() == expected[name].tolist()
    for value in (model.norm.weight, model.norm.bias):
        assert (value != 0).tolist() == expected["stem"].tolist()
    assert unused_paths(plan, report)["stem"] == plan["stem"]
    x = torch.randn(2, 2, 7, 7, dtype=torch.float64)
    small = compact(model, plan, x)
    assert {name: len(small.kept[name].filters) for name in TIED} == {name: c.keep for name, c in TIED.items()}
    torch.testing.assert_close(small.model.eval()(x), model(x))


def test_tied_layers_keep_the_same_filters_and_columns_of_their_own():
    model = residual()
    report = inspect(model, RESIDUAL)
    constraints = {"stem": Constraint("filter+column", (4, 9)), "inner": Constraint("filter+column", (4, 20))}
    admm = ADMM(model, {**constraints, "narrow": Constraint("filter", 4)}, rho=0.2, report=report)
    for seed in range(3):
        disturb(model, seed, 0.1)
        admm.update()
        rows = {name: admm.z[name].flatten(1).any(dim=1).tolist() for name in ADDED}
        assert rows["stem"] == rows["inner"] == rows["narrow"]
    plan = admm.finish()
    assert plan["stem"].filters.tolist() == plan["inner"].filters.tolist() == plan["narrow"].filters.tolist()
    for name, constraint in constraints.items():
        assert (plan[name].filters.sum(), plan[name].columns.sum()) == constraint.keep
    weight = model.inner.weight.detach()
    assert not weight[:, ~torch.tensor(plan["stem"].filters)].any()  # columns of living channels alone


def test_without_a_report_every_layer_keeps_filters_of_its_own():
    """What the tests above would miss if nothing were tied."""
    model = residual()
    plan = ADMM(model, {name: TIED[name] for name in ADDED}, rho=0.2).finish()
    assert len({tuple(plan[name].filters.tolist()) for name in ADDED}) > 1


@pytest.mark.parametrize("large", [(0, 1, 6, 7), (2, 3, 4, 5), (0, 2, 4, 6)])
def test_layers_that_are_tied_in_part_keep_their_counts_and_the_same_of_what_they_share(large):
    """The four filters of `narrow` are added onto the middle of the eight of `wide`, wherever the large ones are."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide, self.head = nn.Linear(5, 4), nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(nn.functional.pad(self.narrow(x), (2, 2)) + self.wide(x))

    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.wide.weight[list(large)] *= 10
    report = inspect(model, torch.zeros(1, 5))
    plan = ADMM(model, {"narrow": Constraint("filter", 2), "wide": Constraint("filter", 4)}, report=report).plan()
    assert (plan["narrow"].filters.sum(), plan["wide"].filters.sum()) == (2, 4)
    assert plan["narrow"].filters.tolist() == plan["wide"].filters[2:6].tolist()


def test_filters_that_cannot_go_stay_and_count():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.side, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            body = self.body(x)
            return body[:, :2], self.head(body.relu() + self.side(x).relu())

    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for layer in (model.body, model.side):
            layer.weight[:2] *= 1e-3  # smallest of all, and an output
    report = inspect(model, torch.zeros(1, 4))
    squares = (model.body.weight.square() + model.side.weight.square()).sum(1).detach()
    admm = ADMM(model, {name: Constraint("filter", 4) for name in ("body", "side")}, report=report)
    plan = admm.finish()
    kept = squares >= squares[2:].sort().values[-2]
    kept[:2] = True
    assert plan["body"].filters.tolist() == plan["side"].filters.tolist() == kept.tolist()


# Errors


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_stops_with_a_message_and_changes_nothing(value):
    model = chain()
    admm = ADMM(model, CHAIN, rho=RhoSchedule(0.1, factor=2.0))
    disturb(model, 0)
    admm.update()
    state = admm.state_dict()
    with torch.no_grad():
        model[5].weight[0, :3] = value
    weights = copy.deepcopy(model.state_dict())
    for call in (admm.update, admm.finish):
        with pytest.raises(
            ValueError, match="the weight of '5' has 3 values that are NaN or infinite; training diverged"
        ):
            call()
    assert admm.updates == 1
    for part in ("z", "u"):
        assert all(torch.equal(value, getattr(admm, part)[name]) for name, value in state[part].items())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="NaN or infinite"):
        ADMM(model, CHAIN)


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({}, "at least one layer"),
        ({"9": Constraint("filter", 1)}, "names '9', which is no layer"),
        ({"1": Constraint("filter", 1)}, "names '1', which is no layer"),
        ({"0": Constraint("filter", 9)}, "layer '0': .*9"),
        ({"0": Constraint("filter+column", (4, 19))}, "layer '0': .*19"),
        ({"0": Constraint("column", 4, groups=3)}, "layer '0': .*groups"),
    ],
)
def test_constraints_that_do_not_fit_the_model_are_refused(constraints, message):
    with pytest.raises(ValueError, match=message):
        ADMM(chain(), constraints)


def test_computed_weights_are_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="names '0'"):
        ADMM(model, {"0": Constraint("filter", 2)})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("row", 1), ValueError, "structure must be one of filter, channel, column, element, filter.column, got 'row'"),
        (("filter", 0), ValueError, "keep must be at least 1, got 0"),
        (("filter", -1), ValueError, "keep must be at least 1, got -1"),
        (("filter", 1.5), TypeError, "keep of 'filter' must be an int, got 1.5"),
        (("filter", True), TypeError, "must be an int, got True"),
        (("filter", "2"), TypeError, "must be an int, got '2'"),
        (("filter", (2, 3)), TypeError, "must be an int, got"),
        (("filter+column", 2), TypeError, r"must be a pair of ints \(filters, columns\), got 2"),
        (("filter+column", (2, 3, 4)), TypeError, "must be a pair of ints"),
        (("filter+column", (2, 0)), ValueError, r"at least 1, got \(2, 0\)"),
        (("filter+column", (2, 1.0)), TypeError, "must be a pair of ints"),
        (("filter", 2, 0), ValueError, "groups must be an int, 1 or more, got 0"),
        (("filter", 2, 1.0), ValueError, r"groups must be an int, 1 or more, got 1\.0"),
    ],
)
def test_constraints_are_checked_when_they_are_made(arguments, error, message):
    with pytest.raises(error, match=message):
        Constraint(*arguments)


def test_counts_of_numpy_and_lists_of_counts_are_counts():
    assert Constraint("column", np.int64(3)) == Constraint("column", 3)
    assert Constraint("filter+column", [np.int32(2), 3]) == Constraint("filter+column", (2, 3))
    assert type(Constraint("column", np.int64(3)).keep) is int
    weight = np.random.default_rng(0).standard_normal((4, 5))
    np.testing.assert_array_equal(
        Constraint("column", np.int64(3)).project(weight), _reference.project(weight, "column", 3)
    )


# rho


def test_rho_is_multiplied_after_every_so_many_updates_up_to_its_maximum():
    schedule = RhoSchedule(1e-4, factor=10.0, every=3, maximum=1e-1)
    assert [schedule.at(n) for n in (0, 1, 2, 3, 5, 6, 9)] == pytest.approx([1e-4, 1e-4, 1e-4, 1e-3, 1e-3, 1e-2, 1e-1])
    assert schedule.at(10**9) == 1e-1
    assert RhoSchedule(0.5, factor=1.0, maximum=0.5).at(10**9) == 0.5
    assert RhoSchedule(1e-3, factor=1.3).at(4) == pytest.approx(1e-3 * 1.3**4)
    rates = [RhoSchedule(1e-3, factor=1.3).at(n) for n in range(60)]
    assert rates == sorted(rates)
    assert rates[-1] == 1.0


def test_a_number_is_a_constant_rho():
    admm = ADMM(layer(), {"0": constraint("filter")}, rho=0.25)
    for _ in range(3):
        admm.update()
    assert admm.rho == 0.25


@pytest.mark.parametrize(
    "arguments",
    [
        {"initial": 0.0},
        {"initial": -1.0},
        {"initial": math.nan},
        {"initial": math.inf},
        {"factor": 0.9},
        {"factor": math.nan},
        {"factor": math.inf},
        {"every": 0},
        {"initial": 0.1, "maximum": 0.01},
        {"maximum": math.inf},
        {"maximum": math.nan},
    ],
)
def test_schedules_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="rho"):
        RhoSchedule(**arguments)


# State


def test_a_restored_state_continues_identically():
    models = [chain(), chain()]
    schedule = RhoSchedule(0.1, factor=2.0, every=2)
    report = inspect(models[0], torch.zeros(1, 2, 6, 6))
    first = ADMM(models[0], CHAIN, rho=schedule, report=report)
    for seed in range(3):
        disturb(models[0], seed, 0.1)
        first.update()
    state = copy.deepcopy(first.state_dict())
    models[1].load_state_dict(models[0].state_dict())
    second = ADMM(models[1], CHAIN, rho=schedule, report=report)
    second.load_state_dict(state)
    for seed in range(3, 6):
        results = []
        for model, admm in zip(models, (first, second), strict=True):
            disturb(model, seed, 0.1)
            penalty = admm.penalty().item()
            results.append((penalty, admm.update(), admm.rho))
        assert results[0] == results[1]
    for name in CHAIN:
        assert torch.equal(first.z[name], second.z[name])
        assert torch.equal(first.u[name], second.u[name])
    assert first.finish() == second.finish()


def test_the_state_is_a_copy_of_tensors_and_ints():
    model = chain()
    admm = ADMM(model, CHAIN)
    state = admm.state_dict()
    assert sorted(state) == ["u", "updates", "z"]
    before = state["z"]["0"].clone()
    disturb(model, 0)
    admm.update()
    assert torch.equal(state["z"]["0"], before)


def test_another_networks_state_is_refused_and_nothing_changes():
    admm = ADMM(chain(), CHAIN)
    before = admm.state_dict()
    other = ADMM(layer(dtype=torch.float32), {"0": constraint("filter")}).state_dict()
    for state in (other, {"updates": 3}, {**before, "u": other["u"]}):
        with pytest.raises(ValueError, match=r"the state's [zu] has layers"):
            admm.load_state_dict(state)
    assert admm.updates == 0
    assert all(torch.equal(admm.z[name], before["z"][name]) for name in CHAIN)
