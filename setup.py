"""The compiled part of the package; everything else about it is in setup.cfg."""

import sys
from glob import glob

from setuptools import Extension, setup

OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
FAST = ["-O3", "-std=c11", "-ffp-contract=fast", "-fno-math-errno"]

setup(
    ext_modules=[
        Extension(
            "declarative_cvx.compiled._module",
            ["declarative_cvx/compiled/module.c"],
            depends=glob("declarative_cvx/compiled/*.h"),
            extra_compile_args=[] if sys.platform == "win32" else [*FAST, *OPENMP],
            extra_link_args=OPENMP,
            optional=True,  # without a compiler, other solvers do its work
        )
    ]
)
