"""Affine maps between blocks of entries, however they are carried out, against dense products."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from numpy.testing import assert_allclose
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap

from declarative_cvx.linear_map import MOST_GRIDS, AffineMap

CPU = torch.device("cpu")
HEIGHTS, WIDTHS = (5, 0, 7, 4), (6, 3, 4)


def selection(source: list[int], factor: float = 1.0) -> sp.csr_array:
    """Entries of x by their numbers; -1 for the constant 2."""
    matrix = np.zeros((len(source), sum(WIDTHS) + 1))
    for row, col in enumerate(source):
        matrix[row, col] = factor if col >= 0 else 2.0
    return sp.csr_array(matrix)


def general() -> sp.csr_array:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((16, 14)) * (rng.random((16, 14)) < 0.4)
    matrix[:, 6:9] = 0.0  # nothing depends on the second block
    return sp.csr_array(matrix)


LINES = [-1, -1, 9, 10, 11, 0, 1, 2, 3, 4, 5, -1, 6, 7, 8, -1]
GRID = [0, -1, 2, -1, 4, -1, 9, -1, 11, -1, 6, -1, 7, -1, 8, -1]
SHUFFLED = [5, 3, -1, 8, 0, 12, 1, 10, 6, 4, 11, 7, 2, 9, -1, -1]
MAPS = {
    "lines": selection(LINES),
    "scaled lines": selection(LINES, -0.5),
    "grid": selection(GRID),
    "scaled grid": selection(GRID, 3.0),
    "shuffled": selection(SHUFFLED),
    "general": general(),
    "constant": selection([-1] * 16),
}
names = pytest.mark.parametrize("name", MAPS)


def map_named(name: str) -> AffineMap:
    return AffineMap(MAPS[name], HEIGHTS, WIDTHS)


def blocks(sizes: tuple[int, ...], batch: int = 3, seed: int = 0) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.as_tensor(rng.standard_normal((batch, size))) for size in sizes]


def joined(values: list[Tensor] | tuple[Tensor, ...]) -> np.ndarray:
    return torch.cat([*values], 1).detach().numpy()


def test_the_examples_are_carried_out_in_different_ways() -> None:
    maps = {name: map_named(name) for name in MAPS}
    assert [name for name, m in maps.items() if m.pieces is not None][:2] == [
        "lines",
        "scaled lines",
    ]
    assert maps["grid"].grids is not None
    assert maps["grid"].pieces is None
    assert not maps["general"].is_selection


@names
def test_values_are_those_of_the_dense_map(name: str) -> None:
    dense, x = MAPS[name].toarray(), blocks(WIDTHS)
    found = map_named(name)(CPU, *x)
    assert tuple(block.shape[1] for block in found) == HEIGHTS
    expected = joined(x) @ dense[:, :-1].T + dense[:, -1]
    assert_allclose(joined(found), expected[: found[0].shape[0]], atol=1e-14)


@names
def test_the_adjoint_is_that_of_the_dense_map(name: str) -> None:
    y = blocks(HEIGHTS)
    found = map_named(name).transposed(*y)
    assert tuple(block.shape[1] for block in found) == WIDTHS
    assert_allclose(joined(found), joined(y) @ MAPS[name].toarray()[:, :-1], atol=1e-14)


@names
def test_parts_are_those_of_the_dense_map(name: str) -> None:
    whole, x = map_named(name), blocks(WIDTHS)
    part = whole.part([2, 0], [2])
    dense = MAPS[name].toarray()
    rows, cols = np.r_[5:12, 0:5], np.r_[9:13]
    expected = x[2].numpy() @ dense[np.ix_(rows, cols)].T + dense[rows, -1]
    found = joined(part(CPU, x[2]))
    assert_allclose(found, expected[: len(found)], atol=1e-14)
    assert whole.part([2, 0], [2]) is part
    assert whole.part(range(4), range(3)) is whole


@names
def test_dependence_and_constants(name: str) -> None:
    whole, dense = map_named(name), MAPS[name].toarray()
    edges = [
        np.split(row, np.cumsum(WIDTHS)[:-1], 1) for row in np.split(dense[:, :-1], [5, 5, 12])
    ]
    expected = [[bool(block.any()) for block in row] for row in edges]
    assert whole.dependence.tolist() == expected
    fixed = ~dense[:, :-1].any(1) & (dense[:, -1] != 0)
    assert_allclose(whole.constants(), np.where(fixed, dense[:, -1], np.nan))


@pytest.mark.parametrize("name", [name for name in MAPS if name != "constant"])
def test_derivatives_of_every_order_and_in_both_modes(name: str) -> None:
    whole = map_named(name)
    x = [v.requires_grad_() for v in blocks(WIDTHS, batch=2)]

    def curved(*x: Tensor) -> Tensor:  # so that second derivatives do not vanish
        return torch.cat(whole(CPU, *x), 1) ** 3

    assert gradcheck(curved, x, check_forward_ad=True)
    assert gradgradcheck(curved, x)


@pytest.mark.parametrize("name", ["lines", "grid", "shuffled", "general"])
def test_gradients_of_some_blocks_only(name: str) -> None:
    dense, x = MAPS[name].toarray(), blocks(WIDTHS)
    x[2].requires_grad_()
    out = map_named(name)(CPU, *x)[2]
    upstream = blocks((7,), seed=1)[0]
    if not out.requires_grad:
        assert not dense[5:12, 9:13].any()
        return
    (found,) = torch.autograd.grad(out, x[2], upstream)
    assert_allclose(found, upstream.numpy() @ dense[5:12, 9:13], atol=1e-14)


@pytest.mark.parametrize("name", ["lines", "grid", "shuffled", "general"])
def test_transforms(name: str) -> None:
    whole, x = map_named(name), blocks(WIDTHS)
    pair = [torch.stack([v, 2 * v], 1) for v in x[1:]]
    found = vmap(lambda *v: whole(CPU, x[0], *v), in_dims=1)(*pair)
    for i in range(2):
        expected = whole(CPU, x[0], *((1 + i) * v for v in x[1:]))
        for one, other in zip(found, expected, strict=True):
            assert_allclose(one[i], other, atol=1e-14)
    direction = blocks(WIDTHS, seed=2)
    moved = jvp(lambda *v: whole(CPU, *v), tuple(x), tuple(direction))[1]
    assert_allclose(joined(moved), joined(direction) @ MAPS[name].toarray()[:, :-1].T, atol=1e-14)


def test_maps_of_too_many_grids_are_carried_out_entry_by_entry() -> None:
    size = 4 * MOST_GRIDS
    order = np.random.default_rng(3).permutation(size)
    matrix = sp.csr_array((np.ones(size), (np.arange(size), order)), shape=(size, size + 1))
    many = AffineMap(matrix, (size,), (size,))
    x = blocks((size,))
    assert many.grids is None
    assert_allclose(many(CPU, *x)[0], x[0][:, order])
    assert_allclose(many.transposed(*x)[0][:, order], x[0])
