"""Counts how often the host of a GPU would wait for it in a training step, on the CPU.

The device of a rank is "cpu:0" here. Tensors are the device's, unless they are made without a device or from host
tensors alone; of a tensor on the host nothing is waited for. Counted are
    reads      .item(), float(), bool(), .tolist(), .cpu() ... of a device tensor
    shapes     nonzero, unique, a bool mask as an index ...: the shape of the result depends on values
    uploads    torch.tensor(values, device=...), .to(device) without non_blocking, host tensors or lists as an index
    DeepSpeed  get_accelerator().synchronize(), its FloatTensor and ByteTensor
Waits for streams and events have no counterpart on the CPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.accelerator import get_accelerator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu", 0)
_READS = {"item", "tolist", "numpy", "__array__", "cpu", "equal"}
_SHAPES = {"nonzero", "_unique", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount"}
_FROM_VALUES = {"tensor", "as_tensor", "new_tensor", "from_numpy"}
PACKAGES = ("clipdist", "deepspeed", "open_clip", "timm", "transformers")


def site() -> tuple[str, str]:
    """The package and the line that called torch."""
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        installed = path.parts.index("site-packages") + 1 if "site-packages" in path.parts else 0
        package = next((part for part in reversed(path.parts[installed:-1]) if part in PACKAGES), "")
        if package and "tests" not in path.parts:
            return package, f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "test", ""


class Waits:
    """Counts between its creation and the end of `counting`.

    Attributes:
        found: how often, by (package, line and what).
    """

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        self.paused = False  # inside a call on host tensors alone
        self._host: dict[int, StorageWeakRef] = {}

    @contextmanager
    def counting(self) -> Iterator[Waits]:
        accelerator = type(get_accelerator())
        with (
            patch.object(accelerator, "synchronize", lambda *_: self.add("synchronize")),
            patch.object(accelerator, "FloatTensor", partial(self._made, dtype=torch.float32)),
            patch.object(accelerator, "ByteTensor", partial(self._made, dtype=torch.uint8)),
            _Calls(self),
            _Operators(self),
        ):
            yield self

    def _made(self, values: list[float], dtype: torch.dtype) -> torch.Tensor:
        self.add("upload")
        result = torch.tensor(values, dtype=dtype)
        self.mark(result, host=False)
        return result

    def add(self, what: str) -> None:
        package, line = site()
        self.found[package, f"{line}: {what}"] += 1

    def on_host(self, tensor: torch.Tensor) -> bool:
        reference = self._host.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()

    def mark(self, tensor: Any, host: bool) -> None:
        """Notes where a tensor is."""
        storage = tensor.untyped_storage()
        if host:
            self._host[storage._cdata] = StorageWeakRef(storage)
        else:
            self._host.pop(storage._cdata, None)


class _Operators(TorchDispatchMode):
    """Sees what calls become: reads of one number, results of unknown shape."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, waits = kwargs or {}, self.waits
        given = tensors((args, kwargs))
        hosts = [waits.on_host(tensor) for tensor in given]
        name = func.overloadpacket.__name__
        if given and not all(hosts) and not waits.paused:
            if name in _SHAPES or name == "_local_scalar_dense" or str(func) == "aten.repeat_interleave.Tensor":
                waits.add(name)
            elif name.startswith("index") and any(tensor.dtype == torch.bool for tensor in tensors(args[1])):
                waits.add(f"{name} by a mask")
            elif name == "copy_" and hosts[0] != hosts[1] and not (kwargs.get("non_blocking") or args[2:] == (True,)):
                waits.add("upload" if hosts[1] else "read by copy_")
            elif name != "copy_" and any(host and tensor.ndim for host, tensor in zip(hosts, given)):
                waits.add(f"{name} with a tensor on the host")
        result = func(*args, **kwargs)
        if given and all(hosts):
            for tensor in tensors(result):
                waits.mark(tensor, host=True)
        return result


class _Calls(TorchFunctionMode):
    """Sees what Python calls: where a tensor is made, and where it goes."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, waits = kwargs or {}, self.waits
        name = func.__name__
        if func is torch.Tensor.backward:
            with self:  # the hooks of parameters are to be seen, too
                return torch.autograd.backward(args[0], kwargs.get("gradient"), kwargs.get("retain_graph"))
        given = tensors((args, kwargs))
        device = [tensor for tensor in given if not waits.on_host(tensor)]
        if name == "to":
            return self._to(func, args, kwargs)
        if given and not device:
            waits.paused = True
            try:
                result = func(*args, **kwargs)
            finally:
                waits.paused = False
            for tensor in tensors(result):
                waits.mark(tensor, host=True)
            return result
        if name in _READS and device and name != "item":  # an item is also an operator
            waits.add(name)
        if name in ("__getitem__", "__setitem__") and device and has_list(args[1]):
            waits.add("upload of an index")
        if name == "cpu":
            return self._moved(func(*args, **kwargs), args[0], host=True)
        made_on = kwargs.get("device")
        if name in _FROM_VALUES and (name == "new_tensor" or not (made_on is None or is_host(made_on))):
            waits.add("upload")
        result = func(*args, **kwargs)
        if not given and (made_on is None or is_host(made_on)):
            for tensor in tensors(result):
                waits.mark(tensor, host=True)
        return result

    def _to(self, func: Callable[..., torch.Tensor], args: Any, kwargs: Any) -> torch.Tensor:
        """Tensor.to: "cpu" is the host, a torch.device is the device."""
        tensor, waits = args[0], self.waits
        was = waits.on_host(tensor)
        targets = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, (str, torch.device))]
        like = tensors(args[1:])
        host = is_host(targets[0]) if targets else waits.on_host(like[0]) if like else was
        flags = [value for value in args[2:] if isinstance(value, bool)]
        if was != host and not waits.paused and not (kwargs.get("non_blocking") or flags[:1] == [True]):
            waits.add("upload" if was else "read by to()")
        return self._moved(func(*args, **kwargs), tensor, host)

    def _moved(self, result: torch.Tensor, tensor: torch.Tensor, host: bool) -> torch.Tensor:
        if host == self.waits.on_host(tensor):
            return result
        result = result.clone() if result is tensor else result
        self.waits.mark(result, host)
        return result


def tensors(values: Any) -> list[torch.Tensor]:
    """The tensors with memory among nested values."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided]


def is_host(device: str | torch.device) -> bool:
    """Whether "cpu" means the host: in DeepSpeed's code it is the name of the accelerator."""
    return device == "cpu" and site()[0] != "deepspeed"


def has_list(index: Any) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(isinstance(part, list) for part in index))
