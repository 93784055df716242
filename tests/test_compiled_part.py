"""The compiled part of the package is there wherever it can be."""

import shutil
import sys
import sysconfig

import pytest

from declarative_cvx.compiled import is_available

COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which(COMPILER), reason="no C compiler")
def test_what_a_compiler_makes_is_not_missing():
    """It is left out without a word where it does not compile, and its tests are skipped."""
    assert is_available()
