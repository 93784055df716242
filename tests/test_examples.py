"""The examples reach what they promise."""

import math

import pytest
import torch

from declarative_cvx.backends import BACKENDS, installed

EXAMPLE = "elastic_net"


@pytest.fixture(scope="module")
def results(example, picture):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "TIMED_RUNS", 1)
        patch.setattr(example, "LOG_LAM1", torch.linspace(-2.5, -0.5, 5, dtype=torch.float64))
        patch.setattr(example, "LOG_LAM2", torch.linspace(-3.0, 1.0, 5, dtype=torch.float64))
        patch.setattr(example, "GRID", 5)
        result = example.run(picture, steps=40)
        best_of_grid = result.grid.best  # while the axes are patched
        return result, best_of_grid


@pytest.fixture(scope="module")
def report(results):
    return results[0]


def test_gradient_descent_is_no_worse_than_the_grid(report):
    assert report.descent.errors.min() <= report.grid.errors.min() + 1e-3


def test_gradient_descent_goes_down_from_its_start(report):
    assert report.descent.errors[0] > 0.7
    assert report.descent.errors.min() < 0.52


def test_best_points_have_the_errors_reported(example, results):
    report, best_of_grid = results
    folds, _ = example.load(seed=0)
    layer = example.elastic_net(folds.x.shape[2])
    for found, best in ((report.descent, report.descent.best), (report.grid, best_of_grid)):
        errors = folds.errors(example.fit(layer, folds, best))
        torch.testing.assert_close(errors.mean(), found.errors.min(), rtol=1e-9, atol=0)


def test_coefficients_agree_with_scikit_learn(report):
    assert report.sklearn_difference < 1e-6


def test_prediction_beats_the_mean_on_unseen_patients(report):
    assert all(error < 0.7 for error in report.test_errors)


def test_gradient_agrees_with_finite_differences(example):
    folds, _ = example.load(seed=0)
    layer = example.elastic_net(folds.x.shape[2])
    at = torch.tensor([-1.2, -0.5], dtype=torch.float64, requires_grad=True)

    def error(point):
        return folds.errors(example.fit(layer, folds, point)).mean()

    (gradient,) = torch.autograd.grad(error(at), at)
    step = 1e-5
    for i in range(2):
        move = torch.zeros(2, dtype=torch.float64)
        move[i] = step
        with torch.no_grad():
            slope = (error(at + move) - error(at - move)) / (2 * step)
        torch.testing.assert_close(gradient[i], slope, rtol=1e-6, atol=1e-9)


def test_compressed_data_have_the_same_optimum(example):
    folds, _ = example.load(seed=0)
    R, z = folds.compressed()
    w = torch.randn(len(R), R.shape[2], dtype=torch.float64)

    def loss_gradient(matrix, target):
        residual = (matrix @ w[:, :, None])[:, :, 0] - target
        return (matrix.mT @ residual[:, :, None])[:, :, 0]

    rows = folds.x.shape[1]
    torch.testing.assert_close(loss_gradient(R, z), loss_gradient(folds.x, folds.y) / rows)


def test_every_solver_has_a_row_and_agrees(example, report):
    assert {run.backend for run in report.runs} == set(BACKENDS)
    reference = report.runs[0]
    for run in report.runs:
        if run.backend not in installed():
            assert "pip install" in run.refused
            continue
        assert not run.refused
        assert run.statuses == "5 OPTIMAL"
        assert example.difference(run.w, reference.w) < 1e-6
        assert example.difference(run.gradient, reference.gradient) < 1e-4


def test_a_solver_that_cannot_is_a_row_that_says_why(example, monkeypatch):
    folds, _ = example.load(seed=0)
    run = example.run_backend("Clarabell", folds, torch.zeros(2, dtype=torch.float64))
    assert "Clarabel" in run.refused
    assert run.residual == math.inf
    assert example.table_of([run]).row_count == 1


def test_picture_is_readable(report, picture):
    from matplotlib import image

    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    height, width, _ = image.imread(picture).shape
    assert height > 500
    assert width > 500


def test_command_line_passes_its_options_on(example, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(example, "run", lambda *given: seen.append(given))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    example.main(["--output", str(tmp_path / "a.png"), "--steps", "3", "--seed", "7"])
    assert seen == [(tmp_path / "a.png", 3, 7)]
