"""A device without data: real code runs on it at real sizes, and what it would have done is counted.

Tensors of the device are fake (``FakeTensorMode``: shapes, strides, dtypes and storages, no numbers). Those on the CPU
are real. A ``TorchDispatchMode`` above sees every operation. PyTorch needs neither a card nor a build for it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from wan_core import kernels, mapped

from .tally import Cost, Tally, cost_of, tensors_in, touched

aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_READS_A_NUMBER = (aten._local_scalar_dense.default, aten.equal.default)
_TO_COPY, _COPY_ = aten._to_copy.default, aten.copy_.default
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
_PIN = (aten._pin_memory.default, aten.pin_memory.default)
FLASH_HEAD = 256  # numbers in a head, at most, for a flash kernel


class _Fake(FakeTensorMode):
    _inside = threading.local()

    @property
    def in_kernel_invocation(self) -> bool:
        """Whether tensors say that they are on the meta device: of each thread by itself, for others compute too."""
        return getattr(self._inside, "now", False)

    @in_kernel_invocation.setter
    def in_kernel_invocation(self, value: bool) -> None:
        self._inside.now = value

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to guard against a compiler that is not in use, PyTorch would import it: seconds

    @property
    def avoid_device_init(self) -> bool:
        return True  # whatever ``torch.cuda.is_available`` is made to say

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.dispatch(function, types, args, kwargs or {})


class Machine(TorchDispatchMode):
    """The device ``cuda:0``, or another kind's; inside ``running()`` what is asked of it is counted in ``tally``.

    Any other kind has neither float64 nor complex numbers, as Apple's MPS. PyTorch lets only its place for other
    backends be played, see ``play_other_kind``.

    Args:
        total: bytes of its memory. More is an ``OutOfMemoryError``, as on a real one.
        claims: bytes that it says it has, where that is another number.
        capability: the compute capability that a CUDA device names.
        kernels: whether the pack's own kernels are to be had, as where Triton is installed.
    """

    def __init__(
        self,
        total: float = 80e9,
        *,
        kind: str = "cuda",
        capability: tuple[int, int] = (9, 0),
        kernels: bool = True,
        claims: float | None = None,
    ):
        super().__init__()
        self.kernels = kernels and kind == "cuda"
        self.device = torch.device(kind, 0)
        self.total, self.capability = int(total), capability
        self.claims = int(claims or total)
        self.fake = _Fake(allow_non_fake_inputs=True)
        self.tally = Tally(self.total)
        self._pinned: dict[int, int] = {}
        self._known: dict[tuple, tuple] = {}
        self._lock = threading.RLock()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @contextmanager
    def running(self) -> Iterator[Tally]:
        """The time in which the device is there, for this thread and those that it starts."""
        with ExitStack() as stack:
            stack.enter_context(self.fake)  # first: it asks whether there is a real card, and stands in for its guard
            for patch in _patches(self):
                stack.enter_context(patch)
            stack.enter_context(self)
            yield self.tally

    @contextmanager
    def in_thread(self) -> Iterator[None]:
        """Modes belong to a thread: this brings them to another."""
        torch._C._set_only_lift_cpu_tensors(True)
        _push_mode(self.fake)
        _push_mode(self)
        try:
            yield
        finally:
            _pop_mode()
            _pop_mode(torch._C._TorchDispatchModeKey.FAKE)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = kwargs or {}
        given = tensors_in(args, kwargs)
        asked = kwargs.get("device")
        on_device = any(isinstance(one, FakeTensor) for one in given)
        if not on_device and (asked is None or asked.type in ("cpu", "meta")):
            return self._on_the_host(function, args, kwargs)
        if _is_composite(function):  # as in inference mode, where nothing takes them apart before
            with self:
                return function.decompose(*args, **kwargs)
        with self._lock:
            return self._on_the_device(function, args, kwargs, given)

    def _on_the_host(self, function, args, kwargs):
        pin = kwargs.get("pin_memory") or function in _PIN
        if "pin_memory" in kwargs:
            kwargs = kwargs | {"pin_memory": False}
        with unset_fake_temporarily():
            out = args[0].clone() if function in _PIN else function(*args, **kwargs)
        if pin:
            self._pinned[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes()
        return out

    def _on_the_device(self, function, args, kwargs, given: list[Tensor]):
        self._refuse_what_it_lacks(given, kwargs)
        if function in _READS_A_NUMBER:
            self.tally.synchronised("reads a number")
            return _a_number(given[0].dtype)
        if function is _TO_COPY and _asks_for(kwargs, "cpu"):
            self.tally.downloaded(given[0])
            return _read_back(given[0], kwargs.get("dtype"))
        if function is _TO_COPY and not isinstance(args[0], FakeTensor):
            return self._upload(args[0], kwargs.get("dtype") or args[0].dtype)
        if function is _COPY_ and isinstance(args[1], FakeTensor) != isinstance(args[0], FakeTensor):
            return self._copy_across(*args)
        for index in given[1:] if function in _INDEXED else ():
            if not isinstance(index, FakeTensor):
                self.tally.uploaded(index, pinned=False)
        return self._computed(function, args, kwargs, given)

    def _computed(self, function, args, kwargs, given: list[Tensor]):
        """The operation by ``FakeTensorMode``, or as it was with such arguments before: that is many times faster."""
        key = (function, _described(args), _described(kwargs.values()), tuple(kwargs))
        if (known := self._known.get(key)) is not None:
            results, cost = known
            out = self._again(results, given)
        else:
            out = function(*args, **kwargs)
            cost = cost_of(function, args, kwargs, given, out)
            results = _results(out, given)
            if results is not None:
                self._known[key] = results, cost
        if cost is not None:
            self.tally.computed(cost, tensors_in((out,), {}))
        return out

    def _again(self, results: list | _Result, given: list[Tensor]):
        if isinstance(results, list):
            return [self._again(one, given) for one in results]
        if results.of is not None and results.shape is None:
            return given[results.of]
        with no_dispatch():
            if results.of is None:
                bare = torch.empty_strided(results.shape, results.stride, dtype=results.dtype, device="meta")
                return FakeTensor(self.fake, bare, self.device)
        with in_kernel_invocation_manager(self.fake), no_dispatch():
            bare = torch.as_strided(given[results.of], results.shape, results.stride, results.offset)
        return FakeTensor(self.fake, bare, self.device)

    def _upload(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        made = aten.empty_strided.default(source.shape, _kept_stride(source), dtype=dtype, device=self.device)
        self.tally.uploaded(source, pinned=self._is_pinned(source))
        self.tally.made(made)
        return made

    def _copy_across(self, place: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        torch.broadcast_shapes(place.shape, source.shape)
        if isinstance(place, FakeTensor):
            self.tally.uploaded(source, pinned=self._is_pinned(source))
            return place
        self.tally.downloaded(source, waits=not (non_blocking and self._is_pinned(place)))
        with unset_fake_temporarily():
            place.fill_(_a_number(source.dtype))
        return place

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _refuse_what_it_lacks(self, given: list[Tensor], kwargs: dict) -> None:
        kind = self.device.type
        if kind == "cuda":
            return
        asked = kwargs.get("dtype") if kwargs.get("device") is None or kwargs["device"].type == kind else None
        kinds = {one.dtype for one in given if isinstance(one, FakeTensor)} | ({asked} if asked else set())
        if kinds & {torch.float64, torch.complex64, torch.complex128}:
            raise TypeError(f"{kind} has neither float64 nor complex numbers: a rehearsal")


@cache
def _is_composite(function) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")


def play_other_kind() -> str:
    """Register a device without a backend, once and for the whole process; returns its kind."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend()
    return "privateuseone"


@dataclass(frozen=True)
class _Result:
    """What an operation answers: the ``of``-th of the tensors given, a view of it, or (None) a new one."""

    of: int | None
    shape: torch.Size | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype | None = None


def _results(out: object, given: list[Tensor]) -> list | _Result | None:
    """None if it is not to be had again in this way."""
    if isinstance(out, (list, tuple)):
        found = [_results(one, given) for one in out]
        return None if None in found else found
    if not isinstance(out, FakeTensor) or out.fake_device.type == "cpu":
        return None
    for i, one in enumerate(given):
        if out is one:
            return _Result(i)
        if isinstance(one, FakeTensor) and out.untyped_storage() is one.untyped_storage():
            same = out.dtype == one.dtype
            return _Result(i, out.shape, out.stride(), out.storage_offset(), out.dtype) if same else None
    return _Result(None, out.shape, out.stride(), 0, out.dtype)


def _described(values: Iterable) -> tuple:
    """What decides the answer to some arguments."""
    return tuple(
        (one.shape, one.stride(), one.storage_offset(), one.dtype, isinstance(one, FakeTensor))
        if isinstance(one, Tensor)
        else _described(one)
        if isinstance(one, (list, tuple))
        else (type(one), one)
        for one in values
    )


def _asks_for(kwargs: dict, kind: str) -> bool:
    return kwargs.get("device") is not None and kwargs["device"].type == kind


def _a_number(dtype: torch.dtype) -> bool | int | float:
    """What is read from the device: yes to a question, such as whether all is finite; else one."""
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _read_back(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy on the host: zeros, but yes to a question."""
    with unset_fake_temporarily():
        made = torch.full(tensor.shape, tensor.dtype == torch.bool, dtype=dtype or tensor.dtype)
        return made.as_strided(tensor.shape, _kept_stride(tensor))


def _kept_stride(tensor: Tensor) -> tuple[int, ...]:
    """The order in memory that a copy has: the tensor's own, unless it has gaps."""
    with no_dispatch():
        return torch.empty_like(torch.empty_strided(tensor.shape, tensor.stride(), device="meta")).stride()


def attention(machine: Machine) -> Callable[..., Tensor]:
    """``scaled_dot_product_attention`` as a card would have it: one kernel, where a CPU takes many products."""
    plain = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        if not isinstance(query, FakeTensor):
            return plain(query, key, value, *args, **kwargs)
        assert not args and not kwargs, "only plain attention is rehearsed"
        if query.dtype != torch.float32 and query.shape[-1] <= FLASH_HEAD:
            return aten._scaled_dot_product_flash_attention.default(query, key, value)[0]
        return aten._scaled_dot_product_efficient_attention.default(query, key, value, None, False)[0]

    return attend


# The pack's own kernels: which of their arguments they write, and whether they read those too.
_OWN_KERNELS = {
    "layer_norm": ((4,), False),
    "rms_norm_": ((0,), True),
    "add_gated_": ((0,), True),
    "quantise_rows": ((1, 2), False),
    "rescale": ((0,), False),
}


def own_kernels(tally: Tally) -> SimpleNamespace:
    """In the place of ``wan_core.kernels.rows``: each a single pass over what it is given."""

    def stand_in(name: str, places: tuple[int, ...], reads_them: bool) -> Callable[..., None]:
        def launch(*args) -> None:
            written = [args[i] for i in places]
            read = [one for i, one in enumerate(args) if isinstance(one, Tensor) and (reads_them or i not in places)]
            assert all(isinstance(one, FakeTensor) for one in (*read, *written)), f"{name} gets a tensor of the host"
            tally.computed(Cost(name, sum(map(touched, read)), sum(map(touched, written))), [])

        return launch

    return SimpleNamespace(**{name: stand_in(name, *how) for name, how in _OWN_KERNELS.items()})


class _Stream:
    """Order is not rehearsed: whatever runs has run."""

    def __init__(self, tally: Tally):
        self._tally = tally

    def wait_event(self, event: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def record_event(self, event: object = None) -> object:
        return event or _Event(self._tally)

    def synchronize(self) -> None:
        self._tally.synchronised("waits for a stream")


class _Event:
    def __init__(self, tally: Tally):
        self._tally = tally
        self._recorded = 0

    def record(self, stream: object = None) -> None:
        self._recorded = self._tally.launched

    def query(self) -> bool:
        """Never, before it is waited for: the slowest of devices."""
        return False

    def synchronize(self) -> None:
        self._tally.synchronised("waits for an event", behind=self._tally.launched > self._recorded)


def _patches(machine: Machine) -> Iterator[mock._patch]:
    """What PyTorch and the pack ask of a device beside operations."""
    tally = machine.tally
    here = machine.device.type == "cuda"
    answers = {
        "is_available": lambda: here,
        "current_device": lambda: 0,
        "device_count": lambda: int(here),
        "get_device_capability": lambda device=None: machine.capability,
        "get_device_properties": lambda device=None: SimpleNamespace(total_memory=machine.claims, name="rehearsal"),
        "get_device_name": lambda device=None: "rehearsal",
        "mem_get_info": lambda device=None: (machine.claims - tally.live.now, machine.claims),
        "memory_reserved": lambda device=None: tally.live.now,
        "memory_allocated": lambda device=None: tally.live.now,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: tally.synchronised("waits for the device"),
        "Stream": lambda *args, **kwargs: _Stream(tally),
        "Event": lambda *args, **kwargs: _Event(tally),
        "current_stream": lambda device=None: _Stream(tally),
        "stream": lambda stream: nullcontext(),
    }
    for name, answer in answers.items():
        yield mock.patch.object(torch.cuda, name, answer)
    yield mock.patch.object(kernels, "available", lambda device: machine.kernels and device.type == "cuda")
    yield mock.patch.dict(sys.modules, {"wan_core.kernels.rows": own_kernels(tally)})
    yield mock.patch.object(kernels, "rows", own_kernels(tally), create=True)
    yield mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None)
    yield mock.patch.object(F, "scaled_dot_product_attention", attention(machine))
    yield mock.patch.object(FakeTensor, "tolist", lambda self: self.cpu().tolist())  # one copy, not one a number
    yield mock.patch.object(mapped._Source, "read", lambda self, place: None)  # zeros, or whatever lay there
    yield mock.patch.object(threading.Thread, "run", _inside(machine, threading.Thread.run))


def _inside(machine: Machine, run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    def run_inside(thread: threading.Thread) -> None:
        target = getattr(thread, "_target", None)
        outlives = target is not None and target.__module__.startswith("concurrent.")  # a pool's, and reads files
        with nullcontext() if outlives else machine.in_thread():
            run(thread)

    return run_inside
