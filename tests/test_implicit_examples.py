"""The experiments of "Implicit Deep Learning", on a reduced number of trials."""

from pathlib import Path

import pytest
import torch
from example_module import example_module

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def regression():
    with example_module("implicit_regression") as module:
        yield module


@pytest.fixture(scope="module")
def features():
    with example_module("implicit_features") as module:
        yield module


@pytest.fixture(scope="module")
def digits():
    with example_module("implicit_digits") as module:
        yield module


def is_readable(picture: Path) -> bool:
    from matplotlib import image

    height, width, _ = image.imread(picture).shape
    return height > 400 and width > 1000


# ----------------------------------------------------------------------------------- Section 7.1


@pytest.fixture(scope="module")
def trials(regression, tmp_path_factory):
    picture = tmp_path_factory.mktemp("regression") / "picture.png"
    found = regression.run(picture, trials=8)
    assert is_readable(picture)
    return found


def test_inputs_have_a_singular_covariance_and_weights_are_sparse(regression):
    generator = torch.Generator().manual_seed(0)
    u = regression._inputs(2000, generator)
    values = torch.linalg.eigvalsh(u.T @ u / len(u))
    assert values[0] < 1e-12 * values[-1]
    weights = regression._sparse((200, 200), generator)
    assert (weights != 0).double().mean() == pytest.approx(0.3, abs=0.02)
    assert weights.abs().max() <= 0.5


def test_descent_comes_as_near_to_rmsprop_as_in_the_paper(trials):
    training, test = trials.gaps().mean(0)
    assert training <= 1.5e-2
    assert test <= 5e-3


def test_one_sweep_is_already_close(trials):
    gap = (trials.sweeps[:, 1] - trials.sweeps[:, -1]).mean(0)
    assert (gap < 5e-3).all()
    assert (trials.sweeps[:, 1] < 0.5 * trials.sweeps[:, 0]).all()


def test_five_sweeps_about_tie_ridge_regression(trials):
    gap = (trials.sweeps[:, -1] - trials.ridge).mean(0)
    assert (gap.abs() < 5e-3).all()


def test_objective_of_no_trial_rises(trials):
    change = trials.objectives.diff(dim=1)
    assert (change <= 1e-9 * trials.objectives[:, :-1]).all()


# ----------------------------------------------------------------------------------- Section 7.2


@pytest.fixture(scope="module")
def recovered(features, tmp_path_factory):
    picture = tmp_path_factory.mktemp("features") / "picture.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "TRUE_COLUMNS", (5,))
        found = features.run(picture, seeds=2)
    assert is_readable(picture)
    return found[5]


def test_generated_models_are_column_sparse(features):
    data = features.draw(0, 5)
    assert int(data.used.sum()) == 5
    assert torch.equal(data.B.norm(dim=0) > 0, data.used)
    assert data.y.shape == (400, 1)


def test_column_support_of_b_is_recovered_exactly(recovered):
    for found in recovered:
        assert found.auc >= 0.99
        assert found.false_columns == 0
        assert found.missed_columns == 0
        assert not found.history.rises


def test_ten_columns_are_told_from_the_others(features, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "TRUE_COLUMNS", (10,))
    found = features.run(tmp_path / "picture.png", seeds=2, sweeps=60)[10]
    assert sum(each.auc for each in found) / len(found) >= 0.95


# ---------------------------------------------------------------------------------------- digits


def test_implicit_models_read_digits_with_and_without_backpropagation(digits, tmp_path):
    picture = tmp_path / "picture.png"
    scores = digits.run(picture, sweeps=5, epochs=10)
    assert is_readable(picture)
    assert scores[digits.DESCENT].test > 0.92
    assert scores[digits.TUNED].test > 0.93
    for name in (digits.BACKPROPAGATION, digits.FEEDFORWARD):
        assert scores[name].test > 0.9
    counts = [found.parameters for found in scores.values()]
    assert max(counts) < 1.05 * min(counts)


# ---------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("regression", ["--trials", "3"], (Path("a.png"), 3)),
        ("features", ["--seeds", "3", "--sweeps", "7", "--signed"], (Path("a.png"), 3, 7, True)),
        ("digits", ["--seed", "3", "--sweeps", "7", "--epochs", "2"], (Path("a.png"), 3, 7, 2)),
    ],
)
def test_command_line_passes_its_options_on(name, given, expected, request, monkeypatch):
    example = request.getfixturevalue(name)
    seen = []
    monkeypatch.setattr(example, "run", lambda *arguments: seen.append(arguments))
    example.main(["--output", "a.png", *given])
    assert seen == [expected]
