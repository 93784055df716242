"""Weights learnt through the layer find poses that equal weights do not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares

EXAMPLE = "robust_pose"


@pytest.fixture(scope="module")
def experiment(example, picture, one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "OUTLIERS", torch.tensor([0.0, 0.4, 0.6]))
        patch.setattr(example, "TESTS", 32)
        patch.setattr(example, "TUNING", 32)
        patch.setattr(example, "BATCH", 16)
        patch.setattr(example, "RESTARTS", 1)
        found = example.run(picture, steps=50)
    return found


def scenes(example, n=4, rate=0.3, seed=0):
    return example.photograph(n, rate, torch.Generator().manual_seed(seed))


def double(scenes):
    values = {k: v.double() for k, v in vars(scenes).items() if v.is_floating_point()}
    return replace(scenes, **values)


# ------------------------------------------------------------------------------ problem and data


def test_cayleys_matrix_is_the_rotation_about_its_axis(example):
    g = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    R = example.rotation(g)
    torch.testing.assert_close(R @ R.mT, torch.eye(3).double().expand(5, 3, 3))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(5).double())
    torch.testing.assert_close((R @ g[:, :, None])[:, :, 0], g)
    trace = R.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(((trace - 1) / 2).acos(), 2 * g.norm(dim=1).atan())


def test_pose_is_exact_where_nothing_is_wrong(example, monkeypatch):
    monkeypatch.setattr(example, "NOISE", 0.0)
    clean = double(scenes(example, rate=0.0))
    for robust in (False, True):
        found = example.Pose(weighted=False, robust=robust, alpha=0.05).solve(clean)
        torch.testing.assert_close(found.variables[0], clean.g, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.variables[1], clean.t, rtol=0, atol=1e-3)


def test_least_squares_is_what_scipy_finds(example):
    given = double(scenes(example, rate=0.1))
    found = example.Pose(weighted=False, robust=False).solve(given)
    for i in range(len(given.g)):

        def misfit(pose, i=i):
            g, t = torch.as_tensor(pose).split(3)
            seen = example.project(given.point[i : i + 1], g[None], t[None])[0]
            return (seen - given.seen[i]).flatten().numpy()

        best = least_squares(misfit, np.r_[np.zeros(3), 0, 0, 5], xtol=1e-14, ftol=1e-14)
        pose = torch.cat([value[i] for value in found.variables])
        torch.testing.assert_close(pose, torch.as_tensor(best.x), rtol=0, atol=1e-5)
        assert float(found.value[i]) == pytest.approx(2 * best.cost, rel=1e-8)


def test_wrong_matches_are_elsewhere_and_others_near(example):
    given = scenes(example, n=64, rate=0.5)
    away = (given.seen - example.project(given.point, given.g, given.t)).norm(dim=2)
    assert float(given.wrong.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert float(away[~given.wrong].median()) < 0.01
    assert float(away[given.wrong].median()) > 0.1


# -------------------------------------------------------------------------------------- gradient


def test_gradient_agrees_with_a_finite_difference(example, monkeypatch):
    monkeypatch.setattr(example, "RESTARTS", 0)
    torch.manual_seed(0)
    model, given = example.Pose(weighted=True, robust=True).double(), double(scenes(example))

    def loss():
        return example.loss(*example.errors(model.solve(given), given))

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    generator = torch.Generator().manual_seed(1)
    ways = [torch.randn(p.shape, generator=generator).double() for p in parameters]
    expected = sum((g * w).sum() for g, w in zip(gradients, ways, strict=True))

    def loss_at(step):
        with torch.no_grad():
            for p, w in zip(parameters, ways, strict=True):
                p += step * w
            value = loss()
            for p, w in zip(parameters, ways, strict=True):
                p -= step * w
        return value

    slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-9)


# ------------------------------------------------------------------------------------ experiment


def test_learnt_weights_are_best_at_every_rate(example, experiment):
    results, _, _ = experiment
    middle = {name: result.angle.median(1).values for name, result in results.items()}
    for other in (example.LEAST_SQUARES, example.WELSCH, example.WEIGHTED):
        assert (middle[example.LEARNT] < middle[other]).all(), other
    assert middle[example.LEARNT][-1] < 0.8 * middle[example.WELSCH][-1]
    assert middle[example.LEAST_SQUARES][-1] > 10


def test_wrong_matches_and_large_spots_weigh_less(example, experiment):
    _, models, tests = experiment
    weights = models[example.LEARNT].weights(tests[1].clues).detach()
    wrong, size = tests[1].wrong, tests[1].clues[..., 2]
    assert weights[wrong].mean() < 0.5 * weights[~wrong].mean()
    assert weights[~wrong & (size > 0.5)].mean() < 0.5 * weights[~wrong & (size < -0.5)].mean()


def test_poses_are_verified_and_have_gradients(experiment):
    for result in experiment[0].values():
        assert result.optimal.float().mean() > 0.98
        assert result.regular.float().mean() > 0.95


def test_table_has_a_row_for_each_way(example, experiment):
    assert example.table_of(experiment[0]).row_count == 4


def test_picture_is_readable(experiment, picture):
    from matplotlib import image

    height, width, _ = image.imread(picture).shape
    assert height > 500
    assert width > 1000


def test_command_line_passes_its_options_on(example, monkeypatch):
    seen = []
    monkeypatch.setattr(example, "run", lambda *given: seen.append(given))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    example.main(["--output", "a.png", "--steps", "3", "--seed", "7"])
    assert seen == [(Path("a.png"), 3, 7)]
