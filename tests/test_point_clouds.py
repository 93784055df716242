"""The example on point clouds: what it samples, what it trains and the trend that it shows."""

import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
tqdm = pytest.importorskip("tqdm").tqdm

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TETRAHEDRON = "OFF\n4 4 6\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 2 1\n3 0 1 3\n3 0 3 2\n3 1 2 3\n"
PYRAMID = (
    "OFF5 5 8\n# a comment\n-1 -1 0\n1 -1 0\n1 1 0\n-1 1 0\n\n0 0 1\n"
    "4 3 2 1 0\n3 0 1 4 255 0 0\n3 1 2 4\n3 2 3 4\n3 3 0 4\n"
)


@pytest.fixture(scope="module")
def parts():
    """The modules of the example, which are next to it and not installed."""
    names = ["solids", "modelnet", "clouds", "pointnet", "training"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        modules = {name: importlib.import_module(f"point_clouds.{name}") for name in names}
        yield SimpleNamespace(program=importlib.import_module("point_cloud_outliers"), **modules)
    for name in [name for name in sys.modules if name.startswith("point_cloud")]:
        del sys.modules[name]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------- solids


def area_vectors(triangles):
    a, b, c = triangles.double().unbind(-2)
    return torch.linalg.cross(b - a, c - a) / 2


def volume(triangles):
    return (area_vectors(triangles) * triangles.double()[..., 0, :]).sum((-2, -1)) / 3


def test_there_are_at_least_ten_solids_with_closed_surfaces(parts):
    assert len(parts.solids.SOLIDS) >= 10
    for outline, sides in parts.solids.SOLIDS.values():
        triangles = parts.solids.swept(outline, sides)
        torch.testing.assert_close(
            area_vectors(triangles).sum(0), torch.zeros(3).double(), rtol=0, atol=1e-5
        )
        assert volume(triangles) > 0.1


def test_swept_surfaces_have_the_area_and_volume_of_their_solids(parts):
    def measured(name):
        triangles = parts.solids.swept(*parts.solids.SOLIDS[name])
        return area_vectors(triangles).norm(dim=1).sum().item(), volume(triangles).item()

    # The base of the box is a square of diagonal 2; its height is 2.
    assert measured("box") == pytest.approx((2 * 2 + 4 * math.sqrt(2) * 2, 4), rel=1e-6)
    assert measured("octahedron") == pytest.approx((4 * math.sqrt(3), 4 / 3), rel=1e-6)
    sphere, cylinder = (4 * math.pi, 4 / 3 * math.pi), (6 * math.pi, 2 * math.pi)
    torus = 4 * math.pi**2 * 0.7 * 0.3, 2 * math.pi**2 * 0.7 * 0.3**2
    for name, exact in {"ellipsoid": sphere, "cylinder": cylinder, "torus": torus}.items():
        assert measured(name) == pytest.approx(exact, rel=0.06)  # polygons in place of circles


def test_poses_stretch_a_solid_and_tilt_it_a_little(parts):
    triangles = parts.solids.swept(*parts.solids.SOLIDS["cylinder"])
    copies = parts.solids.posed(triangles, 200, generator())
    low, high = parts.solids.STRETCH
    ratio = volume(copies) / volume(triangles)
    assert (ratio > low**3).all()
    assert (ratio < high**3).all()
    assert ratio.std() > 0.1
    cap = area_vectors(copies)[:, -1]  # of the upper end; perpendicular to the axis
    angle = (cap[:, 2] / cap.norm(dim=1)).clamp(max=1).acos()
    assert angle.max() <= parts.solids.TILT + 1e-3
    assert angle.max() > 0.8 * parts.solids.TILT


# --------------------------------------------------------------------------------------- clouds


def test_samples_are_uniform_on_the_surface(parts):
    triangles = parts.solids.swept(*parts.solids.SOLIDS["ellipsoid"])[None]
    points = parts.clouds.on_surface(triangles, 40_000, generator())[0]
    assert points.norm(dim=1).min() > math.cos(math.pi / parts.solids.ROUND) ** 2 - 1e-6
    # On a sphere each coordinate is uniform between -1 and 1 (Archimedes).
    even = torch.linspace(-1, 1, 40_000)
    assert (points.sort(0).values - even[:, None]).abs().max() < 0.03


def test_samples_fill_both_halves_of_a_square_evenly(parts):
    square = torch.tensor([[[0, 0, 0], [1, 0, 0], [1, 1, 0]], [[0, 0, 0], [1, 1, 0], [0, 1, 0]]])
    x, y, z = parts.clouds.on_surface(square[None].float(), 40_000, generator())[0].unbind(-1)
    counts = torch.histogramdd(torch.stack([x, y], -1), bins=[4, 4], range=[0.0, 1, 0, 1]).hist
    assert not z.any()
    assert ((counts - 2500).abs() < 5 * math.sqrt(2500)).all()


def test_normalised_clouds_are_centred_and_touch_the_unit_sphere(parts):
    points = 7 * torch.randn(5, 50, 3, generator=generator()) + 3
    found = parts.clouds.normalised(points)
    torch.testing.assert_close(found.mean(1), torch.zeros(5, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=-1).amax(1), torch.ones(5))


@pytest.mark.parametrize(("percent", "moved"), [(0, 0), (1, 2), (50, 100), (90, 180)])
def test_that_share_of_the_points_become_outliers(parts, percent, moved):
    points = torch.full((30, 200, 3), 2.0)
    found = parts.clouds.with_outliers(points, percent, generator())
    assert ((found != 2).any(-1).sum(1) == moved).all()
    assert (points == 2).all()
    again = parts.clouds.with_outliers(points, percent, generator())
    assert torch.equal(found, again)


def test_outliers_are_uniform_in_the_unit_ball(parts):
    found = parts.clouds.with_outliers(torch.zeros(100, 400, 3), 100, generator()).reshape(-1, 3)
    radius = found.norm(dim=1)
    even = torch.linspace(0, 1, len(found))
    assert (radius.pow(3).sort().values - even).abs().max() < 0.02  # the volume within
    cosine = found[:, 2] / radius
    assert (cosine.sort().values - (2 * even - 1)).abs().max() < 0.03


def test_generated_clouds_are_labelled_and_the_same_for_the_same_seed(parts):
    train, test = parts.clouds.generated((3, 2), 40, seed=5)
    classes = len(parts.solids.SOLIDS)
    assert train.points.shape == (3 * classes, 40, 3)
    assert test.labels.bincount().tolist() == [2] * classes
    again, _ = parts.clouds.generated((3, 2), 40, seed=5)
    other, _ = parts.clouds.generated((3, 2), 40, seed=6)
    assert torch.equal(train.points, again.points)
    assert not torch.equal(train.points, other.points)


# ------------------------------------------------------------------------------------- ModelNet


def test_off_files_are_read_with_polygons_comments_and_the_glued_header(parts, tmp_path):
    (tmp_path / "a.off").write_text(TETRAHEDRON)
    (tmp_path / "b.off").write_text(PYRAMID)
    tetrahedron = parts.modelnet.read_off(tmp_path / "a.off")
    pyramid = parts.modelnet.read_off(tmp_path / "b.off")
    assert tetrahedron.shape == (4, 3, 3)
    assert pyramid.shape == (6, 3, 3)
    assert volume(tetrahedron).item() == pytest.approx(1 / 6)
    assert volume(pyramid).item() == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    "text",
    ["", "PLY\n1 1 1\n", TETRAHEDRON[:40], TETRAHEDRON.replace("3 1 2 3", "3 1 2 9"), "OFF\n4 x 6"],
)
def test_a_broken_off_file_is_named(parts, tmp_path, text):
    (tmp_path / "broken.off").write_text(text)
    with pytest.raises(ValueError, match=r"broken\.off is not a readable OFF file"):
        parts.modelnet.read_off(tmp_path / "broken.off")


@pytest.fixture
def folder(tmp_path):
    """A folder laid out like ModelNet, with two classes."""
    for name, text in (("pyramid", PYRAMID), ("corner", TETRAHEDRON)):
        for part, count in (("train", 3), ("test", 2)):
            (tmp_path / name / part).mkdir(parents=True)
            for i in range(count):
                (tmp_path / name / part / f"{name}_{i}.off").write_text(text)
    return tmp_path


def test_a_folder_like_modelnet_is_read(parts, folder):
    train, test = parts.clouds.modelnet(folder, (2, 9), 30, seed=0)
    assert train.names == ("corner", "pyramid")
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert test.labels.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(test.points.norm(dim=-1).amax(1), torch.ones(4))


def test_a_folder_that_is_not_modelnet_is_refused(parts, folder, tmp_path):
    with pytest.raises(ValueError, match="holds 0 classes"):
        parts.clouds.modelnet(folder / "pyramid", (2, 2), 30, seed=0)
    for path in (folder / "corner" / "test").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"corner.test holds no \.off files"):
        parts.clouds.modelnet(folder, (2, 2), 30, seed=0)


def test_a_solid_without_area_is_named(parts, folder):
    flat = TETRAHEDRON.replace("1 0 0", "0 0 0").replace("0 1 0", "0 0 0")
    (folder / "corner" / "train" / "corner_0.off").write_text(flat)
    with pytest.raises(ValueError, match=r"corner_0\.off: the surface has no area"):
        parts.clouds.modelnet(folder, (2, 2), 30, seed=0)


# -------------------------------------------------------------------------------------- network


def test_networks_differ_in_nothing_but_the_pooling(parts):
    states = []
    for name in parts.pointnet.POOLINGS:
        torch.manual_seed(0)
        net = parts.pointnet.PointNet(name, 5, (8, 16), (8,))
        states.append(dict(net.named_parameters()))
    for state in states:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)


def test_the_full_form_has_the_parameters_of_the_paper(parts):
    recipe = parts.program.FULL.recipe
    net = parts.pointnet.PointNet("W", 40, recipe.point_channels, recipe.head_channels)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 0.8


@pytest.mark.parametrize("name", ["max", "Q", "PH", "H", "W", "TQ"])
def test_the_order_of_the_points_does_not_matter(parts, name):
    torch.manual_seed(0)
    net = parts.pointnet.PointNet(name, 5, (8, 16), (8,)).eval()
    points = torch.randn(4, 20, 3)
    logits = net(points[:, torch.randperm(20)])
    assert logits.shape == (4, 5)
    torch.testing.assert_close(logits, net(points), rtol=1e-3, atol=1e-4)


def test_max_and_mean_are_two_of_the_poolings(parts):
    features = torch.randn(2, 9, 3)
    named = parts.pointnet.pooling_named
    assert torch.equal(named("max")(features), features.max(1).values)
    torch.testing.assert_close(named("Q")(features), features.mean(1))


def test_a_perfect_network_scores_one_and_a_wrong_one_less(parts):
    labels = torch.arange(3).repeat(4)
    points = torch.nn.functional.one_hot(labels, 3)[:, None].expand(-1, 8, -1).float()
    clouds = parts.clouds.Clouds(points, labels, ("a", "b", "c"))
    recipe = parts.training.Recipe(batch=5)
    perfect = parts.training.score(Mean(0), clouds, 0, recipe)
    assert perfect == parts.training.Score(1.0, 1.0)
    wrong = parts.training.score(Mean(1), clouds, 0, recipe)
    assert wrong.accuracy == 0
    assert wrong.precision < 0.5


class Mean(torch.nn.Module):
    """Logits that are the mean of the points, shifted by some classes."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, points):
        return points.mean(1).roll(self.shift, 1)


def test_training_is_repeatable_and_learns(parts):
    train, _ = parts.clouds.generated((8, 1), 32, seed=0)
    recipe = parts.training.Recipe((16, 32), (16,), epochs=6, batch=16, step_size=0.1)
    nets = [parts.training.train("Q", train, 10, recipe, tqdm(disable=True)) for _ in range(2)]
    states = [net.state_dict() for net in nets]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert parts.training.score(nets[0], train, 0, recipe).accuracy > 3 / len(train.names)


# ---------------------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return tmp_path_factory.mktemp("point_clouds") / "picture.png"


@pytest.fixture(scope="module")
def results(parts, picture):
    """Part of the reduced form: what takes a few seconds."""
    program = parts.program
    form = program.replace(program.REDUCED, trained=(0, 50))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "TESTED", (0, 20, 50))
        data = program.load(None, form)
        found = program.run(data, form, ["max", "Q"], picture)
        robust = program.experiment(data, program.replace(form, trained=(0,)), ["TQ"])
    return program.Results(found.matched | robust.matched, found.clean | robust.clean)


def test_clean_clouds_are_recognised_but_not_all_of_them(results):
    for curve in results.clean.values():
        assert 0.55 < curve[0].accuracy < 0.95


def test_robust_pooling_degrades_less_than_the_mean_and_far_less_than_the_maximum(results):
    highest, mean, robust = (results.clean[name] for name in ("max", "Q", "TQ"))
    assert robust[20].accuracy > 0.85 * robust[0].accuracy
    assert highest[20].accuracy < 0.65 * highest[0].accuracy
    assert robust[50].accuracy > mean[50].accuracy + 0.03 > highest[50].accuracy + 0.2
    assert robust[50].precision > mean[50].precision > highest[50].precision + 0.2
    kept = [curve[50].accuracy / curve[0].accuracy for curve in (highest, mean, robust)]
    assert kept == sorted(kept)


def test_training_with_outliers_helps_the_maximum_which_stays_behind(results):
    with_outliers = {name: results.matched[name][50].accuracy for name in ("max", "Q")}
    assert with_outliers["max"] > results.clean["max"][50].accuracy + 0.05
    assert with_outliers["Q"] > with_outliers["max"] + 0.05


def test_picture_is_readable(results, picture):
    from matplotlib import image

    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    height, width, _ = image.imread(picture).shape
    assert height > 500
    assert width > 1000


def test_half_of_the_accuracy_is_found_between_two_shares(parts):
    def curve(*accuracies):
        shares = (0, 10, 30)
        return {s: parts.training.Score(a, 0.0) for s, a in zip(shares, accuracies, strict=True)}

    assert parts.program.half_left(curve(0.8, 0.6, 0.2)) == pytest.approx(20)
    assert parts.program.half_left(curve(0.8, 0.6, 0.5)) == 30


def test_the_best_of_each_row_is_bold(parts):
    scores = {"max": parts.training.Score(0.5, 0.8), "Q": parts.training.Score(0.7, 0.6)}
    table = parts.program.table_of({name: {0: score} for name, score in scores.items()}, "title")
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["0", "50.0", "[bold]70.0[/bold]", "[bold]80.0[/bold]", "60.0"]


def test_command_line_passes_its_options_on(parts, monkeypatch, folder):
    seen = []
    monkeypatch.setattr(parts.program, "run", lambda *given: seen.append(given))
    words = "--full --epochs 2 --points 16 --clouds 1 --seed 3 --poolings W max --output x.png"
    parts.program.main([*words.split(), "--modelnet", str(folder)])
    ((train, test), form, poolings, output) = seen[0]
    assert train.points.shape == (2, 16, 3)
    assert len(test) == 4
    assert (form.recipe.epochs, form.recipe.seed, form.recipe.batch) == (2, 3, 24)
    assert form.trained == (0, 10, 20, 50, 90)
    assert (poolings, output) == (["W", "max"], Path("x.png"))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--modelnet nowhere", "holds 0 classes"),
        ("--points 1", "must be 2 or more"),
        ("--epochs 0", "must be 1 or more"),
        ("--poolings median", "invalid choice"),
    ],
)
def test_command_line_refuses_what_cannot_be(parts, capsys, words, reason):
    with pytest.raises(SystemExit):
        parts.program.main(words.split())
    assert reason in capsys.readouterr().err
