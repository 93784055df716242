"""What the tests of examples share.

A test file of one example names it: ``EXAMPLE = "elastic_net"`` for ``examples/elastic_net.py``.
"""

import pytest
import torch
from example_module import example_module


@pytest.fixture(scope="module")
def example(request):
    """The example as a module."""
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package)
    with example_module(request.module.EXAMPLE) as module:
        yield module


@pytest.fixture(scope="module")
def picture(request, tmp_path_factory):
    """Where the example draws."""
    return tmp_path_factory.mktemp(request.module.EXAMPLE) / "picture.png"


@pytest.fixture(scope="module")
def one_thread():
    """Torch with one thread: several are slower where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
