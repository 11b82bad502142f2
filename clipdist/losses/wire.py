"""Model and measure the bytes that a rank sends in one step of a loss.

W ranks with b pairs each, N = W b, D features of s bytes. Every collective counts at its optimum, which the ring
algorithms of gloo and NCCL reach:

    all-gather of p bytes per rank                     (W - 1) p
    reduce-scatter (or all-to-all) of n bytes          (W - 1) / W n
    all-reduce of a bytes                              2 (W - 1) / W a

The all-reduce of parameter gradients belongs to the engine and is not counted.
"""

from __future__ import annotations

import os
import socket
import stat
import struct

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
AGREEMENT_BYTES = 7 * 8  # per rank: shape, dtype, texts per image, the numbers of rows not finite and of valid ones
ROW_BYTES = 2 * 8  # per pair: group id, valid

# Fields of struct tcp_info in linux/tcp.h, by their offsets.
_NOTSENT_BYTES = struct.Struct("=144xI")
_BYTES_SENT = struct.Struct("=200xQQ")  # and bytes retransmitted


def clipdist_bytes(op: str, world: int, b: int, width: int, dtype: str, texts: int = 1) -> float:
    """Return the bytes that info_nce (op "infonce") or sigmoid_loss (op "sigmoid") sends per rank and step.

    (W-1) b D s            all-gather of the text features
    (W-1) b D s            reduce-scatter of their gradients in the features' dtype
    (W-1) (16 b + 56)      group ids and validity; shapes
    2 (W-1)/W 4 (N+1)      column sums in fp32: only infonce
    2 (W-1)/W 4            the largest gradient, by which fp16 is scaled: only fp16

    Args:
        world: W.  b: pairs per rank.  width: D.
        dtype: of the features, a key of BYTES.
        texts: of an image; with several, b and N above count texts, and 4 b of the own pairs' logits are not sent.
    """
    per_text = 2 * width * BYTES[dtype] + ROW_BYTES + 4 * (op == "infonce" and texts == 1)
    b *= texts
    reduced = 4 * (world * b + 1) * (op == "infonce") + 4 * (dtype == "fp16")
    return (world - 1) * (per_text * b + AGREEMENT_BYTES) + 2 * (world - 1) / world * reduced


def distill_bytes(world: int, b: int, width: int, teacher_width: int, dtype: str) -> float:
    """Return the bytes that distill_logits sends per rank and step: those of a sigmoid loss, and

    (W-1) b E s            all-gather of the teacher's text features
    2 (W-1)/W 32 N         columns' largest logits and sums, in float64, of student and teacher

    Args:
        teacher_width: E.  The others: see clipdist_bytes.
    """
    teacher = (world - 1) * b * teacher_width * BYTES[dtype]
    return clipdist_bytes("sigmoid", world, b, width, dtype) + teacher + 2 * (world - 1) / world * 32 * world * b


def reduced_bytes(world: int, size: int) -> float:
    """Return the bytes that a rank sends in an all-reduce of `size` bytes."""
    return 2 * (world - 1) / world * size


def nt_xent_bytes(world: int, b: int, width: int, dtype: str) -> float:
    """Return the bytes that nt_xent sends per rank and step where all rows are valid.

    (W-1) 2 b (D s + 4)    all-gathers of both views' features, and of their sums in fp32
    (W-1) 56               shapes

    Arguments: see clipdist_bytes; b counts samples.
    """
    return (world - 1) * (2 * b * (width * BYTES[dtype] + 4) + AGREEMENT_BYTES)


def contrast_bytes(world: int, b: int, width: int, dtype: str) -> float:
    """Return the bytes that contrast_batch sends per rank and call: keys and their validity, and shapes.

    Arguments: see nt_xent_bytes.
    """
    return (world - 1) * (b * (width * BYTES[dtype] + 1) + AGREEMENT_BYTES)


def koleo_bytes(world: int, b: int, width: int, dtype: str, group: int) -> float:
    """Return the bytes that koleo sends per rank and call: validity and shapes; features and neighbours, too, where a
    group of so many rows (0: all) spans ranks.

    Other arguments: see nt_xent_bytes.
    """
    spans = group == 0 or b % group
    return (world - 1) * (b * (1 + (width * BYTES[dtype] + 8 if spans else 0)) + AGREEMENT_BYTES)


def open_clip_bytes(op: str, world: int, b: int, width: int, dtype: str) -> float:
    """Return the bytes that open_clip 3.3 sends per rank and step in its exact modes. Arguments: see clipdist_bytes.

    infonce   4 (W-1) b D s    ClipLoss with gather_with_grad: both features gathered, both gradients scattered
    sigmoid   2 (W-1) b D s    SigLipLoss: every block of texts visits every rank, and its gradient returns
    """
    return (4 if op == "infonce" else 2) * (world - 1) * b * width * BYTES[dtype]


def written_bytes() -> int:
    """Return the total bytes that this process has written to its open TCP connections, without retransmissions.

    The difference of two calls is what was sent between them. Needs Linux 4.19 or newer.

    Raises:
        OSError: the kernel does not count them.
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
    """Return the bytes written to one file descriptor, 0 if it is no TCP connection, and close it."""
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
