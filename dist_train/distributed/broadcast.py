"""An object as the bytes of a broadcast. CPU tensors and numpy arrays are sent from where they lie, not copied."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# One broadcast carries a small object whole: its size, the sizes of its buffers and its pickle.
_PACKET_BYTES = 1024
_CHUNK_BYTES = 1 << 26
_HEAD = struct.Struct("<qq")  # bytes of the message, number of buffers

Broadcast = Callable[[Tensor], None]
"""Sends a contiguous uint8 tensor on the CPU from rank 0, or fills it with what rank 0 sends."""


class Packed:
    """An object ready to be sent: `message` is its pickle with the sizes of `buffers`, which are sent after it."""

    def __init__(self, value: object) -> None:
        self.buffers: list[Tensor] = []
        stream = io.BytesIO()
        _Pickler(stream, protocol=5, buffer_callback=self._keep).dump(value)
        sizes = [len(buffer) for buffer in self.buffers]
        self.message = bytearray(_HEAD.size + 8 * len(sizes) + stream.tell())
        struct.pack_into(f"<qq{len(sizes)}q", self.message, 0, len(self.message), len(sizes), *sizes)
        self.message[-stream.tell() :] = stream.getbuffer()

    def _keep(self, buffer: pickle.PickleBuffer) -> None:
        raw = buffer.raw()
        if raw.readonly:
            raw = memoryview(bytearray(raw))  # torch takes no memory that must not be written
        self.buffers.append(_as_tensor(raw))

    def send(self, broadcast: Broadcast) -> None:
        """Send it from rank 0."""
        message = _as_tensor(memoryview(self.message))
        packet = torch.zeros(_PACKET_BYTES, dtype=torch.uint8)
        packet[: len(message)] = message[:_PACKET_BYTES]
        broadcast(packet)
        for part in (message[_PACKET_BYTES:], *self.buffers):
            _in_chunks(part, broadcast)


def receive(broadcast: Broadcast) -> Any:
    """The object that rank 0 sends. Memory: the object, and no copy of its tensors and arrays."""
    packet = torch.empty(_PACKET_BYTES, dtype=torch.uint8)
    broadcast(packet)
    num_bytes, num_buffers = _HEAD.unpack_from(packet.numpy().data)
    data = bytearray(num_bytes)
    message = _as_tensor(memoryview(data))
    message[:_PACKET_BYTES] = packet[:num_bytes]
    _in_chunks(message[_PACKET_BYTES:], broadcast)
    sizes = struct.unpack_from(f"<{num_buffers}q", data, _HEAD.size)
    buffers = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    for buffer in buffers:
        _in_chunks(buffer, broadcast)
    pickled = memoryview(data)[_HEAD.size + 8 * num_buffers :]
    return pickle.loads(pickled, buffers=[buffer.numpy() for buffer in buffers])


class _Pickler(pickle.Pickler):
    """Hands the memory of tensors to `buffer_callback`, as numpy does with that of arrays."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not Tensor or obj.device.type != "cpu" or obj.layout != torch.strided:
            return NotImplemented
        if obj.requires_grad or obj.is_conj() or obj.is_neg() or obj.is_quantized:
            return NotImplemented
        memory = obj.contiguous().view(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(memory.data), obj.dtype, tuple(obj.shape))


def _tensor(memory: Any, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return _as_tensor(memory).view(dtype).view(shape)


def _as_tensor(memory: Any) -> Tensor:
    """uint8 tensor over the memory, which stays alive with it; torch.frombuffer refuses memory of no bytes."""
    return torch.frombuffer(memory, dtype=torch.uint8) if len(memory) else torch.empty(0, dtype=torch.uint8)


def _in_chunks(buffer: Tensor, broadcast: Broadcast) -> None:
    for start in range(0, len(buffer), _CHUNK_BYTES):
        broadcast(buffer[start : start + _CHUNK_BYTES])
