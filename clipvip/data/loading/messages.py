"""Messages from a worker process to its parent, with tensors in shared memory.

On Linux, large tensors of a message are written to an anonymous file in memory (memfd), whose
descriptor is sent over the socket and closed after the parent has mapped it. So they take no room
in /dev/shm, which is small in containers, and no open files, and their memory is freed with the
last tensor that uses it. Elsewhere, torch's own pickling shares tensors.
"""

import ctypes
import errno
import io
import math
import os
import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Python's own os.memfd_create is missing where Python was built for older systems.
_memory_file: Any = getattr(ctypes.CDLL(None, use_errno=True), "memfd_create", None)
CLOSE_ON_EXEC = 1
# Bytes below which a tensor is sent within the message. A small tensor that a user keeps, such as
# a batch's clip_index, would otherwise keep the memory of all tensors of its message.
SMALL = 1 << 16
ALIGNED = 64  # bytes
HEADER = 8  # bytes that give the size of the shared memory
_CLOSED_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class WorkerError(RuntimeError):
    """Workers die one after the other, or cannot pass on a result; says what to do."""


class Message(NamedTuple):
    """A pickled value. file: descriptor of the memory that holds its tensors, `size` bytes."""

    data: bytes
    file: int | None = None
    size: int = 0


def pack(value: Any) -> Message:
    """Pickle a value, with its large tensors in shared memory.

    Raises WorkerError if memory ran out, and whatever pickling raises.
    """
    if _memory_file is None:
        return Message(bytes(ForkingPickler.dumps(value)))
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    if not pickler.size:
        return Message(buffer.getvalue())
    file = None
    try:
        file = _memory_file(b"clipvip", CLOSE_ON_EXEC)
        if file < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        os.ftruncate(file, pickler.size)  # torch.from_file writes to one that is shorter
        for start, data in pickler.tensors:
            # Written, since copying into a mapping would crash when memory runs out.
            while data:
                written = os.pwrite(file, data, start)
                start, data = start + written, data[written:]
    except OSError as error:
        if file is not None and file >= 0:
            os.close(file)
        raise WorkerError(
            f"no room to pass on a result of {pickler.size / 1e6:.0f} MB ({error.strerror}); if "
            "memory ran out, use fewer workers or smaller batches"
        ) from error
    return Message(buffer.getvalue(), file, pickler.size)


def send(connection: Connection, message: Message) -> None:
    """Send the size of the shared memory, its descriptor if there is one, then the pickled data."""
    files = [] if message.file is None else [message.file]
    with _socket_of(connection) as ours:
        socket.send_fds(ours, [message.size.to_bytes(HEADER, "little")], files)
    for file in files:
        os.close(file)
    connection.send_bytes(message.data)


def receive(connection: Connection) -> Any:
    """Return the value of the next message.

    Raises EOFError or OSError if the sender is gone, WorkerError if its memory cannot be mapped.
    """
    with _socket_of(connection) as ours:
        header, files, _, _ = socket.recv_fds(ours, HEADER, 1, _CLOSED_ON_EXEC)
    if len(header) < HEADER:
        raise EOFError
    size = int.from_bytes(header, "little")
    try:
        memory = _mapped(files, size) if size else None
    finally:
        for file in files:
            os.close(file)
    return _Unpickler(io.BytesIO(connection.recv_bytes()), memory).load()


class _Pickler(ForkingPickler):
    """Keep large tensors out of the pickle; `tensors` are their bytes, and where these start."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[int, Any]] = []
        self.size = 0

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not Tensor or not value.is_cpu or value.requires_grad:
            return None
        data: Any = value.contiguous().view(-1).view(torch.uint8).numpy().data
        if len(data) < SMALL:
            return bytearray(data), value.dtype, value.shape
        start = self.size
        self.tensors.append((start, data))
        self.size += math.ceil(len(data) / ALIGNED) * ALIGNED
        return start, value.dtype, value.shape


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, memory: Tensor | None) -> None:
        super().__init__(file)
        self.memory = memory

    def persistent_load(self, pid: Any) -> Tensor:
        data, dtype, shape = pid
        if isinstance(data, bytearray):
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        else:
            assert self.memory is not None
            size = shape.numel() * dtype.itemsize
            flat = self.memory[data : data + size].view(dtype)
        return flat.view(shape)


def _mapped(files: list[int], size: int) -> Tensor:
    """Map the memory behind a descriptor: uint8 [size]."""
    try:
        if not files:  # the system drops a descriptor beyond the limit of open files
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        path = f"/proc/self/fd/{files[0]}"
        return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise WorkerError(
            f"a batch of {size / 1e6:.0f} MB cannot be received from its worker: {error}; if too "
            "many files are open, raise `ulimit -n`; if memory ran out, use smaller batches"
        ) from error


@contextmanager
def _socket_of(connection: Connection) -> Iterator[socket.socket]:
    """Borrow the socket of a connection, to pass descriptors over it."""
    ours = socket.socket(fileno=connection.fileno())
    try:
        yield ours
    finally:
        ours.detach()
