"""The experiment with certified accuracies trains, measures and draws what it says."""

import pytest
from example_module import example_module

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tqdm")
pytest.importorskip("sklearn")


def test_certified_accuracies_are_below_attacked_ones(tmp_path):
    picture = tmp_path / "picture.png"
    with example_module("implicit_robustness") as example:
        settings = example.Settings(
            states=4, training=24, testing=20, steps=40, sweeps=1, tested=(0.1, 0.4)
        )
        results = example.run(settings, picture)
        table = example.table(results, settings)
    assert picture.stat().st_size > 1000
    assert table.row_count == len(results) == 4
    assert results["nominal"].accuracy > 0.6
    for result in results.values():
        assert all(
            sure <= stood for sure, stood in zip(result.certified, result.attacked, strict=True)
        )
        assert result.certified[1] <= result.certified[0] <= result.accuracy
        assert all(ratio >= 1 for ratio in result.ratio)
