"""README.md says what is true: its examples run as printed, its tables follow from the code."""

import importlib.util
import re
from pathlib import Path

import pytest
from markdown_blocks import python_blocks, run_blocks

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


@pytest.fixture(scope="module")
def text() -> str:
    return README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_run_in_order_as_printed(capsys):
    namespace = run_blocks(README)
    printed = capsys.readouterr().out
    assert "torch.Size([64, 5])" in printed
    assert "Solution(64 OPTIMAL" in printed
    assert "1 of 3 problems were not solved. element 1: INFEASIBLE by" in printed
    assert "tensor([1., nan, 3.])" in printed
    assert "3 ways to solve 64 elements" in " ".join(printed.split())
    assert namespace["found"].best_row().error < 1e-6
    assert namespace["x_star"].shape == (64, 3)
    assert namespace["solution"].derivative.regular.all()


def test_the_first_example_stands_alone(text):
    _, code = next(python_blocks(text))
    exec(compile(code, str(README), "exec"), {})


def test_solver_table_is_up_to_date(text, tables):
    assert tables.with_tables(text) == text, "run: python docs/make_tables.py"


def test_solver_table_has_a_row_for_each_solver(tables):
    rows = tables.solver_table().splitlines()[2:]
    assert len(rows) == len(tables.BACKENDS)
    (ecos,) = [row for row in rows if "ECOS" in row]
    assert "GPL-3" in ecos


def test_a_readme_without_markers_is_an_error(tables):
    with pytest.raises(ValueError, match="solvers:begin"):
        tables.with_tables("no table here")


def test_files_that_the_text_names_exist(text):
    named = set(re.findall(r"`((?:examples|docs)/[\w/.]+|constraints\.txt)`", text))
    assert "constraints.txt" in named
    assert all((ROOT / name).exists() for name in named)
