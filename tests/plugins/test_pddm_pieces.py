"""What PDDM is made of: maps that PDNet has to find, units in one order, flows and errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import toys
from torch import nn
from torch.func import functional_call

from stillhouse_pddm import PDNet
from stillhouse_pddm.alignment import align, matched
from stillhouse_pddm.networks import PathOutputs, flow, output_error, parameters_of, relative_error


def fit(pdnet: PDNet, path: list[dict[str, torch.Tensor]]) -> None:
    """Train PDNet on a path's parameters to the optimum, in float64."""
    fit_pairs(pdnet, list(itertools.pairwise(path)))


def fit_pairs(pdnet: PDNet, pairs: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]) -> None:
    """The same on pairs of parameters that need not follow one another."""
    optimizer = torch.optim.LBFGS(
        pdnet.parameters(),
        max_iter=3000,
        tolerance_grad=1e-14,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
        history_size=50,
    )

    def closure():
        optimizer.zero_grad()
        made = [pdnet(given, point) for point, (given, _) in enumerate(pairs)]
        loss = sum(
            (made[point][name] - wanted[name]).square().sum()
            for point, (_, wanted) in enumerate(pairs)
            for name in wanted
        )
        loss.backward()
        return loss

    optimizer.step(closure)


def linear_pdnet(shape: tuple[int, ...], points: int, **more) -> PDNet:
    torch.manual_seed(0)
    return PDNet({"weight": [shape] * points}, linear=True, **more).double()


# Known maps.


def test_gradient_descent_on_least_squares_is_found_as_the_path_it_is():
    """theta' = (I - eta H) theta + eta b: the map, and its fixed point, the least-squares solution."""
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    hessian = basis @ torch.diag(torch.tensor([0.2, 0.8, 1.7], dtype=torch.float64)) @ basis.T
    solution = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    path = [{"weight": torch.zeros(1, 3, dtype=torch.float64)}]
    for _ in range(8):
        theta = path[-1]["weight"]
        path.append({"weight": theta - (theta - solution) @ hessian})
    pdnet = linear_pdnet((1, 3), len(path))
    fit(pdnet, path)
    with torch.no_grad():
        zero = {"weight": torch.zeros(1, 3, dtype=torch.float64)}
        offset = pdnet(zero, 0)["weight"]
        found = torch.cat(
            [pdnet({"weight": row[None]}, 0)["weight"] - offset for row in torch.eye(3).double()]
        )
        torch.testing.assert_close(found, torch.eye(3).double() - hessian, atol=1e-4, rtol=0)
        theta = path[-1]
        for _ in range(200):
            theta = pdnet(theta, 0)
    torch.testing.assert_close(theta["weight"], solution, atol=1e-4, rtol=0)


def rotation(size: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    turn = 0.3 * torch.randn(size, size, dtype=torch.float64)
    return torch.matrix_exp(turn - turn.T)


def test_a_known_linear_map_is_recovered():
    left, right, offset = rotation(5, 1), rotation(4, 2), 0.1 * torch.randn(5, 4, dtype=torch.float64)
    path = [{"weight": torch.randn(5, 4, dtype=torch.float64)}]
    for _ in range(8):
        path.append({"weight": left @ path[-1]["weight"] @ right.T + offset})
    pdnet = linear_pdnet((5, 4), len(path))
    fit(pdnet, path)
    unseen = torch.randn(5, 4, dtype=torch.float64)
    made = pdnet({"weight": unseen}, 0)["weight"].detach()
    torch.testing.assert_close(made, left @ unseen @ right.T + offset, atol=1e-4, rtol=0)


def test_a_known_map_of_low_rank_is_recovered_by_factors():
    """W' = (I + u v^T) W: found by a rank of 2 on 12 units, with no matrix of 12 x 12."""
    torch.manual_seed(3)
    u, v = (torch.randn(12, 1, dtype=torch.float64) / 2 for _ in range(2))
    given = [torch.randn(12, 3, dtype=torch.float64) for _ in range(10)]
    pdnet = linear_pdnet((12, 3), 11, rank=2)
    assert not any(parameter.shape == (12, 12) for parameter in pdnet.parameters())
    fit_pairs(pdnet, [({"weight": w}, {"weight": w + u @ (v.T @ w)}) for w in given])
    unseen = torch.randn(12, 3, dtype=torch.float64)
    made = pdnet({"weight": unseen}, 0)["weight"].detach()
    torch.testing.assert_close(made, unseen + u @ (v.T @ unseen), atol=1e-4, rtol=0)


def test_on_a_constant_path_it_is_the_identity():
    given = {"weight": torch.randn(6, 5, dtype=torch.float64)}
    pdnet = linear_pdnet((6, 5), 4)
    with torch.no_grad():
        for parameter in pdnet.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert not torch.allclose(pdnet(given, 0)["weight"], given["weight"], atol=0.1)
    fit(pdnet, [given] * 4)
    torch.testing.assert_close(pdnet(given, 2)["weight"].detach(), given["weight"], atol=1e-4, rtol=0)


def test_before_training_every_map_is_the_identity():
    network = toys.net(40)
    pdnet = PDNet({name: [tuple(value.shape)] * 3 for name, value in network.named_parameters()}, rank=4)
    made = pdnet(parameters_of(network), 0)
    assert all(torch.equal(made[name], value) for name, value in network.named_parameters())


# The module.


def test_generated_parameters_go_through_state_dict_and_give_the_same_outputs():
    network, inputs = toys.net(40, seed=1), toys.rows(5)[0]
    pdnet = PDNet({name: [tuple(value.shape)] * 3 for name, value in network.named_parameters()}, rank=4)
    with torch.no_grad():
        for parameter in pdnet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        made = pdnet(parameters_of(network), 1)
    other = toys.net(40, seed=2)
    other.load_state_dict(made)
    assert torch.equal(other(inputs), functional_call(network, made, (inputs,)))
    assert not torch.allclose(other(inputs), network(inputs))


def test_it_is_saved_and_read_and_inspected(tmp_path):
    shapes = {"a.weight": [(40, 6), (30, 6), (20, 6)], "a.bias": [(40,), (30,), (20,)], "scale": [(), (), ()]}
    pdnet = PDNet(shapes, rank=4, block=16)
    with torch.no_grad():
        for parameter in pdnet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    pdnet.save(tmp_path / "pdnet.pt")
    again = PDNet.load(tmp_path / "pdnet.pt")
    given = {"a.weight": torch.randn(30, 6), "a.bias": torch.randn(30), "scale": torch.tensor(2.0)}
    ours, theirs = pdnet(given, 1), again(given, 1)
    assert all(torch.equal(ours[name], theirs[name]) for name in given)
    assert {name: tuple(value.shape) for name, value in ours.items()} == {
        "a.weight": (20, 6),
        "a.bias": (20,),
        "scale": (),
    }
    weight, bias, scale = pdnet.describe()
    assert (weight["map"], bias["map"], scale["map"]) == ("rank 4", "rank 4", "full")
    assert len(weight["gains"]) == 2
    assert len(weight["gains"][0]) == 3, "a gain for each block of 16 of the 40 units"
    assert weight["mixing_norm"] == pytest.approx(
        float((pdnet.maps[0].outputs.left @ pdnet.maps[0].outputs.right.T).detach().norm()), rel=1e-4
    )


def test_the_gains_know_the_layer_and_the_position():
    pdnet = PDNet({"a": [(8, 3)] * 4, "b": [(8, 3)] * 4})
    with torch.no_grad():
        pdnet.gain.weight.normal_()
    seen = [pdnet.gains(layer, point).item() for layer in range(2) for point in range(3)]
    assert len(set(seen)) == 6
    assert PDNet({"a": [(8, 3)] * 4}, linear=True).describe()[0].get("gains") is None


def test_wider_networks_grow_from_narrower_ones():
    pdnet = PDNet({"weight": [(2, 3), (4, 5)]}, linear=True)
    given = torch.randn(2, 3)
    made = pdnet({"weight": given}, 0)["weight"]
    assert torch.equal(made[:2, :3], given)
    assert made[2:].abs().max() == made[:, 3:].abs().max() == 0


# Alignment.


class Stack(nn.Module):
    """Convolution, batch norm, a flatten, two linear layers."""

    def __init__(self, seed: int, channels: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = nn.Conv1d(1, channels, 3), nn.BatchNorm1d(channels)
        self.mid, self.head = nn.Linear(channels * 4, 9), nn.Linear(9, toys.CLASSES)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.norm.weight.data.uniform_(0.5, 2)

    def forward(self, inputs):
        x = self.norm(self.conv(inputs[:, None])).relu().flatten(1)
        return self.head(self.mid(x).relu())


def shuffled(network: Stack) -> Stack:
    """The same function with its hidden units in another order."""
    other = Stack(0)
    other.load_state_dict(network.state_dict())
    torch.manual_seed(5)
    channels, hidden = torch.randperm(6), torch.randperm(9)
    with torch.no_grad():
        for module, names in (
            (other.conv, ("weight", "bias")),
            (other.norm, ("weight", "bias", "running_mean", "running_var")),
        ):
            for name in names:
                getattr(module, name).copy_(getattr(module, name)[channels])
        columns = (channels[:, None] * 4 + torch.arange(4)).flatten()
        other.mid.weight.copy_(other.mid.weight[hidden][:, columns])
        other.mid.bias.copy_(other.mid.bias[hidden])
        other.head.weight.copy_(other.head.weight[:, hidden])
    return other.eval()


def test_units_in_another_order_are_put_back():
    network, inputs = Stack(1).eval(), toys.rows(64)[0]
    other = shuffled(network)
    torch.testing.assert_close(other(inputs), network(inputs))
    assert relative_error(parameters_of(other), parameters_of(network)) > 0.1
    done = align(other, network, inputs)
    assert [(item.layer, item.units) for item in done] == [("conv", 6), ("mid", 9)]
    assert all(item.moved > 0 and not item.note for item in done)
    assert toys.same_bits(other, network), "weights, biases, norms and buffers"


def test_alignment_leaves_the_outputs_as_they_were():
    inputs = toys.rows(64)[0]
    one, other = Stack(1), Stack(2)
    before = other.eval()(inputs)
    align(other, one, inputs)
    torch.testing.assert_close(other(inputs), before, atol=1e-5, rtol=1e-4)


class Residual(nn.Module):
    """Units that another path reads too: they can't be reordered one layer at a time."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = (nn.Linear(toys.FEATURES, size) for size in (6, 6, toys.CLASSES))

    def forward(self, inputs):
        hidden = self.a(inputs).relu()
        return self.c(self.b(hidden).relu() + hidden)


def test_a_layer_that_cannot_be_reordered_stays_and_says_so():
    network, inputs = Residual(1), toys.rows(32)[0]
    before = toys.weights(network)
    done = align(network, Residual(2), inputs)
    assert toys.same_bits(network, before)
    assert all("without changing the outputs" in item.note for item in done)


def test_networks_of_different_widths_are_matched_as_far_as_they_go():
    like = torch.randn(50, 3)
    wide = torch.cat([torch.randn(50, 2), like[:, [2, 0, 1]]], 1)
    assert matched(like, wide).tolist() == [3, 4, 2, 0, 1]
    assert matched(wide, like).tolist() == [2, 0, 1], "in the order of their partners"


# Flow, outputs, errors.


def test_the_flow_is_the_mean_outer_product_of_successive_layers():
    network, inputs = (
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.Linear(3, 4)),
        toys.rows(7)[0],
    )
    outputs, flows = flow(network, inputs)
    first = network[0](inputs)
    second = network[2](first.relu())
    assert len(flows) == 1
    torch.testing.assert_close(flows[0], torch.einsum("ni,nj->ij", first, second) / 7)
    assert torch.equal(outputs, network(inputs))


def test_errors_are_zero_for_what_is_equal_and_known_for_what_is_not():
    values = {"a": torch.tensor([3.0, 4.0])}
    assert relative_error(values, values) == 0
    assert float(relative_error({"a": torch.zeros(2)}, values)) == pytest.approx(1.0, rel=1e-5)
    p, q = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.25, 0.75]]))
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert float(output_error(q, p, regression=False)) == pytest.approx(expected, rel=1e-5)
    assert float(output_error(q, p, regression=True)) == pytest.approx(float((q - p).square().mean()))


def test_several_anchors_teach_by_their_mean_probability():
    networks, inputs = [toys.net(seed=1), toys.net(seed=2)], toys.rows(5)[0]
    together = PathOutputs(networks, regression=False)(inputs).softmax(-1)
    torch.testing.assert_close(together, torch.stack([n(inputs).softmax(-1) for n in networks]).mean(0))
    assert torch.equal(PathOutputs(networks[:1], regression=False)(inputs), networks[0](inputs))
    both = PathOutputs(networks, regression=True)(inputs)
    torch.testing.assert_close(both, (networks[0](inputs) + networks[1](inputs)) / 2)


def test_the_output_error_of_nearly_equal_outputs_is_not_lost_in_rounding():
    """The engine's loss, and no second copy of its formula, which cancels here (and is negative in some rows)."""
    real = 3 * torch.randn(16, 1000, generator=torch.Generator().manual_seed(0))
    made = real + 1e-4 * torch.randn(16, 1000, generator=torch.Generator().manual_seed(1))
    log_p, log_q = (x.double().log_softmax(-1) for x in (real, made))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    got = output_error(made, real, regression=False).double()
    assert (got >= 0).all()
    assert torch.allclose(got, expected, rtol=1e-4, atol=0)
