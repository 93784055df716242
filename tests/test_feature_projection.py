"""The experiment with projected features measures, trains and shows what it says."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

metrics = pytest.importorskip("sklearn.metrics")

EXAMPLE = "feature_projection"

RADII = {1: 10.0, 2: 3.0, math.inf: 1.5}


@pytest.fixture(scope="module")
def report(example, picture, one_thread):
    return example.run(picture, example.digits(), example.Settings(seeds=2, epochs=6))


# ------------------------------------------------------------------------------------- measures


def test_mean_average_precision_by_hand(example):
    # Class 0 ranks right, wrong, right: precisions 1, then 2/3. Class 1 ranks its image last.
    values = torch.tensor([[3.0, 2.0], [2.0, 1.0], [1.0, 3.0]])
    found = example.mean_average_precision(values, torch.tensor([0, 1, 0]))
    assert found == pytest.approx(((1 + 2 / 3) / 2 + 1 / 3) / 2)


def test_average_precision_is_the_area_under_the_envelope_of_scikit_learns_curve(example):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, 5, generator=generator)
    labels = torch.randint(5, (200,), generator=generator)
    areas = []
    for label in range(5):
        precision, recall, _ = metrics.precision_recall_curve(labels == label, values[:, label])
        best = np.maximum.accumulate(precision)  # recall falls along the curve
        areas.append(-np.sum(np.diff(recall) * best[:-1]))
    assert example.mean_average_precision(values, labels) == pytest.approx(np.mean(areas))


def test_classes_without_an_image_do_not_count(example):
    values = torch.tensor([[3.0, 2.0, 9.0], [2.0, 4.0, 9.0]])
    assert example.mean_average_precision(values, torch.tensor([0, 1])) == 1.0


def test_calibration_error_by_hand(example):
    # Four images at confidence 0.9, three of them right, and one at 0.6, wrong.
    p = torch.tensor([[0.9, 0.1]] * 4 + [[0.6, 0.4]], dtype=torch.float64)
    found = example.calibration_error(p, torch.tensor([0, 0, 0, 1, 1]))
    assert found == pytest.approx((4 * (0.9 - 0.75) + 0.6) / 5)


def test_calibrated_predictions_have_a_small_error_and_overconfident_ones_a_large_one(example):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(20_000, dtype=torch.float64, generator=generator)
    labels = (torch.rand(20_000, dtype=torch.float64, generator=generator) > p).long()
    calibrated = torch.stack([p, 1 - p], 1)
    assert example.calibration_error(calibrated, labels) < 0.02
    assert example.calibration_error((20 * calibrated).softmax(1), labels) > 0.1


# ------------------------------------------------------------------------------------- networks


def test_radius_is_two_thirds_of_the_median_norm_of_normalised_features(example):
    features = 3 + 2 * torch.randn(101, 8, generator=torch.Generator().manual_seed(0))
    x = features.double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    for p, radius in example.paper_radii(features).items():
        norms = np.linalg.norm(x, ord=p, axis=1)
        assert radius == pytest.approx(2 / 3 * np.median(norms), rel=1e-4)


def small(example, name):
    torch.manual_seed(0)
    return example.ResNet(example.digits(), example.Settings(width=4), name, RADII)


def projected(example, name):
    """What reaches the last layer, and the norm of what would without the projection."""
    model = small(example, name)
    images = example.digits().pixels[:200]
    with torch.no_grad():
        features = model.features(images)
        return model.project(features), torch.nn.functional.batch_norm(
            features, None, None, training=True
        )


@pytest.mark.parametrize("p", RADII)
def test_norms_hold(example, p):
    kind = "Linf" if p == math.inf else f"L{p}"
    sphere, before = projected(example, f"{kind} sphere")
    ball, _ = projected(example, f"{kind} ball")
    torch.testing.assert_close(
        sphere.norm(p, dim=1), torch.full((200,), RADII[p]), rtol=1e-5, atol=0
    )
    expected = before.norm(p, dim=1).clamp_max(RADII[p])
    torch.testing.assert_close(ball.norm(p, dim=1), expected, rtol=1e-4, atol=0)


def test_every_network_gets_a_gradient_in_every_parameter(example):
    images = example.digits()
    for name in example.VARIANTS:
        model = small(example, name)
        loss = torch.nn.functional.cross_entropy(model(images.pixels[:32]), images.labels[:32])
        loss.backward()
        for parameter in model.parameters():
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().max() > 0, name


def test_projections_add_no_parameters(example):
    counts = {sum(p.numel() for p in small(example, n).parameters()) for n in example.VARIANTS}
    assert len(counts) == 1


# ------------------------------------------------------------------------------------ experiment


def test_every_network_learns(example, report):
    for name in example.VARIANTS:
        top1, by_score, by_probability, error = report.measures(name).T
        assert top1.min() > 65, name  # 10 by chance
        assert by_score.min() > 65, name
        assert by_probability.min() > 75, name
        assert error.max() < 25, name


def test_scores_rank_images_better_with_projection_and_best_with_l2(example, report):
    by_score = {name: report.measures(name)[:, 1].mean() for name in example.VARIANTS}
    for kind in ("sphere", "ball"):
        assert by_score[f"L2 {kind}"] > by_score[example.PLAIN] + 1.5
        assert by_score[f"L1 {kind}"] > by_score[example.PLAIN]
        assert by_score[f"L2 {kind}"] > by_score[f"Linf {kind}"]


def test_same_seed_gives_the_same_report(example, monkeypatch):
    variants = dict.fromkeys([example.PLAIN, "L2 ball"])
    monkeypatch.setattr(example, "VARIANTS", {n: example.VARIANTS[n] for n in variants})
    settings = example.Settings(seeds=1, epochs=1, width=4)
    first, second = (example.compare(example.digits(), settings) for _ in range(2))
    for name in variants:
        torch.testing.assert_close(first.scores[name], second.scores[name], rtol=0, atol=0)


def test_table_has_a_row_for_each_network(example, report):
    assert example.table_of(report).row_count == len(example.VARIANTS) == len(example.PAPER)


def test_picture_is_readable(report, picture):
    from matplotlib import image

    height, width, _ = image.imread(picture).shape
    assert height > 500
    assert width > 1000


# ---------------------------------------------------------------------------- images in folders


def save(path, value):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((9, 12), value, np.uint8)).save(path)


def test_a_folder_a_class(example, tmp_path):
    for label, name in enumerate(("cat", "dog")):
        for number in range(3):
            save(tmp_path / name / f"{number}.png", 100 * label + 5 * number)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    images = example.folder(tmp_path, side=8)
    assert images.pixels.shape == (6, 3, 8, 8)
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.classes == 2
    assert (images.pixels[:, 0, 0, 0].diff() > 0).all()  # in the order of their brightness
    torch.testing.assert_close(images.pixels.mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
    training, test = images.rows(4, seed=0)
    assert sorted(torch.cat([training, test]).tolist()) == list(range(6))


def test_train_and_val_folders_keep_their_split(example, tmp_path):
    for part, numbers in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            for number in range(numbers):
                save(tmp_path / part / name / f"{number}.png", 50 * number)
    training, test = example.folder(tmp_path, side=8).rows(1, seed=0)
    assert training.tolist() == list(range(6))
    assert test.tolist() == list(range(6, 10))


def test_a_folder_without_classes_is_refused(example, tmp_path):
    save(tmp_path / "only" / "0.png", 1)
    with pytest.raises(ValueError, match="no two folders"):
        example.folder(tmp_path, side=8)


def test_a_split_without_test_images_is_refused(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--training", "1797"])
    assert "1797 cannot be for training" in capsys.readouterr().err


def test_command_line_passes_its_options_on(example, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(example, "run", lambda *given: seen.append(given))
    folder = example.Images(torch.zeros(700, 3, 8, 8), torch.zeros(700, dtype=torch.int64))
    sides = []
    monkeypatch.setattr(example, "folder", lambda _, side: sides.append(side) or folder)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    example.main(["--seeds", "7", "--output", "a.png"])
    example.main(["--images", str(tmp_path), "--side", "16", "--width", "64"])
    (output, images, settings), (_, given, other) = seen
    assert given is folder
    assert (output, len(images.labels)) == (Path("a.png"), 1797)
    assert settings == replace(example.Settings(), seeds=7)
    assert sides == [16]
    assert other == replace(example.Settings(), width=64, noise=0.0)
