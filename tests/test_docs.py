"""The site says what is true: its code runs as printed, its pictures exist, it builds."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from markdown_blocks import promises, run_blocks

import declarative_cvx as dcx

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
GUIDES = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
LARGEST = 120_000  # bytes of a picture


def named(paths):
    return [path.stem for path in paths]


def links(page):
    """What a page links to, without what is elsewhere."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if "://" not in link]


def pictures():
    return [(page, link) for page in PAGES for link in links(page) if link.endswith(".png")]


def module_of(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------- code


def test_there_are_guides():
    assert {"start", "convex", "nonconvex", "comparing", "gradients"} <= set(named(GUIDES))


@pytest.mark.parametrize("page", GUIDES, ids=named(GUIDES))
def test_code_runs_in_order_and_prints_what_it_says(page, capsys):
    mpl.use("Agg")
    torch.manual_seed(0)
    run_blocks(page)
    printed = capsys.readouterr().out
    at = 0
    for promise in promises(page.read_text(encoding="utf-8")):
        assert promise in printed[at:], f"{page.name} promises {promise!r} after:\n{printed[:at]}"
        at = printed.index(promise, at) + len(promise)


def test_a_promise_is_what_stands_after_a_print():
    text = "```python\nprint(1)  # 1\nx = 2  # two\nprint([1, 2])  # [1, ...\n```\nprint(3)  # 3\n"
    assert promises(text) == ["1", "[1,"]


# --------------------------------------------------------------------------------------- pictures


def test_there_are_pictures_of_all_examples():
    drawn = {Path(link).stem for page, link in pictures() if page.stem == "gallery"}
    assert drawn == {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert drawn == set(module_of("make_gallery").OPTIONS)


def test_the_gallery_tells_the_options_that_it_is_run_with():
    pytest.importorskip("PIL")
    text = " ".join((DOCS / "gallery.md").read_text(encoding="utf-8").split())
    for name, options in module_of("make_gallery").OPTIONS.items():
        if options:
            assert f"`{name}` with `{' '.join(options)}`" in text


@pytest.mark.parametrize(("page", "link"), pictures(), ids=lambda value: Path(value).stem)
def test_pictures_exist_and_are_small(page, link):
    picture = page.parent / link
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert picture.stat().st_size < LARGEST


def test_no_picture_is_left_over():
    used = {(page.parent / link).resolve() for page, link in pictures()}
    assert used == {path.resolve() for path in DOCS.glob("*/*.png") if "_build" not in path.parts}


def test_pictures_show_what_the_page_says_of_them():
    drawn = module_of("make_pictures")
    layer = dcx.DeclarativeLayer(*drawn.nearest(), on_irregular="ignore")
    p = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)
    found, slope = drawn.slopes(layer, p)
    torch.testing.assert_close(found, p.clamp(min=0))
    torch.testing.assert_close(slope[[0, 2]], torch.tensor([0.0, 1.0], dtype=torch.float64))
    kept = drawn.followed(torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 1.6], dtype=p.dtype))
    assert (kept[:-1] > 0).all()
    assert kept[-1] < 0
    errors = drawn.loose_solver_errors(np.array([1e-2, 1e-4]))
    plain, *refined = errors.values()
    assert plain[0] > 0.1 > plain[1] > 1e-6
    assert max(map(max, refined)) < 1e-12


# ------------------------------------------------------------------------------------------- site


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^([\w/]+)$", index, re.MULTILINE)
    assert set(listed) >= set(named(PAGES)) - {"index"}


def test_the_site_builds_without_warnings(tmp_path):
    for package in ("sphinx", "myst_parser", "numpydoc", "pydata_sphinx_theme"):
        pytest.importorskip(package)
    # A copy, without what an earlier build has left there.
    shutil.copy(ROOT / "README.md", tmp_path)
    source = tmp_path / "docs"
    shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("_build", "generated"))
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q"]
    command += [source, tmp_path / "html"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "start.html").exists()
