"""Implicit models as scikit-learn estimators."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from declarative_cvx.errors import ParameterError, SpecificationError

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.datasets import make_friedman1, make_moons
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as LinearRidge
from sklearn.utils.estimator_checks import parametrize_with_checks

from declarative_cvx.nonconvex.implicit.estimators import ImplicitClassifier, ImplicitRegressor
from declarative_cvx.nonconvex.implicit.training.blocks import BlockMethod
from declarative_cvx.nonconvex.implicit.training.penalty_terms import Ridge, RowBall


@parametrize_with_checks(
    [
        ImplicitRegressor(5, max_sweeps=4, random_state=0),
        ImplicitClassifier(5, max_sweeps=4, random_state=0),
    ]
)
@pytest.mark.filterwarnings("ignore:.*:sklearn.exceptions.SkipTestWarning")
def test_scikit_learn_takes_it(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def curved():
    X, y = make_friedman1(400, noise=0.3, random_state=0)
    return X, 5 * y + 100


@pytest.fixture(scope="module")
def moons():
    return make_moons(300, noise=0.15, random_state=0)


@pytest.fixture(scope="module")
def regressor(curved):
    return ImplicitRegressor(12, lam=10.0, max_sweeps=6, random_state=0).fit(*curved)


def test_regression_beats_a_linear_model_on_curved_data(regressor, curved):
    X, y = make_friedman1(400, noise=0.3, random_state=1)
    linear = LinearRidge().fit(*curved)
    assert regressor.score(X, 5 * y + 100) > linear.score(X, 5 * y + 100) + 0.01


def test_classification_beats_a_linear_model_on_moons(moons):
    X, y = make_moons(300, noise=0.15, random_state=1)
    found = ImplicitClassifier(15, ridge=0.004, max_sweeps=15, random_state=0).fit(*moons)
    assert found.score(X, y) > LogisticRegression().fit(*moons).score(X, y) + 0.02
    assert found.score(*moons) > 0.9
    np.testing.assert_allclose(found.predict_proba(X).sum(1), 1)


def test_history_shows_that_no_block_raised_the_objective(regressor):
    history = regressor.history_
    assert not history.rises
    assert len(history.sweeps) == regressor.n_iter_
    assert (np.diff(history.objectives) <= 1e-9 * history.objectives[0]).all()


def test_model_predicts_what_the_estimator_does(regressor, curved):
    X, _ = curved
    with torch.no_grad():
        y = regressor.model_(torch.as_tensor(X))[:, 0]
    np.testing.assert_allclose(y.numpy(), regressor.predict(X), rtol=1e-9)
    assert float(regressor.weights_.A.abs().sum(1).max()) <= 0.95 + 1e-12


def test_backpropagation_goes_on_where_descent_stopped_and_back(regressor, curved):
    X, y = (torch.as_tensor(value) for value in curved)
    model = regressor.model_
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss():
        return (model(X)[:, 0] - y).square().mean()

    before = loss().item()
    for _ in range(10):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    after = loss().item()
    assert after < before
    tuned = clone(regressor).fit(*curved).load_model(model)
    error = np.square(tuned.predict(curved[0]) - curved[1]).mean()
    assert error == pytest.approx(after, rel=1e-9)
    tuned.partial_fit(curved[0][:50], curved[1][:50])


def test_a_model_of_another_size_is_not_loaded(regressor, moons):
    other = ImplicitClassifier(5, max_sweeps=1, random_state=0).fit(*moons)
    with pytest.raises(ParameterError, match="in_features"):
        other.load_model(regressor.model_)


def test_same_random_state_gives_the_same_model(curved):
    X, y = curved[0][:100], curved[1][:100]
    first, second, third = (
        ImplicitRegressor(6, max_sweeps=2, random_state=seed).fit(X, y).predict(X)
        for seed in (3, 3, 4)
    )
    assert (first == second).all()
    assert not np.allclose(first, third, rtol=1e-6)


def test_batches_remember_what_earlier_ones_said(curved):
    X, y = curved
    whole = ImplicitRegressor(10, max_sweeps=5, random_state=0).fit(X, y).score(X, y)
    batches, forgetful = (
        ImplicitRegressor(10, batch_sweeps=2, memory=memory, random_state=0)
        for memory in (1.0, 0.0)
    )
    for estimator in (batches, forgetful):
        for start in range(0, 400, 40):
            part = slice(start, start + 40)
            estimator.partial_fit(X[part], y[part])
    assert batches.score(X, y) > whole - 0.05
    assert batches.score(X, y) > forgetful.score(X, y)
    assert batches.n_iter_ <= 20


def test_labels_that_were_not_announced_are_refused(moons):
    X, y = moons
    with pytest.raises(ParameterError, match="classes"):
        ImplicitClassifier(5).partial_fit(X, y)
    estimator = ImplicitClassifier(5, random_state=0).partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ParameterError, match="Label 2"):
        estimator.partial_fit(X, y + 1)


def test_early_stopping_keeps_the_best_weights(curved):
    X, y = curved
    found = ImplicitRegressor(
        5, early_stopping=True, n_iter_no_change=2, max_sweeps=10, tol=0.0, random_state=0
    ).fit(X, y)
    assert found.history_.stopped in ("callback", "sweeps")
    assert found.n_iter_ <= 10
    with pytest.raises(SpecificationError, match="validation_fraction"):
        ImplicitRegressor(early_stopping=True, validation_fraction=1.5).fit(X, y)


def test_standardising_changes_nothing_but_the_scale_of_the_problem(curved):
    X, y = curved[0][:100], curved[1][:100]
    mean, scale = X.mean(0), X.std(0)
    first = ImplicitRegressor(6, max_sweeps=3, random_state=0).fit(X, y)
    second = ImplicitRegressor(6, max_sweeps=3, standardise=False, random_state=0).fit(
        (X - mean) / scale, (y - y.mean()) / y.std()
    )
    expected = second.predict((X - mean) / scale) * y.std() + y.mean()
    np.testing.assert_allclose(first.predict(X), expected, rtol=1e-6)


def test_progress_is_shown(curved, capsys):
    ImplicitRegressor(3, max_sweeps=2, progress=True, random_state=0).fit(*curved)
    assert "block coordinate descent" in capsys.readouterr().err


def test_penalties_and_methods_are_passed_on(curved):
    X, y = curved[0][:100], curved[1][:100]
    estimator = ImplicitRegressor(
        5,
        activation="tanh",
        penalty=(RowBall(0.3), Ridge(1.0)),
        method=BlockMethod(weight_update="gradient", gradient_steps=7),
        max_sweeps=2,
        random_state=0,
    ).fit(X, y)
    assert estimator.weights_.activation.name == "tanh"
    assert float(estimator.weights_.A.abs().sum(1).max()) <= 0.3 + 1e-12
    steps = {block.iterations for block in estimator.history_.blocks if block.name in ("AB", "CD")}
    assert steps == {7}


def test_the_library_does_without_scikit_learn():
    program = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import declarative_cvx.nonconvex.implicit.training.descent\n"
        "from declarative_cvx.errors import MissingBackendError\n"
        "try:\n"
        "    import declarative_cvx.nonconvex.implicit.estimators\n"
        "except MissingBackendError as error:\n"
        "    assert 'pip install scikit-learn' in str(error)\n"
        "else:\n"
        "    raise SystemExit(1)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
