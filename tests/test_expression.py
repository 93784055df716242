"""Every atom of CVXPY in torch: value, gradient, second derivative, and under vmap."""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from cvxpy import nlp
from cvxpy.atoms.affine import wraps
from cvxpy.atoms.affine.binary_operators import DivExpression, MulExpression, multiply
from cvxpy.atoms.affine.concatenate import Concatenate
from torch.func import grad, hessian, vmap

from declarative_cvx.atoms import (
    cauchy,
    geman_mcclure,
    pseudo_huber,
    truncated_quadratic,
    tukey,
    welsch,
)
from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.translation.expression import (
    RULES,
    translate_expression,
    translate_expressions,
)
from declarative_cvx.rewriting import SquareRoot

rng = np.random.default_rng(0)


def seed(number):
    rng.bit_generator.state = np.random.default_rng(number).bit_generator.state


def var(*shape, low=-1.0, high=1.0, **attributes):
    return cp.Variable(shape, value=rng.uniform(low, high, shape), **attributes)


def par(*shape, low=-1.0, high=1.0, **attributes):
    return cp.Parameter(shape, value=rng.uniform(low, high, shape), **attributes)


def positive(*shape):
    return var(*shape, low=0.3, high=2.0)


def array(*shape):
    return rng.normal(size=shape)


def definite(n):
    """A positive definite expression in a variable."""
    X = var(n, n)
    return X @ X.T + np.diag(np.arange(1.0, n + 1))


def symmetric(n):
    X = var(n, n)
    return X + X.T


x3, x4, X23, X33, X234 = (lambda: var(3)), (lambda: var(4)), (lambda: var(2, 3)), (
    lambda: var(3, 3)
), (lambda: var(2, 3, 4))  # fmt: skip

AFFINE = {
    "add": lambda: [x3() + par(3), X23() + var() + 1.5, X234() + var(3, 1), sum([x3()] * 3)],
    "negate": lambda: [-x3(), -X234()],
    "subtract": lambda: [x3() - par(), X23() - array(2, 3)],
    "scale": lambda: [2 * x3(), par() * X23(), x3() * var(), X234() * 3],
    "multiply": lambda: [
        cp.multiply(x3(), par(3)), cp.multiply(X23(), X23()), cp.multiply(X23(), x3()),
        cp.multiply(X234(), par(3, 4)), cp.multiply(var(), X23()),
    ],
    "divide": lambda: [x3() / 2.5, x3() / positive(3), X23() / par(low=1, high=2), 1 / positive()],
    "divide_by_negative": lambda: [x3() / par(low=-2, high=-1), x3() / var(3, low=-2, high=-1)],
    "matmul": lambda: [
        array(2, 3) @ x3(), x3() @ par(3, 2), X23() @ X33(), x3() @ x3(), x3() @ X33() @ x3(),
        par(2, 3) @ X33(), var(5, 2, 3) @ var(5, 3, 2), array(3, 3) @ var(2, 3, 4),
        var(1, 3) @ x3(),
    ],
    "outer": lambda: [cp.outer(x3(), x4()), cp.vdot(X23(), X23())],
    "kron": lambda: [cp.kron(array(2, 2), X23()), cp.kron(X23(), par(2, 1)),
             cp.kron(np.eye(2), X23().T)],
    "conv": lambda: [cp.conv(array(3), x4()), cp.conv(par(3), var(4, 1)), cp.conv(array(5), x3())],
    "convolve": lambda: [cp.convolve(array(3), x4()), cp.convolve(par(4), x3())],
    "einsum": lambda: [
        cp.einsum("ij,jk->ik", X23(), X33()), cp.einsum("ii->", X33()), cp.einsum("ii->i", X33()),
        cp.einsum("ijk,j->ik", X234(), par(3)), cp.einsum("ijk->kj", X234()),
    ],
    "sum": lambda: [
        cp.sum(X23()), cp.sum(X23(), axis=0), cp.sum(X23(), axis=-1, keepdims=True),
        cp.sum(X234(), axis=(0, 2)), cp.sum(X234(), axis=1), cp.sum(X23(), keepdims=True),
        cp.sum(var()),
    ],
    "mean": lambda: [cp.mean(X23()), cp.mean(X23(), axis=1), cp.mean(X234(), axis=(1, 2))],
    "trace": lambda: [cp.trace(X33()), cp.trace(X33() @ X33()), cp.trace(var(2, 3, 3))],
    "cumsum": lambda: [cp.cumsum(x4()), cp.cumsum(X23(), axis=1), cp.cumsum(X23(), axis=None)],
    "cumprod": lambda: [cp.cumprod(x4()), cp.cumprod(X23(), axis=1), cp.cumprod(var(5, 2))],
    "diff": lambda: [cp.diff(x4()), cp.diff(var(4, 2), k=2), cp.diff(X23(), axis=1)],
    "index": lambda: [
        x4()[1], x4()[-1], x4()[1:3], x4()[::-1], X23()[1], X23()[:, 1], X23()[1, ::2],
        X23()[::-1, 0:2], X234()[..., 2], X234()[0, 1:, ::-2], x3()[:, None], X23()[None, 1],
        x4()[3:0:-1], X23().flatten(order="F")[np.int64(2)],
    ],
    "special_index": lambda: [
        x4()[[2, 0, 0]], X23()[[1, 0], [2, 2]], X23()[array(2, 3) > 0], X23()[:, [0, 2]],
        x4()[np.array([True, False, True, True])], X23()[np.ix_([0, 1], [2, 1])],
        X234()[[1, 0], :, [0, 3]], X234()[:, [2, 0]],
    ],
    "reshape": lambda: [
        cp.reshape(X23(), (3, 2), order="F"), cp.reshape(X23(), (3, 2), order="C"),
        cp.reshape(X234(), (4, 6), order="F"), cp.reshape(X234(), (4, 3, 2), order="C"),
        cp.reshape(X23(), (-1, 2), order="F"), cp.reshape(var(1), (), order="F"),
    ],
    "vec": lambda: [cp.vec(X23(), order="F"), cp.vec(X23(), order="C"), X234().flatten(order="F")],
    "squeeze": lambda: [cp.squeeze(var(1, 3)), cp.squeeze(var(2, 1, 3), axis=1)],
    "transpose": lambda: [
        X23().T, X234().T, x3().T, cp.transpose(X234(), (1, 2, 0)), cp.swapaxes(X234(), 0, 2),
        cp.moveaxis(X234(), 0, -1), cp.permute_dims(X234(), (2, 0, 1)),
    ],
    "hstack": lambda: [cp.hstack([var(), x3(), 1.0]), cp.hstack([X23(), par(2, 1)])],
    "vstack": lambda: [cp.vstack([x3(), par(3)]), cp.vstack([X23(), X33()]), cp.vstack([var(), 1])],
    "bmat": lambda: [cp.bmat([[X23(), par(2, 2)], [array(1, 4), var(1, 1)]])],
    "concatenate": lambda: [
        cp.concatenate([X23(), X33()]), cp.concatenate([X23(), par(2, 2)], axis=1),
        cp.concatenate([X23(), X33()], axis=None), cp.concatenate([x3(), x4()]),
    ],
    "stack": lambda: [cp.stack([x3(), par(3)]), cp.stack([X23(), X23()], axis=1)],
    "diag_vec": lambda: [cp.diag(x3()), cp.diag(x3(), k=1), cp.diag(par(3) + x3(), k=-2)],
    "diag_mat": lambda: [cp.diag(X33()), cp.diag(X33(), k=1), cp.diag(var(4, 4), k=-2)],
    "upper_tri": lambda: [cp.upper_tri(var(4, 4)), cp.vec_to_upper_tri(var(6))],
    "promote": lambda: [cp.promote(var(), (2, 3)), var() + np.zeros((2, 2, 2))],
    "broadcast_to": lambda: [cp.broadcast_to(x3(), (2, 3)), cp.broadcast_to(var(2, 1), (4, 2, 3))],
    "partial_trace": lambda: [cp.partial_trace(var(4, 4), (2, 2), axis=1)],
    "partial_transpose": lambda: [cp.partial_transpose(var(6, 6), (2, 3), axis=0)],
    "wraps": lambda: [
        wraps.psd_wrap(definite(3)), wraps.symmetric_wrap(symmetric(3)),
        wraps.nonneg_wrap(positive(3)),
        wraps.nonpos_wrap(-positive(2)), wraps.skew_symmetric_wrap(var(2, 2)),
        wraps.nsd_wrap(-definite(2)), wraps.hermitian_wrap(symmetric(2)),
    ],
    "real_parts": lambda: [cp.real(x3()), cp.conj(X23())],
    "one_minus_pos": lambda: [cp.one_minus_pos(var(3, low=0.1, high=0.9, pos=True))],
}  # fmt: skip

SMOOTH = {
    "exp": lambda: [cp.exp(x3()), cp.exp(X234())],
    "log": lambda: [cp.log(positive(3)), cp.log(positive(2, 3))],
    "log1p": lambda: [cp.log1p(var(3, low=-0.5, high=3))],
    "entr": lambda: [cp.entr(positive(3))],
    "rel_entr": lambda: [cp.rel_entr(positive(3), positive(3)), cp.rel_entr(positive(2, 3), 2.0)],
    "rel_entr_parameter": lambda: [cp.rel_entr(par(3, low=0.5, high=2), positive(3))],
    "kl_div": lambda: [
        cp.kl_div(positive(3), positive(3)), cp.kl_div(positive(3), par(3, low=0.5, high=2)),
    ],
    "logistic": lambda: [cp.logistic(x3()), cp.logistic(var(4, low=-60, high=60))],
    "square": lambda: [cp.square(x3()), cp.sum_squares(X23()), x3() ** 2],
    "power": lambda: [
        x3() ** 3, x3() ** 4, positive(3) ** 0.7, positive(3) ** -1, positive(3) ** -2.3,
        cp.power(positive(2, 3), 1.5), x3() ** 1, cp.power(positive(3), 2 / 3, approx=False),
        cp.power(2.0, x3()),
    ],
    "power_parameter": lambda: [cp.power(positive(3), par(low=-2, high=2))],
    "sqrt": lambda: [cp.sqrt(positive(3))],
    "inv_pos": lambda: [cp.inv_pos(positive(3)), cp.inv_prod(positive(3))],
    "sin": lambda: [nlp.sin(x3())],
    "cos": lambda: [nlp.cos(X23())],
    "tan": lambda: [nlp.tan(x3())],
    "sinh": lambda: [nlp.sinh(x3())],
    "tanh": lambda: [nlp.tanh(x3())],
    "asinh": lambda: [nlp.asinh(x3())],
    "atanh": lambda: [nlp.atanh(var(3, low=-0.8, high=0.8))],
    "xexp": lambda: [cp.xexp(positive(3))],
    "normcdf": lambda: [nlp.normcdf(x3())],
    "log_normcdf": lambda: [cp.log_normcdf(x3())],
    "products": lambda: [var() * var() / positive(), x3() @ symmetric(3) @ x3()],
    "quad_form": lambda: [
        cp.quad_form(x3(), np.eye(3)), cp.quad_form(var(3, 1), np.diag([1.0, 2, 3])),
        cp.quad_form(x3(), cp.Parameter((3, 3), PSD=True, value=np.diag([1.0, 2, 3]))),
    ],
    "quad_over_lin": lambda: [
        cp.quad_over_lin(x3(), positive()), cp.quad_over_lin(X23(), par(low=1, high=2)),
        cp.sum_squares(X23(), axis=1), cp.quad_over_lin(X234(), positive(), axis=(0, 2)),
    ],
    "var": lambda: [cp.var(X23()), cp.var(X23(), axis=1), cp.std(X23())],
    "log_sum_exp": lambda: [
        cp.log_sum_exp(x3()), cp.log_sum_exp(X23(), axis=0), cp.log_sum_exp(X23(), axis=1,
        keepdims=True), cp.log_sum_exp(X234(), axis=(0, 1)),
    ],
    "prod": lambda: [
        cp.prod(x4()), cp.prod(X23(), axis=0), cp.prod(X234(), axis=(0, 2)),
        cp.prod(X23(), axis=1, keepdims=True), cp.prod(x3() * np.array([0.0, 1, 1])),
        cp.prod(x4() * np.array([0.0, 0, 1, 1])),
    ],
    "geo_mean": lambda: [
        cp.geo_mean(positive(3)), cp.geo_mean(positive(3), [1, 2, 0.5]), cp.geo_mean(
        positive(3), [1, 0, 2]), cp.geo_mean(positive(3), [0.3, 0.45, 0.25], approx=False),
        cp.geo_mean(positive(2, 3), axis=1), cp.geo_mean(positive(2, 3)),
    ],
    "harmonic_mean": lambda: [cp.harmonic_mean(positive(3))],
    "pnorm": lambda: [
        cp.pnorm(x3(), 2), cp.pnorm(x3(), 3), cp.pnorm(x3(), 1.5), cp.pnorm(positive(3), 0.5),
        cp.pnorm(positive(3), -1), cp.pnorm(X23(), 2.5), cp.norm(X23(), 2, axis=0),
        cp.pnorm(x3(), 3.3, approx=False), cp.norm(X23(), "fro"),
    ],
    "mixed_norm": lambda: [cp.mixed_norm(X23(), 2, 3)],
    "log_det": lambda: [cp.log_det(definite(3))],
    "tr_inv": lambda: [cp.tr_inv(definite(3))],
    "matrix_frac": lambda: [
        cp.matrix_frac(x3(), definite(3)), cp.matrix_frac(var(3, 2), definite(3)),
    ],
    "square_root": lambda: [SquareRoot(definite(3))],
    "lambda_max": lambda: [cp.lambda_max(symmetric(3)), cp.lambda_min(symmetric(3))],
    "lambda_sum": lambda: [
        cp.lambda_sum_largest(symmetric(4), 2), cp.lambda_sum_smallest(symmetric(3), 1.5),
    ],
    "von_neumann_entr": lambda: [cp.von_neumann_entr(wraps.symmetric_wrap(definite(3)))],
    "sigma_max": lambda: [cp.sigma_max(X23())],
    "norm_nuc": lambda: [cp.normNuc(X23())],
    "condition_number": lambda: [cp.condition_number(definite(3))],
    "dist_ratio": lambda: [cp.dist_ratio(x3(), np.ones(3), -np.ones(3))],
    "eye_minus_inv": lambda: [cp.eye_minus_inv(var(3, 3, low=0.05, high=0.2, pos=True))],
    "gmatmul": lambda: [cp.gmatmul(array(2, 3), var(3, low=0.5, high=2, pos=True))],
    "perspective": lambda: [_perspective()],
    "penalties": lambda: [
        atom(x3(), alpha)
        for atom in (pseudo_huber, welsch, cauchy, geman_mcclure)
        for alpha in (0.5, par(3, low=0.5, high=2, pos=True))
    ] + [tukey(var(3, low=-0.4, high=0.4), 0.5)],
}  # fmt: skip

KINKED = {
    "abs": lambda: [cp.abs(x3())],
    "maximum": lambda: [cp.maximum(x3(), 0.2, par(3)), cp.pos(x3())],
    "minimum": lambda: [cp.minimum(X23(), X23(), 0), cp.neg(x3()), cp.scalene(x3(), 2, 3)],
    "max": lambda: [cp.max(X23()), cp.max(X23(), axis=1), cp.max(X234(), axis=(0, 2))],
    "min": lambda: [cp.min(X23()), cp.min(X23(), axis=0, keepdims=True), cp.ptp(X23(), axis=1)],
    "norm1": lambda: [cp.norm1(X23()), cp.norm(X23(), 1, axis=0)],
    "norm_inf": lambda: [cp.norm_inf(X23()), cp.norm(X23(), "inf", axis=1)],
    "huber": lambda: [cp.huber(x3(), 0.3), cp.huber(x3(), par(low=0.2, high=0.5, nonneg=True))],
    "sum_largest": lambda: [
        cp.sum_largest(x4(), 2),
        cp.sum_largest(X23(), 2.5),
        cp.sum_smallest(X23(), 2),
        cp.sum_largest(X23(), 2, axis=1),
        cp.cvar(x4(), 0.4),
    ],
    "dotsort": lambda: [cp.dotsort(x4(), [1, 3, 2])],
    "cummax": lambda: [cp.cummax(x4()), cp.cummax(X23(), axis=1)],
    "tv": lambda: [cp.tv(x4()), cp.tv(X33())],
    "loggamma": lambda: [cp.loggamma(positive(3))],
    "truncated_quadratic": lambda: [truncated_quadratic(x3(), 0.5)],
}


def _perspective():
    x, s = var(3), cp.Variable(nonneg=True, value=1.7)
    return cp.perspective(cp.sum_squares(x - 1) + cp.sum(cp.exp(x)), s)


TABLE = {**AFFINE, **SMOOTH, **KINKED}


@pytest.fixture
def built(request):
    """Expressions of one line of the table, always with the same random arguments."""
    seed(sum(map(ord, request.param)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield TABLE[request.param]()


def leaves_of(expression):
    return list(
        {leaf.id: leaf for leaf in expression.variables() + expression.parameters()}.values()
    )


def tensors_of(leaves):
    return {leaf.id: torch.tensor(np.asarray(leaf.value, dtype=float)) for leaf in leaves}


def central_difference(expression, leaf, step=1e-6):
    """Derivative of the sum of weighted entries of CVXPY's own value."""
    weights = weights_of(expression).numpy()
    kept = np.array(leaf.value, dtype=float)
    result = np.zeros(leaf.size)
    for entry in range(leaf.size):
        for sign in (1, -1):
            moved = kept.copy().ravel()
            moved[entry] += sign * step
            leaf.save_value(moved.reshape(leaf.shape))
            value = np.asarray(expression.value, dtype=float).reshape(expression.shape)
            result[entry] += sign * (weights * value).sum() / (2 * step)
    leaf.save_value(kept)
    return result.reshape(leaf.shape)


def weights_of(expression):
    count = max(expression.size, 1)
    return torch.linspace(0.5, 1.5, count, dtype=torch.float64).reshape(expression.shape)


def weighted(expression):
    """The translated expression's entries, weighted and summed, as a function of a dictionary."""
    function, weights = translate_expression(expression), weights_of(expression)
    return lambda values: (function(values) * weights).sum()


def atoms_of(expression):
    yield expression
    for argument in expression.args:
        yield from atoms_of(argument)


def cvxpy_has_the_wrong_gradient(atom):
    """It treats products and quotients of variables as affine, and mixes up two orders."""
    if isinstance(atom, Concatenate):
        return atom.axis is None
    return type(atom) in (multiply, MulExpression, DivExpression) and bool(
        atom.args[1].variables() and (atom.args[0].variables() or type(atom) is DivExpression)
    )


every_atom = pytest.mark.parametrize("built", TABLE, indirect=True)


@every_atom
def test_value_is_cvxpys(built):
    for expression in built:
        values = tensors_of(leaves_of(expression))
        ours = translate_expression(expression)(values)
        theirs = np.asarray(expression.value, dtype=float).reshape(expression.shape)
        assert tuple(ours.shape) == expression.shape
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-12, atol=1e-13)


@every_atom
def test_gradient_is_that_of_cvxpys_value(built):
    for expression in built:
        leaves = leaves_of(expression)
        ours = grad(weighted(expression))(tensors_of(leaves))
        for leaf in leaves:
            theirs = central_difference(expression, leaf)
            np.testing.assert_allclose(
                ours[leaf.id].numpy(), theirs, rtol=2e-7, atol=2e-8 * max(1, np.abs(theirs).max())
            )


@every_atom
def test_gradient_is_cvxpys(built):
    for expression in built:
        if any(map(cvxpy_has_the_wrong_gradient, atoms_of(expression))):
            continue
        try:
            theirs = expression.grad
        except (NotImplementedError, AttributeError, ValueError, TypeError, IndexError):
            continue
        ours = grad(weighted(expression))(tensors_of(leaves_of(expression)))
        weights = weights_of(expression).numpy().ravel(order="F")
        for variable, jacobian in theirs.items():
            if jacobian is None:
                continue
            jacobian = jacobian.toarray() if hasattr(jacobian, "toarray") else jacobian
            mine = ours[variable.id].numpy().ravel(order="F")
            expected = np.reshape(jacobian, (variable.size, -1)) @ weights
            np.testing.assert_allclose(mine, expected, rtol=1e-9, atol=1e-10)


@every_atom
def test_second_derivative(built):
    for expression in built:
        leaves = leaves_of(expression)
        function = weighted(expression)
        first = leaves[0]
        values = tensors_of(leaves)

        def along(x, first=first, values=values, function=function):
            return function({**values, first.id: x})

        x = values[first.id]
        direction = torch.linspace(-1, 1, max(first.size, 1), dtype=torch.float64).reshape(x.shape)
        step = 1e-6
        ours = (hessian(along)(x).reshape(x.numel(), -1) @ direction.reshape(-1)).reshape(x.shape)
        slope = grad(along)
        theirs = (slope(x + step * direction) - slope(x - step * direction)) / (2 * step)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * max(1, theirs.abs().max()))


@every_atom
def test_vmap_is_a_loop(built):
    for expression in built:
        values = tensors_of(leaves_of(expression))
        batch = {key: torch.stack([value, value * 0.9]) for key, value in values.items()}
        function = weighted(expression)
        together = vmap(grad(function))(batch)
        for element in range(2):
            alone = grad(function)({key: value[element] for key, value in batch.items()})
            for key, value in alone.items():
                torch.testing.assert_close(together[key][element], value, rtol=1e-10, atol=1e-12)


def test_every_translation_is_in_the_table():
    seed(1)
    used = set()

    def collect(expression):
        used.add(type(expression))
        for argument in expression.args:
            collect(argument)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for expressions in TABLE.values():
            for expression in expressions():
                collect(expression)
    collect(cp.imag(cp.Variable(2)))
    missing = {kind.__name__ for kind in set(RULES) - used}
    assert not missing


def test_imaginary_part_of_a_real_expression_is_zero():
    x = cp.Variable(2)
    assert translate_expression(cp.imag(x))({x.id: torch.ones(2)}).tolist() == [0, 0]


def test_shared_subexpressions_are_computed_once():
    x = cp.Variable(3)
    shared = cp.exp(x)
    program = translate_expressions([shared + cp.sum(shared), cp.log(shared)], ["a", "b"])
    assert len(program._steps) == 5  # exp, sum, promote, add, log


def test_constants_follow_the_type_of_the_values():
    x = cp.Variable(3)
    function = translate_expression(x @ np.ones(3) + 1)
    assert function({x.id: torch.ones(3)}).dtype == torch.float32
    assert function({x.id: torch.ones(3, dtype=torch.float64)}).dtype == torch.float64


def test_constants_made_inside_a_transform_serve_after_it():
    x = cp.Variable(3)
    function = translate_expression(x @ np.arange(3.0))
    assert vmap(lambda v: function({x.id: v}))(torch.ones(2, 3).double()).tolist() == [3, 3]
    assert function({x.id: torch.ones(3).double()}).item() == 3


def test_constant_expression_needs_no_values():
    assert translate_expression(cp.Constant(2) * 3)({}).item() == 6


@pytest.mark.parametrize("entry", [-800.0, -40.0, 0.0, 40.0, 800.0])
def test_logistic_far_out(entry):
    x = cp.Variable()
    function = translate_expression(cp.logistic(x))
    at = torch.tensor(entry, dtype=torch.float64)
    evaluated = [f(at).item() for f in (
        lambda v: function({x.id: v}),
        grad(lambda v: function({x.id: v})),
        hessian(lambda v: function({x.id: v})),
    )]  # fmt: skip
    sigmoid = 1 / (1 + np.exp(-entry)) if entry > 0 else np.exp(entry) / (1 + np.exp(entry))
    expected = [np.logaddexp(0, entry), sigmoid, sigmoid * (1 - sigmoid)]
    np.testing.assert_allclose(evaluated, expected, rtol=1e-12, atol=1e-16)


def test_relative_entropy_of_nothing_has_slope_zero():
    p, x = cp.Parameter(2, nonneg=True), cp.Variable(2)
    function = translate_expression(cp.sum(cp.rel_entr(p, x)))
    values = {p.id: torch.zeros(2).double(), x.id: torch.ones(2).double()}
    assert grad(lambda v: function({**values, x.id: v}))(values[x.id]).tolist() == [0, 0]


def test_functions_of_definite_matrices_are_nan_elsewhere():
    X = cp.Variable((2, 2))
    indefinite = {X.id: -torch.eye(2, dtype=torch.float64)}
    for expression in (cp.log_det(X), cp.tr_inv(X), cp.matrix_frac(np.ones(2), X)):
        assert translate_expression(expression)(indefinite).isnan()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda x: cp.ceil(x) + 1, "constraint 2 contains .*ceil.* has no translation"),
        (lambda x: cp.sum(cp.sign(x)), "constraint 2 contains .*sign.* has no translation"),
        (lambda x: cp.imag(1j * x), "constraint 2 contains .* complex"),
    ],
)
def test_no_translation_is_an_error_that_names_the_atom(make, match):
    with pytest.raises(SpecificationError, match=match):
        translate_expression(make(cp.Variable(2)), "constraint 2")
