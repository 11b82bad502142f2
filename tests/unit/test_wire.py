"""The model of a loss' traffic against numbers worked out by hand, and the count of bytes against a known transfer."""

from __future__ import annotations

import socket

import pytest

from clipdist.losses.wire import clipdist_bytes, nt_xent_bytes, open_clip_bytes, written_bytes


@pytest.mark.parametrize(
    ("op", "world", "b", "width", "dtype", "ours", "theirs"),
    [
        # one other rank, to which 2 * 4 * 3 * 4 of features and their gradients, 4 * 16 of rows and 56 go;
        # infonce: 4 * 4 of own logits, and an all-reduce of 9 floats, which costs what it holds at W=2
        ("sigmoid", 2, 4, 3, "fp32", 96 + 64 + 56, 96),
        ("infonce", 2, 4, 3, "fp32", 96 + 64 + 56 + 16 + 36, 192),
        # half the bytes per feature; fp16 adds the all-reduce of one float
        ("sigmoid", 2, 4, 3, "bf16", 48 + 64 + 56, 48),
        ("sigmoid", 2, 4, 3, "fp16", 48 + 64 + 56 + 4, 48),
        # three others; the all-reduce of 17 floats: 2 * 3/4 * 68
        ("infonce", 4, 4, 3, "fp32", 3 * (96 + 64 + 56 + 16) + 102, 576),
        # features of 1024 bytes: ours is half of open_clip's but for 28 bytes a pair
        ("infonce", 64, 512, 512, "bf16", 63 * (512 * (2048 + 16 + 4) + 56) + 2 * 63 / 64 * 4 * 32769, 63 * 512 * 4096),
    ],
)
def test_the_model_is_what_one_counts_by_hand(op, world, b, width, dtype, ours, theirs):
    assert clipdist_bytes(op, world, b, width, dtype) == pytest.approx(ours, rel=1e-12)
    assert open_clip_bytes(op, world, b, width, dtype) == theirs


def test_nt_xent_sends_no_gradients():
    assert nt_xent_bytes(2, 4, 3, "fp32") == 8 * 3 * 4 + 8 * 4 + 56
    assert nt_xent_bytes(4, 4, 3, "bf16") == 3 * (8 * 3 * 2 + 8 * 4 + 56)


@pytest.mark.parametrize("world", [2, 3, 8, 512, 4096])
def test_half_of_open_clips_traffic_at_every_world_size(world):
    ours = clipdist_bytes("infonce", world, 256, 512, "bf16")
    assert 0.5 < ours / open_clip_bytes("infonce", world, 256, 512, "bf16") < 0.51


def test_one_rank_sends_nothing():
    assert clipdist_bytes("infonce", 1, 64, 32, "fp16") == open_clip_bytes("infonce", 1, 64, 32, "fp16") == 0


def test_written_bytes_counts_what_a_connection_was_given():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            before = written_bytes()
            client.sendall(bytes(12_345))
            left = 12_345
            while left:
                left -= len(accepted.recv(left))
            accepted.sendall(bytes(55))  # the other end is of this process too
            assert written_bytes() - before == 12_400


def test_written_bytes_leaves_connections_as_they_are():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            for _ in range(3):
                written_bytes()
            client.sendall(b"still open")
            assert accepted.recv(10) == b"still open"
