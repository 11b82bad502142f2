"""What a step of a loss puts on the wire: world size and batch in, bytes that a rank sends out; modelled and measured.

W ranks with b pairs each, N = W b, D features of s bytes. Every collective is taken at its optimum, which rings reach:

    all-gather of a part of p bytes per rank           (W - 1) p
    sum of N rows, a W-th of them left to each rank    (W - 1) / W of its input: a reduce-scatter, or an all-to-all
    all-reduce of a bytes                              2 (W - 1) / W a

It holds for gloo and for NCCL's rings. Gradients of parameters are the engine's, and are not counted.
"""

from __future__ import annotations

import os
import socket
import stat
import struct

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
AGREEMENT_BYTES = 5 * 8  # per rank: shape, dtype and the number of rows that are not finite
ROW_BYTES = 2 * 8  # per pair: group id, valid

# struct tcp_info of linux/tcp.h: where what this program needs lies in it
_NOTSENT_BYTES = struct.Struct("=144xI")
_BYTES_SENT = struct.Struct("=200xQQ")  # and how much of it was sent again


def clipdist_bytes(op: str, world: int, b: int, width: int, dtype: str) -> float:
    """Sent per rank and step by clipdist.losses: info_nce (op infonce) or sigmoid_loss (op sigmoid).

    (W-1) b D s            the text features, gathered
    (W-1) b D s            their gradient, summed and scattered in the features' dtype
    (W-1) (16 b + 40)      group ids and validity; shapes
    2 (W-1)/W 4 (N+1)      column sums in fp32: infonce alone
    2 (W-1)/W 4            the largest gradient, by which fp16 is scaled: fp16 alone
    """
    per_pair = 2 * width * BYTES[dtype] + ROW_BYTES + 4 * (op == "infonce")
    reduced = 4 * (world * b + 1) * (op == "infonce") + 4 * (dtype == "fp16")
    return (world - 1) * (per_pair * b + AGREEMENT_BYTES) + 2 * (world - 1) / world * reduced


def open_clip_bytes(op: str, world: int, b: int, width: int, dtype: str) -> float:
    """Sent per rank and step by open_clip 3.3 in its exact modes, in the features' dtype.

    infonce   4 (W-1) b D s    ClipLoss with gather_with_grad: both sides gathered, both gradients scattered
    sigmoid   2 (W-1) b D s    SigLipLoss: every text block passes by once, and its gradient comes back
    """
    return (4 if op == "infonce" else 2) * (world - 1) * b * width * BYTES[dtype]


def written_bytes() -> int:
    """Bytes that this process has handed to its open TCP connections, in total: what is sent once, and what waits.

    The difference of two calls is what was sent between them. Linux (4.19 and newer).
    """
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            fd = os.dup(int(name))
        except OSError:  # the descriptor of the listing itself
            continue
        total += _written(fd)
    return total


def _written(fd: int) -> int:
    """Bytes of one descriptor, which is closed; 0 of one that is no TCP connection."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        os.close(fd)
        return 0
    with socket.socket(fileno=fd) as connection:
        try:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            return 0
    if len(info) < _BYTES_SENT.size:
        raise OSError("this kernel does not count the bytes of a connection")
    sent, again = _BYTES_SENT.unpack_from(info)
    return sent - again + _NOTSENT_BYTES.unpack_from(info)[0]
