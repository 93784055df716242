"""The command line: what it prints, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from declarative_cvx.backends.table import BACKENDS
from declarative_cvx.cli import doctor, main
from declarative_cvx.compiled import is_available

FILE = """
import cvxpy as cp
import numpy as np


def build(n=3):
    x, b = cp.Variable(int(n)), cp.Parameter(int(n))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - b)), [x >= 0])
    return problem, [b], [np.linspace(-1, 1, 2 * int(n)).reshape(2, int(n))]


def cone():
    x, b = cp.Variable(3), cp.Parameter(3)
    return cp.Problem(cp.Minimize(cp.norm(x - b)), [x >= 0]), [b], [np.ones(3)]


def as_dict():
    problem, parameters, values = build()
    return {"problem": problem, "parameters": parameters, "values": values}


def misspelt():
    problem, parameters, values = build()
    return {"problem": problem, "parameter": parameters, "values": values}


def nothing():
    return None
"""


@pytest.fixture
def file(tmp_path, monkeypatch, request):
    """A file of its own name for each test, as it is imported by its name."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / f"problem_{abs(hash(request.node.name))}.py"
    path.write_text(FILE)
    return path


QUICK = [
    "--solvers",
    "clarabel",
    "--derivatives",
    "implicit",
    "--repeats",
    "1",
    "--time-limit",
    "0",
]


def test_compare_prints_a_table_and_names_the_fastest(file, capsys) -> None:
    assert main(["compare", str(file), *QUICK, "--format", "json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [row["solver"] for row in found["rows"]] == ["Clarabel"]
    assert found["batch"] == 2
    assert "fastest that is right to 1e-06: Clarabel, derivative implicit" in err


def test_files_and_sweeps(file, tmp_path) -> None:
    table, picture = tmp_path / "table.md", tmp_path / "picture.png"
    command = ["compare", f"{file}:as_dict", *QUICK, "--format", "markdown"]
    command += ["--output", str(table), "--plot", str(picture)]
    assert main([*command, "--batch", "5"]) == 0
    assert table.read_text().startswith("| solver |")
    assert "5 OPTIMAL" in table.read_text()
    assert picture.stat().st_size > 5_000
    assert main([*command, "--sweep", "batch=1,4"]) == 0
    assert "**batch = 4**" in table.read_text()


def test_a_sweep_over_sizes_calls_the_function_with_them(file, capsys) -> None:
    assert main(["compare", str(file), *QUICK, "--sweep", "size=2,4", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"] == [2, 4]


def test_no_right_answer_is_exit_code_1(file, capsys) -> None:
    command = ["compare", f"{file}:cone", *QUICK, "--solvers", "osqp"]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert "failed" in out
    assert "No row is right" in err


@pytest.mark.parametrize(
    ("target", "extra", "words"),
    [
        ("{file}:bild", [], "has no function 'bild'. It has build, cone"),
        ("{file}:nothing", [], "returned NoneType"),
        ("{file}:misspelt", [], "unknown ['parameter']"),
        ("missing.py", [], "no file 'missing.py'"),
        ("{file}", ["--solvers", "clarabell"], "Did you mean 'Clarabel'"),
        ("{file}", ["--sweep", "bach=1"], "Did you mean 'batch'"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(file, capsys, target, extra, words) -> None:
    assert main(["compare", target.format(file=file), *extra]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_a_file_that_cannot_be_run(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "broken_problem_file.py"
    path.write_text("import no_such_package_anywhere\n")
    assert main(["compare", str(path)]) == 2
    assert "ModuleNotFoundError" in capsys.readouterr().err


def test_argparse_misuse_is_exit_code_2(file, capsys) -> None:
    for command in ([], ["compare"], ["compare", str(file), "--sweep", "batch=x"], ["cmpare"]):
        with pytest.raises(SystemExit) as error:
            main(command)
        assert error.value.code == 2
    with pytest.raises(SystemExit) as error:
        main(["compare", "--help"])
    assert error.value.code == 0
    assert "def build():" in capsys.readouterr().out


def test_doctor_finds_what_is_installed(capsys) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == version("torch")
    assert [solver["solver"] for solver in found["solvers"]] == list(BACKENDS)
    for solver in found["solvers"]:
        compiled = solver["solver"] != "DualActiveSet" or is_available()
        assert solver["works"] == ("yes" if compiled else "not installed")
        assert solver["version"] == version(solver["package"])
    assert "IPOPT" in [solver["solver"] for solver in found["nlp_solvers"]]


def test_doctor_says_how_to_install_what_is_missing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(BACKENDS["OSQP"], "is_installed", classmethod(lambda cls: False))
    finding = doctor.examine(BACKENDS["OSQP"])
    assert finding.works == "not installed"
    assert finding.install == "pip install osqp"
    main(["doctor"])
    assert "pip install osqp" in capsys.readouterr().out


def test_doctor_notices_a_solver_that_is_broken(monkeypatch) -> None:
    def fail(self, program, start=None):
        raise OSError("libsolver.so: cannot open shared object file")

    monkeypatch.setattr(BACKENDS["SCS"], "solve", fail)
    assert "cannot open" in doctor.examine(BACKENDS["SCS"]).works


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "declarative_cvx", "demo"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "Convex: DPP" in found.stdout
    assert "Clarabel" in found.stdout
    assert "fastest that is right" in found.stderr
