"""A demonstrator's comfort is learnt through the layer, whose postures do the task exactly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

EXAMPLE = "inverse_kinematics"


@pytest.fixture(scope="module")
def experiment(example, picture, one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "TESTS", 150)
        patch.setattr(example, "BATCH", 48)
        found = example.run(picture, steps=90, plain_steps=1500)
    return found


@pytest.fixture(scope="module")
def tests(example):
    return example.load_scenes(seed=1)[1].select(torch.arange(8))


def arguments(example, tests):
    given = tests.target, tests.shelf, *example.hidden_comfort(tests.load)
    return [value.double() for value in given]


# ------------------------------------------------------------------------------ problem and data


def test_demonstrator_does_the_task(example, tests):
    at = example.points(tests.joint)
    torch.testing.assert_close(at[:, -1], tests.target, rtol=0, atol=1e-6)
    assert (at[:, 1:-1, 1] <= tests.shelf[:, None] + 1e-6).all()
    lower, upper = torch.as_tensor(example.LIMITS)
    assert ((tests.joint >= lower - 1e-6) & (tests.joint <= upper + 1e-6)).all()


def test_links_have_their_lengths(example, tests):
    links = example.points(tests.joint).diff(dim=1).norm(dim=2)
    lengths = torch.as_tensor(example.LENGTHS).float()
    torch.testing.assert_close(links, lengths.expand_as(links))


def test_posture_is_what_scipy_finds(example, tests):
    target, shelf, stiffness, rest = arguments(example, tests)
    (joint,) = example.inverse_kinematics()(target, shelf, stiffness, rest)

    def ends(q):
        return example.points(torch.as_tensor(q)[None])[0].numpy()

    for i in range(len(joint)):
        s, r, t, h = (v[i].numpy() for v in (stiffness, rest, target, shelf))
        best = minimize(
            lambda q, s=s, r=r: s @ (q - r) ** 2,
            joint[i].numpy() + 0.02,
            constraints=[
                {"type": "eq", "fun": lambda q, t=t: ends(q)[-1] - t},
                {"type": "ineq", "fun": lambda q, h=h: h - ends(q)[1:-1, 1]},
            ],
            bounds=np.transpose(example.LIMITS),
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 300},
        )
        torch.testing.assert_close(joint[i], torch.as_tensor(best.x), rtol=0, atol=1e-5)


def test_gradient_agrees_with_finite_differences(example, tests):
    target, shelf, stiffness, rest = arguments(example, tests)
    layer = example.inverse_kinematics()
    leaves = [stiffness.requires_grad_(), rest.requires_grad_()]
    (joint,) = layer(target, shelf, *leaves)
    pull = torch.randn(joint.shape, generator=torch.Generator().manual_seed(0)).double()
    gradients = torch.autograd.grad((pull * joint).sum(), leaves)
    for k in range(2):
        for column in range(example.JOINTS):
            move = torch.zeros(example.JOINTS).double()
            move[column] = 1e-5
            ends = []
            for sign in (1, -1):
                changed = [v.detach() + sign * move * (i == k) for i, v in enumerate(leaves)]
                ends.append((pull * layer(target, shelf, *changed)[0]).sum(1))
            slope = (ends[0] - ends[1]) / 2e-5
            torch.testing.assert_close(gradients[k][:, column], slope, rtol=1e-5, atol=1e-7)


def test_only_ratios_of_stiffness_matter(example, tests):
    target, shelf, stiffness, rest = arguments(example, tests)
    layer = example.inverse_kinematics()
    (one,), (other,) = (layer(target, shelf, scale * stiffness, rest) for scale in (1, 7))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


# ------------------------------------------------------------------------------------ experiment


def test_declared_answers_do_the_task_and_plain_ones_do_not(example, experiment):
    results, _, tests = experiment
    rows = {name: result.measures(tests) for name, result in results.items()}
    for name in (example.MOVED, example.DECLARED):
        assert rows[name]["hand, worst (mm)"] < 1e-3
        assert rows[name]["above shelf (%)"] == 0
        assert rows[name]["optimal (%)"] > 99
        assert rows[name]["regular (%)"] > 98
    assert rows[example.PLAIN]["hand, median (mm)"] > 5


def test_declared_network_imitates_best(example, experiment):
    results, _, tests = experiment
    error = {n: r.measures(tests)["joints (deg)"] for n, r in results.items()}
    assert error[example.DECLARED] < error[example.MOVED] < error[example.PLAIN]
    assert error[example.DECLARED] < 0.93 * error[example.PLAIN]


def test_hidden_stiffness_is_learnt_from_postures_alone(example, experiment):
    _, declared, tests = experiment
    with torch.no_grad():
        learnt = declared.parameters_of(tests)[2]
    hidden, _ = example.hidden_comfort(tests.load)
    wrong = (learnt - hidden).abs().mean()
    assert wrong < 0.5 * (1 - hidden).abs().mean()  # what all joints alike would be wrong by
    assert torch.corrcoef(torch.stack([learnt[:, 0], tests.load.float()]))[0, 1] > 0.7


def test_unsolved_elements_do_not_spoil_a_step(example, tests):
    torch.manual_seed(0)
    model = example.Declared()
    far = replace(tests, target=tests.target.index_fill(0, torch.tensor([2]), 5.0))
    joint = model(far)
    assert joint[2].isnan().all()
    (joint - far.joint).square().nanmean().backward()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()


def test_table_has_a_row_for_each_answer(example, experiment):
    results, _, tests = experiment
    assert example.table_of(results, tests).row_count == 3


def test_picture_is_readable(experiment, picture):
    from matplotlib import image

    height, width, _ = image.imread(picture).shape
    assert height > 500
    assert width > 1000


def test_command_line_passes_its_options_on(example, monkeypatch):
    seen = []
    monkeypatch.setattr(example, "run", lambda *given: seen.append(given))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    example.main(["--output", "a.png", "--steps", "3", "--plain-steps", "5", "--seed", "7"])
    assert seen == [(Path("a.png"), 3, 5, 7)]
