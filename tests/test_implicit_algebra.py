"""Models made of networks and of models compute the same, and say what was left out."""

import pytest
import torch
from torch import nn

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.implicit.activations import Blocks, MaxPool
from declarative_cvx.nonconvex.implicit.algebra import (
    add,
    affine,
    cascade,
    elementwise,
    parallel,
    permute,
    rescale,
)
from declarative_cvx.nonconvex.implicit.networks import from_recurrent, from_sequential
from declarative_cvx.nonconvex.implicit.reduction import partition, predict, prune
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights

ROUNDING = 1e-12


def random_weights(n, p, q, activation="relu", kappa=0.8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A = draw(n, n)
    A = kappa * A / A.abs().sum(1).max()
    return ImplicitWeights(A, draw(n, p), draw(q, n), draw(q, p), draw(n), draw(q), activation)


def inputs(p, batch=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, p, generator=generator, dtype=torch.float64)


def reference(weights, u):
    """Outputs by many Picard steps, which contract here."""
    dense = weights.dense()
    x = u.new_zeros(len(u), dense.state_features)
    for _ in range(400):
        x = dense.activation(x @ dense.A.T + u @ dense.B.T + dense.b)
    return x @ dense.C.T + u @ dense.D.T + dense.c


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3)), (4,)),
    "layers": (
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2), nn.Sigmoid()
        ),
        (4,),
    ),
    "nested, two linear in a row": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.2)),
            nn.Linear(6, 5),
            nn.Linear(5, 3, bias=False),
        ),
        (4,),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 3, 2, dilation=2, padding="same"),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d((2, 3)),
            nn.Flatten(),
            nn.Linear(18, 3),
        ),
        (2, 9, 8),
    ),
    "pooling": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(8, 2),
        ),
        (1, 9, 9),
    ),
    "ceiling, dilation": (
        lambda: nn.Sequential(nn.MaxPool2d(2, stride=2, dilation=2, ceil_mode=True)),
        (2, 7, 8),
    ),
    "adaptive maximum": (lambda: nn.Sequential(nn.AdaptiveMaxPool2d((3, 2))), (2, 7, 5)),
    "one axis": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 4, padding=3, padding_mode="circular"), nn.MaxPool1d(4, 3), nn.ReLU()
        ),
        (2, 11),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(1, 2, 3, stride=2), nn.Sigmoid(), nn.MaxPool2d(2)),
        (1, 3, 3),
    ),
}


def network(name):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    module = make().double()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.normal_()
            child.running_var.uniform_(0.5, 2)
            nn.init.normal_(child.weight)
    return module.eval(), shape


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_as_implicit_model_computes_the_same(name, sparse):
    module, shape = network(name)
    weights = from_sequential(module, shape, sparse=sparse, dtype=torch.float64)
    u = torch.randn(5, *shape, dtype=torch.float64)
    y = predict(weights, u.flatten(1))
    torch.testing.assert_close(y, module(u).flatten(1), rtol=0, atol=ROUNDING)
    assert weights.is_sparse == sparse
    assert not weights.dense().A.triu().any(), "states are in the order of the layers"


def test_network_keeps_its_type_and_its_weights():
    module, _ = network("layers")
    module = module.float()
    before = [parameter.clone() for parameter in module.parameters()]
    weights = from_sequential(module, 4)
    u = torch.randn(5, 4)
    assert weights.A.dtype == torch.float32
    torch.testing.assert_close(predict(weights, u), module(u), rtol=0, atol=1e-6)
    assert all(map(torch.equal, before, module.parameters()))
    assert torch.equal(weights.B[:6], module[0].weight), "entries are copied without rounding"


@pytest.mark.parametrize(
    ("module", "word"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Softplus()), "'1' is Softplus"),
        (nn.Sequential(nn.BatchNorm1d(4)), r"\.eval\(\)"),
        (nn.Sequential(nn.Dropout()), r"\.eval\(\)"),
        (nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)).eval(), "running statistics"),
    ],
)
def test_network_without_exact_form_is_refused(module, word):
    with pytest.raises(SpecificationError, match=word):
        from_sequential(module, 4)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nonlinearity": "relu", "bias": False},
        {"num_layers": 2, "bidirectional": True},
    ],
)
def test_unrolled_recurrent_network_computes_the_same(options, sparse):
    torch.manual_seed(0)
    module = nn.RNN(3, 4, batch_first=True, **options).double()
    weights = from_recurrent(module, 6, sparse=sparse)
    u = torch.randn(5, 6, 3, dtype=torch.float64)
    y = predict(weights, u.flatten(1))
    torch.testing.assert_close(y, module(u)[0].flatten(1), rtol=0, atol=ROUNDING)


def test_recurrent_network_with_gates_is_refused():
    with pytest.raises(SpecificationError, match="GRU"):
        from_recurrent(nn.GRU(2, 2), 3)


@pytest.mark.parametrize("sparse", [False, True])
def test_composed_models_compute_what_their_parts_do(sparse):
    first = random_weights(5, 3, 4, "tanh")
    second = random_weights(6, 4, 2, Blocks([("relu", 4), ("sigmoid", 2)]), seed=1)
    twin = random_weights(4, 3, 4, "relu", seed=2)
    u = inputs(3)
    y, z = reference(first, u), reference(twin, u)
    if sparse:
        first, second, twin = first.sparse(), second.sparse(), twin.sparse()
    expected = {
        "cascade": (cascade(first, second), reference(second, y)),
        "parallel": (parallel(first, twin), torch.cat([y, z], 1)),
        "add": (add(first, twin), y + z),
        "skip": (cascade(first, add(twin_of(second), second)), 2 * reference(second, y)),
    }
    for name, (model, value) in expected.items():
        difference = (predict(model, u, tol=1e-13) - value).abs().max()
        assert difference < ROUNDING * value.abs().max(), name


def twin_of(weights):
    return permute(weights, torch.arange(weights.state_features))


def test_cascade_is_the_papers_matrix():
    one, two = random_weights(2, 3, 4), random_weights(3, 4, 1, seed=1)
    both = cascade(one, two)
    zero = torch.zeros(2, 3, dtype=torch.float64)
    expected = torch.cat([torch.cat([one.A, zero], 1), torch.cat([two.B @ one.C, two.A], 1)])
    assert torch.equal(both.A, expected)
    assert torch.equal(both.C, torch.cat([two.D @ one.C, two.C], 1))


def test_composition_is_differentiable():
    first, second = random_weights(3, 2, 2, "tanh"), random_weights(2, 2, 1, "tanh", seed=3)
    u = inputs(2, batch=3)

    def run(A, C):
        model = ImplicitWeights(A, first.B, C, first.D, first.b, first.c, "tanh")
        return predict(cascade(model, second), u, tol=1e-13)

    arguments = tuple(value.clone().requires_grad_() for value in (first.A, first.C))
    assert torch.autograd.gradcheck(run, arguments, atol=1e-6)


@pytest.mark.parametrize("activation", ["tanh", Blocks([("relu", 3), ("tanh", 3)])])
def test_permuted_model_computes_the_same(activation):
    weights = random_weights(6, 3, 2, activation)
    order = torch.tensor([4, 0, 3, 5, 2, 1])
    permuted = permute(weights, order)
    u = inputs(3)
    torch.testing.assert_close(reference(permuted, u), reference(weights, u), atol=1e-13, rtol=0)
    assert torch.equal(permuted.A[0], weights.A[4, order])


def test_whole_vector_blocks_stay_together():
    blocks = Blocks([("relu", 2), (MaxPool(), 3)])
    weights = random_weights(5, 3, 2, blocks, kappa=0.3)
    u = inputs(3)
    moved = permute(weights, torch.tensor([2, 3, 4, 1, 0]))
    torch.testing.assert_close(reference(moved, u), reference(weights, u), atol=1e-13, rtol=0)
    with pytest.raises(SpecificationError, match="together"):
        permute(weights, torch.tensor([2, 4, 3, 1, 0]))


@pytest.mark.parametrize("sparse", [False, True])
def test_rescaled_model_computes_the_same(sparse):
    weights = random_weights(6, 3, 2, Blocks([("relu", 3), ("leaky_relu", 3)]))
    scale = torch.tensor([0.5, 3, 1, 7, 0.1, 2], dtype=torch.float64)
    scaled = rescale(weights.sparse() if sparse else weights, scale).dense()
    u = inputs(3)
    torch.testing.assert_close(reference(scaled, u), reference(weights, u), atol=1e-12, rtol=0)
    torch.testing.assert_close(scaled.A, torch.diag(scale) @ weights.A @ torch.diag(1 / scale))
    with pytest.raises(ParameterError, match="tanh"):
        rescale(random_weights(6, 3, 2, "tanh"), scale)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ParameterError, match="3 inputs cannot follow one with 2 outputs"):
        cascade(random_weights(4, 3, 2), random_weights(4, 3, 2))
    with pytest.raises(ParameterError, match="same number of outputs"):
        add(random_weights(4, 3, 2), random_weights(4, 3, 1))
    with pytest.raises(ParameterError, match=r"each of 0, \.\.\., 3 once"):
        permute(random_weights(4, 3, 2), torch.tensor([0, 1, 1, 3]))
    weights = random_weights(4, 3, 2)
    with pytest.raises(ParameterError, match=r"B must have shape \(4, 3\)"):
        ImplicitWeights(
            weights.A, weights.B.T, *(weights.C, weights.D, weights.b, weights.c), "relu"
        )


def sparse_rows_and_columns():
    """States 0, 1 constant; 2 and 5 not seen; input 1 idle; 3 before, 4, 6 core, 7 after."""
    weights = random_weights(8, 3, 2, "sigmoid")
    A, B, C, D = (value.clone() for value in (weights.A, weights.B, weights.C, weights.D))
    A[0], A[1], A[3] = 0, 0, 0
    A[1, 0] = A[2, 1] = A[3, 1] = 0.1
    B[:2] = 0
    A[4, 5] = A[6, 5] = A[7, 5] = A[4, 2] = A[6, 2] = A[7, 2] = 0
    C[:, [2, 5]] = 0
    A[:, 7] = 0
    B[:, 1] = D[:, 1] = 0
    return ImplicitWeights(A, B, C, D, weights.b, weights.c, "sigmoid")


@pytest.mark.parametrize("sparse", [False, True])
def test_pruned_model_computes_the_same_with_fewer_states(sparse):
    weights = sparse_rows_and_columns()
    pruned = prune(weights.sparse() if sparse else weights)
    assert pruned.constant.tolist() == [0, 1]
    assert pruned.unseen.tolist() == [2, 5]
    assert pruned.kept.tolist() == [3, 4, 6, 7]
    assert pruned.idle_inputs.tolist() == [1]
    assert str(pruned).startswith("8 -> 4 states (2 constant, 2 unseen")
    u = inputs(3)
    expected = reference(weights, u)
    torch.testing.assert_close(reference(pruned.weights, u), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(predict(pruned.weights, u, tol=1e-13), expected, atol=1e-12, rtol=0)


def test_only_the_core_needs_a_fixed_point():
    weights = prune(sparse_rows_and_columns()).weights
    order = partition(weights)
    assert [level.tolist() for level in order.before] == [[0]]
    assert order.core.tolist() == [1, 2]
    assert [level.tolist() for level in order.after] == [[3]]


def test_blocks_are_pruned_as_a_whole():
    weights = random_weights(6, 3, 2, Blocks([("relu", 2), (MaxPool(), 2), ("tanh", 2)]), 0.4)
    A, C = weights.A.clone(), weights.C.clone()
    A[:, 2] = C[:, 2] = 0  # state 3, of the same block, is still seen
    A[:2, 4:] = A[2:4, 4:] = C[:, 4:] = 0
    sparse = ImplicitWeights(A, weights.B, C, weights.D, weights.b, weights.c, weights.activation)
    pruned = prune(sparse)
    assert pruned.kept.tolist() == [0, 1, 2, 3]
    u = inputs(3)
    torch.testing.assert_close(
        reference(pruned.weights, u), reference(sparse, u), atol=1e-13, rtol=0
    )


def test_model_without_states_and_with_activation_only():
    u = inputs(3)
    line = affine(torch.eye(3, dtype=torch.float64)[:2], torch.ones(2, dtype=torch.float64))
    assert torch.equal(predict(line, u), u[:, :2] + 1)
    bend = elementwise("relu", 3, dtype=torch.float64)
    assert torch.equal(predict(bend, u), u.relu())
    assert len(prune(cascade(line, elementwise("tanh", 2, dtype=torch.float64))).kept) == 2


def test_inputs_that_do_not_fit_are_refused():
    weights = random_weights(4, 3, 2)
    with pytest.raises(ParameterError, match=r"shape \(batch, 3\)"):
        predict(weights, inputs(2))
    u = inputs(3)
    u[2, 1] = torch.nan
    with pytest.raises(ParameterError, match=r"u\[2, 1\] is nan"):
        predict(weights, u)


def test_module_that_is_there_twice_is_applied_twice():
    torch.manual_seed(31)
    act, square = nn.ReLU(), nn.Linear(4, 4)
    network = nn.Sequential(square, act, square, nn.Sequential(act, nn.Linear(4, 2)), act).double()
    u = torch.randn(7, 4, dtype=torch.float64)
    torch.testing.assert_close(predict(from_sequential(network, 4), u), network(u))


def test_sequential_with_a_forward_of_its_own_is_refused():
    class Residual(nn.Sequential):
        def forward(self, u):
            return u + super().forward(u)

    with pytest.raises(SpecificationError, match="'1' is Residual"):
        from_sequential(nn.Sequential(nn.Linear(3, 3), Residual(nn.Linear(3, 3))), 3)


def test_scale_without_reciprocal_in_the_weights_type_is_refused():
    weights = from_sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), 2)
    for value in (1e-50, 1e-40, 1e50):
        with pytest.raises(ParameterError, match="reciprocals"):
            rescale(weights, torch.full((3,), value, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"tool": 3}, "'tool'.*tol"), ({"method": "secant"}, "method"), ({"tol": -1.0}, "tol")],
)
def test_options_that_mean_nothing_are_refused_without_cycles_too(options, words):
    weights = from_sequential(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).double(), 4)
    with pytest.raises(SpecificationError, match=words):
        predict(weights, inputs(4), **options)


def test_what_hooks_add_is_not_lost_without_a_word():
    """The hook makes the network another function than its modules."""
    inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    network = nn.Sequential(nn.Linear(4, 3), inner)
    for module in (network, network[0], inner, inner[1]):
        handle = module.register_forward_hook(lambda _module, _given, y: 2 * y)
        with pytest.raises(SpecificationError, match="hook"):
            from_sequential(network, 4)
        handle.remove()
    handle = network[0].register_forward_pre_hook(lambda _module, given: (given[0] + 1,))
    with pytest.raises(SpecificationError, match=r"'0' .Linear. has forward hooks"):
        from_sequential(network, 4)
    handle.remove()
    inner[1].forward = torch.tanh
    with pytest.raises(SpecificationError, match=r"'1\.1'"):
        from_sequential(network, 4)
    recurrent = nn.RNN(2, 2)
    recurrent.register_forward_hook(lambda _module, _given, y: y)
    with pytest.raises(SpecificationError, match="hooks"):
        from_recurrent(recurrent, 2)
