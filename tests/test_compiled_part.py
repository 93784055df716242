"""The compiled parts of the package are there wherever they can be."""

import shutil
import sys
import sysconfig

import pytest

from declarative_cvx import compiled, compiled_cone_systems
from declarative_cvx.cones import compiled as compiled_projections

COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which(COMPILER), reason="no C compiler")
def test_what_a_compiler_makes_is_not_missing():
    """It is left out without a word where it does not compile, and its tests are skipped."""
    assert compiled.is_available()
    assert compiled_projections.is_available()
    assert compiled_cone_systems.is_available()
