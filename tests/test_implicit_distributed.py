"""Data spread over processes give the model that one process with all data gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from declarative_cvx.errors import ParameterError
from declarative_cvx.nonconvex.implicit.distributed import DataSum, ShardedSum
from declarative_cvx.nonconvex.implicit.model import ImplicitModel
from declarative_cvx.nonconvex.implicit.training.descent import BlockCoordinateDescent, Lifting

ROOT = Path(__file__).resolve().parents[1]
POINTS, P, Q, STATES = 41, 5, 2, 6  # 41: shards of different sizes
RATE, STEPS = 0.1, 5

WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, "tests")
import test_implicit_distributed as t

dist.init_process_group("gloo")
torch.set_num_threads(1)
results = {name: work() for name, work in t.WORK.items()}
if dist.get_rank() == 0:
    torch.save(results, sys.argv[1])
dist.destroy_process_group()
"""


def data():
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(POINTS, P, generator=generator, dtype=torch.float64)
    weight = torch.randn(P, Q, generator=generator, dtype=torch.float64)
    return u, torch.tanh(u @ weight)


def descended(loss, total, shard):
    u, y = data()
    if loss == "cross_entropy":
        y = torch.softmax(3 * y, 1)
    training = BlockCoordinateDescent(sweeps=4, tol=0.0).fit(
        Lifting("relu", loss),
        *(shard(u), shard(y), STATES),
        generator=torch.Generator().manual_seed(1),
        total=total,
    )
    weights = training.weights
    history = [sweep.objective for sweep in training.history.sweeps]
    named = {name: getattr(weights, name).detach() for name in "ABCDbc"}
    return named | {"history": torch.tensor(history, dtype=torch.float64)}


def model():
    torch.manual_seed(2)
    return ImplicitModel(P, Q, STATES, activation="tanh").double()


def squared_error(network, u, y):
    """Of all data where every process has its own: DDP averages the gradients."""
    return (network(u) - y).square().sum() / POINTS


def backpropagated(network, share, count):
    u, y = (share(value) for value in data())
    optimiser = torch.optim.SGD(network.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimiser.zero_grad()
        (count * squared_error(network, u, y)).backward()
        optimiser.step()
    return {name: value.detach() for name, value in network.state_dict().items()}


def descended_in_shards(loss):
    total = ShardedSum()
    return descended(loss, total, total.shard)


def backpropagated_in_shards():
    total = ShardedSum()
    network = torch.nn.parallel.DistributedDataParallel(model())
    found = backpropagated(network, total.shard, total.size)
    return {name.removeprefix("module."): value for name, value in found.items()}


WORK = {
    "squared": lambda: descended_in_shards("squared"),
    "cross_entropy": lambda: descended_in_shards("cross_entropy"),
    "backpropagation": backpropagated_in_shards,
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What the first of two processes under torchrun has computed."""
    folder = tmp_path_factory.mktemp("two_processes")
    script, result = folder / "worker.py", folder / "result.pt"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", script, result]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(result)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_block_coordinate_descent_in_shards_gives_the_same_model(loss, two_processes):
    shared = two_processes[loss]
    alone = descended(loss, DataSum(), lambda value: value)
    assert float(alone["A"].abs().max()) > 0.01
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=0, atol=1e-10, msg=name)


def test_backpropagation_in_shards_gives_the_same_model(two_processes):
    shared = two_processes["backpropagation"]
    alone = backpropagated(model(), lambda value: value, 1)
    start = model().state_dict()
    assert any(float((alone[name] - start[name]).abs().max()) > 1e-3 for name in start)
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=0, atol=1e-12, msg=name)


@pytest.fixture
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sums_leave_their_arguments_alone():
    value = torch.arange(6.0).view(2, 3).t().requires_grad_()
    total = ShardedSum()
    for result in (total.sum(value), total.same(value)):
        assert torch.equal(result, value)
        assert result.data_ptr() != value.data_ptr()
    assert (total.rank, total.size) == (0, 1)
    assert torch.equal(total.shard(value), value)
    with pytest.raises(ParameterError, match="0 data points cannot be spread over 1"):
        total.shard(torch.zeros(0, 2))


def test_sums_over_processes_need_a_process_group():
    with pytest.raises(ParameterError, match="init_process_group"):
        ShardedSum()
