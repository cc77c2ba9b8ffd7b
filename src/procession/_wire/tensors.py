"""PyTorch's CPU tensors: their elements go the way that NumPy's do.

torch registers reducers of its own with `multiprocessing`. They move a tensor's memory into a file in /dev/shm, which sender and
receiver then share, and whose descriptor the receiver fetches from the sender: which must still live. Here a message is a
snapshot, and outlives its sender. What torch's own are left for: tensors that already are in shared memory (`share_memory_()`: to
share them is what is meant), and those of a GPU, sparse, quantized or otherwise special.
"""

from __future__ import annotations

import pickle
import warnings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["instead_of", "reduce_tensor"]


def instead_of(reducer: Any) -> Any:
    """Return what is to be used in the place of one of torch's reducers; mostly that itself."""
    return reduce_tensor if reducer.__name__ == "reduce_tensor" else reducer


def reduce_tensor(tensor: Any) -> tuple[Any, ...]:
    """Reduce a tensor to a function and its arguments, for pickle."""
    import torch

    if not _is_plain(tensor):
        return torch.multiprocessing.reductions.reduce_tensor(tensor)  # type: ignore[no-any-return]
    data, strides = tensor.detach(), None
    if data.is_contiguous():
        flat = data.view(-1)
    elif _is_dense(data):
        flat, strides = data.as_strided((data.numel(),), (1,)), data.stride()
    else:
        flat = data.contiguous().view(-1)
    buffer = pickle.PickleBuffer(flat.view(torch.uint8).numpy())
    parameter = isinstance(tensor, torch.nn.Parameter)
    return _rebuild, (buffer, tensor.dtype, tuple(tensor.shape), strides, tensor.requires_grad, parameter)


def _is_plain(tensor: Any) -> bool:
    import torch

    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not (tensor.is_shared() or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
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


def _rebuild(buffer: Any, dtype: Any, shape: Any, strides: Any, requires_grad: bool, parameter: bool) -> Any:
    """Make a tensor that uses a buffer in place."""
    import torch

    view = memoryview(buffer)
    if not view.nbytes:
        flat = torch.empty(0, dtype=dtype)
    elif view.readonly:
        with warnings.catch_warnings():  # once a process: torch has no read-only tensors
            warnings.simplefilter("ignore")
            flat = torch.frombuffer(buffer, dtype=dtype)
    else:
        flat = torch.frombuffer(buffer, dtype=dtype)
    tensor = flat.view(shape) if strides is None else flat.as_strided(shape, strides)
    if parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_() if requires_grad else tensor
