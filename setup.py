"""The compiled part of the package; everything else about it is in setup.cfg."""

import sys
from glob import glob

from setuptools import Extension, setup

OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
FAST = ["-O3", "-std=c11", "-ffp-contract=fast", "-fno-math-errno"]


def extension(name: str) -> Extension:
    """A module in C; without a compiler, other code does its work."""
    return Extension(
        f"declarative_cvx.compiled._{name}",
        [f"declarative_cvx/compiled/{name}.c"],
        depends=glob("declarative_cvx/compiled/*.h"),
        extra_compile_args=[] if sys.platform == "win32" else [*FAST, *OPENMP],
        extra_link_args=OPENMP,
        optional=True,
    )


setup(ext_modules=[extension(name) for name in ("programs", "projections", "cone_systems")])
