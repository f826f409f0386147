"""Tensors that end where memory ends: who reads or writes an element too far is killed."""

from __future__ import annotations

import ctypes
import mmap
import weakref

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
PAGE = mmap.PAGESIZE


def guarded(t: Tensor) -> Tensor:
    """A contiguous copy of `t` whose last byte is the last before a page that nobody may touch."""
    size = t.numel() * t.element_size()
    if size == 0:
        return t.contiguous()
    room = -(-size // PAGE) * PAGE
    access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _libc.mmap(None, room + PAGE, access, kind, -1, 0)
    if start in (None, ctypes.c_void_p(-1).value) or _libc.mprotect(start + room, PAGE, 0):
        raise OSError(ctypes.get_errno(), "no guarded memory")
    memory = (ctypes.c_char * size).from_address(start + room - size)
    weakref.finalize(memory, _libc.munmap, start, room + PAGE)  # the tensor keeps `memory`
    return torch.frombuffer(memory, dtype=t.dtype).view(t.shape).copy_(t)
