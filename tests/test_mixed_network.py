"""The network of three declared layers trains end to end and reads what a plain one cannot."""

import itertools
from pathlib import Path

import cvxpy as cp
import pytest
import torch

EXAMPLE = "mixed_network"

PLAIN, PROJECTED, POOLED, FULL = (
    "mean, softmax",
    "+ projection",
    "+ robust pooling",
    "+ all digits differ",
)


@pytest.fixture(scope="module")
def scores(example, picture, one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "TEST_CODES", 60)
        (found,) = example.run(picture, steps=60)
    return found


@pytest.fixture
def codes(example):
    _, test = example.load(seed=0)
    return example.photograph(test, 8, 2, torch.Generator().manual_seed(0))


def reader(example, name=FULL):
    torch.manual_seed(0)
    return example.Reader(*example.VARIANTS[name])


# ---------------------------------------------------------------------------------------- data


def test_digits_of_a_code_differ_and_so_many_photographs_are_spoiled(codes):
    assert all(len(set(code)) == len(code) for code in codes.digits.tolist())
    assert (codes.spoiled.sum(2) == 2).all()


def test_unspoiled_photographs_show_the_digit(example):
    training, _ = example.load(seed=0)
    codes = example.photograph(training, 200, 0, torch.Generator().manual_seed(0))
    means = torch.stack([each.mean(0) for each in training.images.split(training.count.tolist())])
    shape = codes.frames.mean(2).flatten(2)
    near = torch.nn.functional.cosine_similarity(shape[:, :, None], means.flatten(1), dim=3)
    assert (near.argmax(2) == codes.digits).float().mean() > 0.85


def test_test_images_are_not_training_images(example):
    training, test = example.load(seed=0)
    assert len(training.images) + len(test.images) == 1797
    both = torch.cat([training.images, test.images])
    assert len(both.unique(dim=0)) == 1797


# ------------------------------------------------------------------------------------- network


def test_gradient_reaches_every_parameter(example, codes):
    for name in example.VARIANTS:
        model = reader(example, name)
        example.loss(model(codes.frames), codes.digits).backward()
        for key, parameter in model.named_parameters():
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().max() > 0, (name, key)


def test_gradient_agrees_with_a_finite_difference(example, codes):
    model = reader(example).double()
    frames = codes.frames[:2].double()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(example.loss(model(frames), codes.digits[:2]), parameters)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    def loss_at(step):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
            value = example.loss(model(frames), codes.digits[:2])
            for p, d in zip(parameters, directions, strict=True):
                p -= step * d
        return value

    step = 1e-6
    slope = (loss_at(step) - loss_at(-step)) / (2 * step)
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-7)


def test_projection_puts_features_on_the_sphere(example, codes):
    model = reader(example)
    pooled = []
    model.pool.register_forward_pre_hook(lambda _, given: pooled.append(given[0]))
    model(codes.frames)
    norms = pooled[0].norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, example.RADIUS))


def test_pooling_ignores_a_far_frame_and_the_mean_does_not(example):
    generator = torch.Generator().manual_seed(0)
    center = torch.nn.functional.normalize(torch.randn(1, 1, 1, 32, generator=generator), dim=3)
    frames = example.RADIUS * center.repeat(1, 1, 5, 1)
    frames[:, :, 3:] = -frames[:, :, 3:]
    pool = example._welsch()
    near = (pool(frames) - frames[:, :, 0]).norm(dim=-1)
    assert near.max() < 0.01 * example.RADIUS
    assert (example.Mean()(frames) - frames[:, :, 0]).norm(dim=-1).min() > 0.5 * example.RADIUS


def test_probabilities_use_no_digit_twice_and_are_what_cvxpy_finds(example):
    scores = 4 * torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0)).double()
    found = example.Distinct()(scores)
    assert found.min() > -1e-9
    torch.testing.assert_close(found.sum(2), torch.ones(3, 6).double())
    assert found.sum(1).max() < 1 + 1e-9
    for p, s in zip(found, scores, strict=True):
        P = cp.Variable((6, 10))
        distance = cp.sum_squares(P - s.numpy() / example.SOFTNESS)
        rows, columns = cp.sum(P, axis=1) == 1, cp.sum(P, axis=0) <= 1
        cp.Problem(cp.Minimize(distance), [P >= 0, rows, columns]).solve(cp.CLARABEL)
        torch.testing.assert_close(p, torch.as_tensor(P.value), rtol=0, atol=1e-5)


def test_best_match_is_the_likeliest_of_all_codes(example):
    p = torch.rand(4, 3, 4, generator=torch.Generator().manual_seed(0)).softmax(2)
    for each, found in zip(p, example.best_match(p), strict=True):
        codes = itertools.permutations(range(4), 3)
        best = max(codes, key=lambda code: each[range(3), code].log().sum())
        assert tuple(found.tolist()) == best


# ------------------------------------------------------------------------------------ experiment


def test_all_networks_read_clean_photographs(scores):
    for name, found in scores.items():
        assert found.digits[0] > 0.9, name


def test_declared_layers_read_spoiled_photographs_that_the_plain_network_cannot(scores):
    worst = {name: found.digits[-1] for name, found in scores.items()}
    assert worst[PROJECTED] > worst[PLAIN] + 0.1
    assert worst[POOLED] > worst[PROJECTED] + 0.05
    assert scores[FULL].codes[-1] > scores[PLAIN].codes[-1] + 0.4


def test_robust_pooling_loses_little_to_two_spoiled_photographs(scores):
    for name in (POOLED, FULL):
        assert scores[name].digits[2] > scores[name].digits[0] - 0.02
    assert scores[PLAIN].digits[2] < scores[PLAIN].digits[0] - 0.05


def test_table_has_a_row_for_each_network_and_the_check(example, scores):
    assert example.table_of([scores]).row_count == len(example.VARIANTS) + 1
    assert example.table_of([scores, scores]).row_count == len(example.VARIANTS) + 1


def test_picture_is_readable(scores, picture):
    from matplotlib import image

    height, width, _ = image.imread(picture).shape
    assert height > 500
    assert width > 1000


def test_command_line_passes_its_options_on(example, monkeypatch):
    seen = []
    monkeypatch.setattr(example, "run", lambda *given: seen.append(given))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    example.main(["--output", "a.png", "--steps", "3", "--seeds", "7"])
    assert seen == [(Path("a.png"), 3, 7)]
