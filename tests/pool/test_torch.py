"""Tensors, with the real torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import procession
from procession import _native

torch = pytest.importorskip("torch")

LARGE = 1 << 18

# A forked child hangs in its first parallel region when its parent's OpenMP threads have run: they were not forked along.
torch.set_num_threads(1)

pytestmark = pytest.mark.leaks("the thread and socket by which torch hands out descriptors")


def segments():
    _native.collect()
    return procession.memory().segments


def double(tensor):
    return tensor * 2


def put(queue, tensors):
    for tensor in tensors:
        queue.put(tensor)


@pytest.mark.parametrize("n", [0, 3, LARGE])
@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "int64", "int8", "bool", "uint8", "float16", "bfloat16", "complex64"]
)
def test_a_tensor_arrives_as_it_was(n, dtype):
    queue = procession.Queue()
    sent = torch.arange(n).to(getattr(torch, dtype))
    queue.put(sent)
    got = queue.get()
    assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
    assert torch.equal(got, sent)
    if n:
        got[0] = 1
        assert not torch.equal(got[0], sent[0])


def test_what_the_sender_does_later_is_not_seen():
    queue = procession.Queue()
    for sent in (torch.zeros(3), torch.zeros(LARGE), torch.zeros(LARGE).as_subclass(Special), torch.ones(3).neg()):
        queue.put(sent)
        before = sent.clone()
        sent[0] = 7
        got = queue.get()
        assert type(got) is type(sent)
        assert torch.equal(got, before)
        assert not got.is_shared()


class Special(torch.Tensor):
    """A subclass."""


def eye(plain):
    return plain.reshape(1, -1) * torch.eye(5, len(plain))


# Tensors that are more than their elements, and some of one element, of which torch does not look at the strides.
PECULIAR = {
    "conjugate": lambda _, numbers: numbers.conj(),
    "negative": lambda _, numbers: numbers.conj().imag,
    "subclass": lambda plain, _: plain.as_subclass(Special),
    "sparse": lambda plain, _: eye(plain).to_sparse(),
    "rows": lambda plain, _: eye(plain).to_sparse_csr(),
    "nested": lambda plain, _: torch.nested.nested_tensor([plain, plain[1:]]),
    "jagged": lambda plain, _: torch.nested.nested_tensor([plain, plain[1:]], layout=torch.jagged),
    "storage": lambda plain, _: plain.untyped_storage(),
    "one of every second": lambda plain, _: plain[::2][:1],
    "first column": lambda plain, _: plain.reshape(1, -1)[:, 0],
    "real part": lambda _, numbers: numbers[:1].real,
    "transposed": lambda plain, _: plain[:1].reshape(1, 1).t(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:Sparse invariant checks")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("n", [6, LARGE])
@pytest.mark.parametrize("what", PECULIAR)
def test_a_tensor_beside_one_that_is_peculiar(what, n):
    """torch's own way with such a one moves the memory away under the other."""
    queue = procession.Queue()
    plain = torch.arange(float(n))
    numbers = torch.complex(plain, torch.ones(n))
    odd = PECULIAR[what](plain, numbers)
    queue.put([plain, numbers, odd])
    got_plain, got_numbers, got = queue.get()
    assert torch.equal(got_plain, plain)
    assert torch.equal(got_numbers, numbers)
    assert type(got) is type(odd)
    if what == "storage":
        assert bytes(got) == bytes(odd)
    elif odd.is_nested:
        assert all(torch.equal(a, b) for a, b in zip(got.unbind(), odd.unbind(), strict=True))
    else:
        assert got.layout is odd.layout
        assert torch.equal(got.to_dense(), odd.to_dense())


def test_the_default_device_is_the_receivers_own_matter():
    queue = procession.Queue()
    queue.put([torch.ones(0), torch.ones(3)])
    torch.set_default_device("meta")
    try:
        assert [tensor.device.type for tensor in queue.get()] == ["cpu", "cpu"]
    finally:
        torch.set_default_device(None)


def test_without_numpy():
    code = """
import sys
sys.modules["numpy"] = None
import torch
import procession
queue = procession.Queue()
for n in (3, 1 << 18):
    queue.put(torch.ones(n))
    print(float(queue.get().sum()))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.split() == ["3.0", "262144.0"]


@pytest.mark.parametrize("n", [4, 512])
def test_strides(n):
    queue = procession.Queue()
    base = torch.arange(n * n, dtype=torch.float64).reshape(n, n)
    images = torch.rand(2, 3, n, n).to(memory_format=torch.channels_last)
    for sent in (base.T, images, base[::2], base[:, 1:3], base[0].expand(3, n), torch.tensor(3.5), base[:0]):
        queue.put(sent)
        got = queue.get()
        assert torch.equal(got, sent)
    queue.put(images)
    assert queue.get().stride() == images.stride()


def test_parameters_and_gradients():
    queue = procession.Queue()
    layer = torch.nn.Linear(300, 300)
    queue.put(layer)
    got = queue.get()
    assert type(got.weight) is torch.nn.Parameter
    assert got.weight.requires_grad
    assert torch.equal(got.weight, layer.weight)
    leaf = torch.ones(3, requires_grad=True)
    queue.put(leaf)
    assert queue.get().requires_grad
    with pytest.raises(RuntimeError, match="non-leaf"):
        queue.put(leaf * 2)


def test_the_same_tensor_twice_is_one():
    queue = procession.Queue()
    tensor = torch.ones(LARGE)
    queue.put([tensor, tensor])
    first, second = queue.get()
    assert first is second


def test_by_value_too():
    queue = procession.Queue()
    tensor = torch.ones(LARGE)
    queue.put(lambda: tensor)
    before = segments()
    assert torch.equal(queue.get()(), tensor)
    assert before > 0


def test_arguments_and_results_of_a_pool(ctx):
    with ctx.Pool(2) as pool:
        results = pool.map(double, [torch.ones(n) for n in (3, LARGE)])
    assert [float(result.sum()) for result in results] == [6, 2 * LARGE]


def test_a_tensor_outlives_its_sender(ctx):
    """With torch's own reducers it is lost: the receiver asks the sender for a descriptor."""
    queue = ctx.Queue()
    process = ctx.Process(target=put, args=(queue, [torch.ones(3), torch.ones(LARGE)]))
    process.start()
    process.join()
    assert [float(queue.get().sum()) for _ in range(2)] == [3, LARGE]
    process.close()


def test_what_is_shared_already_stays_shared():
    queue = procession.Queue()
    tensor = torch.zeros(3).share_memory_()
    queue.put(tensor)
    got = queue.get()
    got[0] = 1
    assert tensor[0] == 1


def test_shared(ctx):
    tensor = procession.shared({"weights": torch.ones(LARGE)})
    before = segments()
    with ctx.Pool(2) as pool:
        results = pool.map(total, [tensor] * 20)
    assert results == [LARGE] * 20
    assert segments() == before


def total(state):
    return float(state["weights"].sum())
