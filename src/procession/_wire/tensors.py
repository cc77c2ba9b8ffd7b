"""PyTorch's CPU tensors: their elements go the way that NumPy's do.

torch registers reducers of its own with `multiprocessing`. They move a tensor's memory into a file in /dev/shm, which sender and
receiver then share, and whose descriptor the receiver fetches from the sender: which must still live. Here a message is a
snapshot, and outlives its sender; that goes for the storages of subclasses and of sparse and nested tensors too. What torch's own
are left for: what already is in shared memory (`share_memory_()`: to share it is what is meant) or a GPU's, and all tensors where
NumPy is not installed, by which torch hands out a tensor's memory.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["instead_of", "reduce_storage", "reduce_tensor"]


def instead_of(reducer: Any) -> Any:
    """Return what is to be used in the place of one of torch's reducers; mostly that itself."""
    return {"reduce_tensor": reduce_tensor, "reduce_storage": reduce_storage}.get(reducer.__name__, reducer)


def reduce_tensor(tensor: Any) -> tuple[Any, ...]:
    """Reduce a tensor to a function and its arguments, for pickle."""
    import torch

    if not _is_plain(tensor):
        return torch.multiprocessing.reductions.reduce_tensor(tensor)  # type: ignore[no-any-return]
    data, strides = tensor.detach().resolve_conj().resolve_neg(), None
    if not _is_dense(data):
        data = data.contiguous()
    elif not data.is_contiguous():
        strides = data.stride()
    # As a vector; view() will not do: of one element, torch does not look at the stride.
    buffer = _buffer(data.as_strided((data.numel(),), (1,)).view(torch.uint8))
    parameter = isinstance(tensor, torch.nn.Parameter)
    return _rebuild, (buffer, tensor.dtype, tuple(tensor.shape), strides, tensor.requires_grad, parameter)


def reduce_storage(storage: Any) -> tuple[Any, ...]:
    """The same for a storage. torch's own would move it away under other tensors of the same message."""
    import torch

    if not _is_here(storage) or storage.nbytes() == 0:
        return torch.multiprocessing.reductions.reduce_storage(storage)  # type: ignore[no-any-return]
    return _rebuild_storage, (_buffer(torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)),)


def _is_here(data: Any) -> bool:
    if data.device.type != "cpu" or data.is_shared():
        return False
    try:
        import numpy as np  # noqa: F401
    except ImportError:
        return False
    return True


def _is_plain(tensor: Any) -> bool:
    import torch

    return (
        tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_quantized)
        and _is_here(tensor)
        # Of these torch says why it does not send them.
        and not (
            (hasattr(tensor, "has_names") and tensor.has_names())
            or tensor._backward_hooks
            or (tensor.requires_grad and not tensor.is_leaf)
        )
    )


def _is_dense(tensor: Any) -> bool:
    """Tell whether its elements lie side by side, in whatever order."""
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _buffer(octets: Any) -> pickle.PickleBuffer:
    return pickle.PickleBuffer(octets.numpy())


def _rebuild(buffer: Any, dtype: Any, shape: Any, strides: Any, requires_grad: bool, parameter: bool) -> Any:
    """Make a tensor that uses a buffer in place."""
    import torch

    view = memoryview(buffer)
    with warnings.catch_warnings() if view.readonly else contextlib.nullcontext():
        if view.readonly:  # torch says once a process that it has no read-only tensors
            warnings.simplefilter("ignore")
        flat = torch.frombuffer(buffer, dtype=dtype) if view.nbytes else torch.empty(0, dtype=dtype, device="cpu")
    tensor = flat.view(shape) if strides is None else flat.as_strided(shape, strides)
    if parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_() if requires_grad else tensor


def _rebuild_storage(buffer: Any) -> Any:
    import torch

    return _rebuild(buffer, torch.uint8, (memoryview(buffer).nbytes,), None, False, False).untyped_storage()
