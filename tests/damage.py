"""Make damaged samples, shards and index files, with the results that are allowed for each.

A mutation depends only on the random generator of its case, which is seeded by seed and number: case "3/17" is always
the same.
"""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

Members = dict[str, bytes]
VALID = ""  # among outcomes: the sample is used
PICTURE = {"not an image", "truncated image"}
SIDE = 48
BLOCK = 512
DAMAGED_ID = np.array([2**30], dtype="<i4").tobytes()


@dataclass(frozen=True)
class Case:
    """One sample as it goes into a shard.

    Attributes:
        name: of the mutation.
        outcomes: the reasons by which it may be reported; VALID: it may also be used.
        original: the members before the mutation.
        same: where it is used, its picture must be that of the original.
    """

    name: str
    members: Members
    outcomes: frozenset[str]
    original: Members
    same: bool


@lru_cache(maxsize=1)
def pictures() -> list[tuple[str, bytes]]:
    """(kind, bytes) of a few pictures in all formats that training takes."""
    made = []
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        for kind, options in (
            ("jpeg", {"quality": 90}),
            ("jpeg", {"progressive": True}),
            ("png", {}),
            ("webp", {}),
            ("webp", {"lossless": True}),
            ("gif", {}),
            ("bmp", {}),
        ):
            file = io.BytesIO()
            image.save(file, kind, **options)
            made.append((kind.replace("jpeg", "jpg"), file.getvalue()))
    return made


def sample(rng: random.Random, ids_kind: str = "") -> Members:
    """An undamaged sample: a picture, a caption, the record, and perhaps token ids of `ids_kind`."""
    kind, picture = rng.choice(pictures())
    captions = [f"a {rng.choice(('red', 'blue'))} thing no. {rng.randrange(10**6)}", "the other caption"]
    record = {"captions": captions, "width": SIDE, "height": SIDE}
    members = {kind: picture, "txt": captions[0].encode(), "json": json.dumps(record).encode()}
    return members | ({ids_kind: np.zeros((2, 16), dtype="<i4").tobytes()} if ids_kind else {})


def picture_kind(members: Members) -> str:
    return next(iter(members))


# --- mutations of a sample: return the changed members and the allowed outcomes


def truncated(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    kind = picture_kind(members)
    data = members[kind]
    return {**members, kind: data[: rng.randrange(1, len(data))]}, PICTURE | {VALID}


def flipped(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    kind = picture_kind(members)
    data = bytearray(members[kind])
    for _ in range(rng.choice((1, 1, 2, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return {**members, kind: bytes(data)}, PICTURE | {VALID, "too many pixels"}


def header_flipped(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    kind = picture_kind(members)
    data = bytearray(members[kind])
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(40)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return {**members, kind: bytes(data)}, PICTURE | {VALID, "too many pixels"}


def overwritten(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    kind = picture_kind(members)
    data = bytearray(members[kind])
    first = rng.randrange(len(data))
    length = min(len(data) - first, rng.choice((1, 16, 512)))
    data[first : first + length] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return {**members, kind: bytes(data)}, PICTURE | {VALID, "too many pixels"}


def spliced(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    """Garbage in the middle of a picture, or another picture's tail."""
    kind = picture_kind(members)
    data, other = members[kind], rng.choice(pictures())[1]
    cut = rng.randrange(len(data))
    tail = rng.choice((rng.randbytes(64) + data[cut:], other[cut:], data[cut:] * 2))
    return {**members, kind: data[:cut] + tail}, PICTURE | {VALID, "too many pixels"}


def garbage(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    start = rng.choice((b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"BM", b"%!PS", b"II*\0"))
    data = rng.choice((start + rng.randbytes(rng.randrange(1, 800)), start + bytes(300)))
    return {**members, picture_kind(members): data}, PICTURE | {"too many pixels"}


def lfs_pointer(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    return {**members, picture_kind(members): b"version https://git-lfs.github.com/spec/v1\n"}, {"not an image"}


def wrong_extension(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    kind = rng.choice(("jpg", "jpeg", "png", "webp", "gif", "bmp"))
    return {kind: members[picture_kind(members)], **_texts(members)}, {VALID}


def swapped_members(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    kind = picture_kind(members)
    other = rng.choice(("txt", "json"))
    changed = {**members, kind: members[other], other: members[kind]}
    return changed, {"not JSON" if other == "json" else "not an image"}  # captions are looked for first


def no_picture(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    kind = picture_kind(members)
    return rng.choice((_texts(members), {**members, kind: b""})), {"missing image"}


def no_caption(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    kind = picture_kind(members)
    picture, blank = {kind: members[kind]}, rng.choice((b"", b" \n\t", "\u3000\u2003".encode()))
    record = rng.choice((b"", b"{}", b'{"captions": []}', b'{"captions": ["", "  "]}', b'{"captions": [null, 1, {}]}'))
    made = rng.choice(
        ({**picture, "txt": blank}, {**picture, "json": record}, {**picture, "txt": blank, "json": record})
    )
    return rng.choice((made, picture)), {"missing caption"}


def broken_json(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    text = rng.choice(
        (
            members["json"][:-1],
            members["json"][: rng.randrange(1, 30)],
            members["json"] + b"}",
            b"[" * rng.choice((10, 100_000)),
            b'{"a":' * rng.choice((10, 100_000)),
            b"[" * 100_000 + b"]" * 100_000,
            b'{"captions": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
            b"[]",
            b"null",
            b'"text"',
            b"1",
            b"9" * 5000,
            b'{"a": ' + b"9" * 5000 + b"}",
            b'{"captions": ["a\xff dog"]}',
            b"\xff\xfe\x00",
            b"\x00" * 64,
            b'{"captions": ["a\nb"]}',
            b"\x80" + members["json"],
        )
    )
    return {**members, "json": text}, {"not JSON"}


def odd_json(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    """Records that are no damage; where "captions" holds no text, the captions are taken from the .txt."""
    text = rng.choice(
        (
            b'{"captions": "one"}',
            b'{"captions": {}}',
            b'{"captions": 1e999}',
            b'{"captions": [NaN, [[]], {"a": 1}]}',
            b'{"captions": ["x"], "captions": null}',
            b'{"caption": "x"}',
            b"",
        )
    )
    return {**members, "json": text}, {VALID}


def wrong_utf8(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    text = rng.choice(
        (b"a \xff dog", b"\xc3", b"caf\xe9", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xff\xfea\0", b"\xc0\xaf")
    )
    return {picture_kind(members): members[picture_kind(members)], "txt": text}, {"caption not UTF-8"}


def half_surrogate(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    text = rng.choice((b'"a \\ud800 dog"', b'"\\udc00"', b'"\\udfff\\ud800"'))
    return {**members, "json": b'{"captions": [' + text + b"]}"}, {"caption not UTF-8"}


def unicode_caption(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    caption = rng.choice(
        (
            "ein Hündchen läuft über die Straße",
            "一只狗在跑",
            "كلب يركض",
            "🐕‍🦺 runs 👨‍👩‍👧‍👦",
            "e\u0301" * 40,
            "\u202edog a\u202c \u200b\ufeff",
            "a\0dog\0",
            "&lt;b&gt; &amp;amp; &#0; &#55296; &#x110000;",
            "<start_of_text> a dog <end_of_text>",
            "\ufffd\uffff\U0010ffff",
            "a\x1b[31m dog\x07\x7f",
            "ﬁ ﷺ " * 30,
            "a " * 5000,
            "Z̸̢̧" * 50,
            "'" * 300,
        )
    )
    record = json.dumps({"captions": [caption]}, ensure_ascii=rng.random() < 0.5).encode()
    return {**members, "txt": caption.encode(), "json": record}, {VALID}


def foreign_members(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    """Members that are nobody's business, pickles and programs among them."""
    kind = rng.choice(("pkl", "pyd", "pth", "npy", "sh", "exe", "0123456789abcdef.ids", "cls", "txt.gz"))
    return {**members, kind: rng.choice((pickle_bomb(), rng.randbytes(40), b""))}, {VALID}


def broken_ids(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    """Token ids that lie outside every vocabulary, or of another size: the caption is tokenised anew."""
    kind = next((kind for kind in members if kind.endswith(".ids")), "")
    if not kind:
        return members, {VALID}
    data = rng.choice((DAMAGED_ID * 32, b"\xff" * 128, rng.randbytes(127), b"", bytes(64), b"\0\0\0\x80" * 32))
    return {**members, kind: data}, {VALID}


def bomb(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    """A picture of a few bytes that says it is enormous."""
    w, h = rng.choice(
        ((60_000, 60_000), (65_500, 16_000), (1 << 20, 1 << 10), (16_383, 16_383), (2**31 - 1, 2**31 - 1))
    )
    kind, make = rng.choice(tuple(_BOMBS.items()))
    return {kind: make(w, h), **_texts(members)}, PICTURE | {"too many pixels"}


def dense_bomb(rng: random.Random, members: Members) -> tuple[Members, set[str]]:
    """A whole PNG of very many pixels of one colour: a thousand times its bytes."""
    return {"png": _flat_png(), **_texts(members)}, {"too many pixels"}


def _texts(members: Members) -> Members:
    return {kind: members[kind] for kind in ("txt", "json")}


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, pixels: bytes = b"x" * 20) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


@lru_cache(maxsize=1)
def _flat_png() -> bytes:
    side = 16_000
    return _png(side, side, zlib.compress(bytes((side // 8 + 1) * side), 9))


def _jpeg(width: int, height: int) -> bytes:
    data = next(data for kind, data in pictures() if kind == "jpg")
    frame = data.index(b"\xff\xc0") + 5
    return data[:frame] + struct.pack(">HH", height & 0xFFFF, width & 0xFFFF) + data[frame + 4 :]


def _gif(width: int, height: int) -> bytes:
    screen = struct.pack("<HHBBB", width & 0xFFFF, height & 0xFFFF, 0, 0, 0)
    frame = struct.pack("<HHHHB", 0, 0, width & 0xFFFF, height & 0xFFFF, 0)
    return b"GIF89a" + screen + b"," + frame + b"\x02\x02\x4c\x01\x00;"


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 4, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1082, 0, 0, 1078) + head + bytes(1024) + b"\x01\x05\0\0\0\x01"


def _webp(width: int, height: int) -> bytes:
    canvas = (
        b"\x10\0\0\0" + struct.pack("<I", (width - 1) & 0xFFFFFF)[:3] + struct.pack("<I", (height - 1) & 0xFFFFFF)[:3]
    )
    picture = next(data for kind, data in pictures() if kind == "webp")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + picture[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


_BOMBS: dict[str, Callable[[int, int], bytes]] = {"png": _png, "jpg": _jpeg, "gif": _gif, "bmp": bmp, "webp": _webp}


class _Program:
    """Pickles to a call that makes a file in the working folder."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("unpickled"),)


def pickle_bomb() -> bytes:
    import pickle

    return pickle.dumps(_Program())


SAMPLE_MUTATIONS: tuple[tuple[Callable[[random.Random, Members], tuple[Members, set[str]]], bool], ...] = (
    (truncated, True),  # True: where it is used all the same, its picture is the original
    (flipped, False),
    (header_flipped, False),
    (overwritten, False),
    (spliced, False),
    (garbage, False),
    (lfs_pointer, False),
    (wrong_extension, True),
    (swapped_members, False),
    (no_picture, False),
    (no_caption, False),
    (broken_json, False),
    (odd_json, True),
    (wrong_utf8, False),
    (half_surrogate, False),
    (unicode_caption, True),
    (foreign_members, True),
    (broken_ids, True),
    (bomb, False),
    (dense_bomb, False),
)


def sample_case(seed: int, number: int, ids_kind: str = "") -> Case:
    """Case number `number` of a seed. One in twenty is not damaged at all."""
    rng = random.Random(f"sample {seed} {number}")
    original = sample(rng, ids_kind)
    if not rng.randrange(20):
        return Case("none", original, frozenset({VALID}), original, True)
    mutate, same = rng.choice(SAMPLE_MUTATIONS)
    members, outcomes = mutate(rng, original)
    return Case(mutate.__name__, members, frozenset(outcomes), original, same)


# --- mutations of a shard: return the changed bytes


def tar_cut(rng: random.Random, tar: bytes, headers: list[int]) -> bytes:
    return tar[: rng.randrange(len(tar))]


def tar_flipped(rng: random.Random, tar: bytes, headers: list[int]) -> bytes:
    """A bit of a header, which its checksum covers."""
    return _changed(tar, rng.choice(headers) + rng.randrange(345), lambda byte: byte ^ (1 << rng.randrange(8)))


def tar_absurd(rng: random.Random, tar: bytes, headers: list[int]) -> bytes:
    """Absurd fields of a header under a right checksum: size, type, name, mode, prefix."""
    at = rng.choice(headers)
    header = bytearray(tar[at : at + BLOCK])
    for _ in range(rng.randrange(1, 3)):
        field, values = rng.choice(_ABSURD)
        value = rng.choice(values)
        header[field : field + len(value)] = value
    return tar[:at] + _with_checksum(header) + tar[at + BLOCK :]


def tar_inserted(rng: random.Random, tar: bytes, headers: list[int]) -> bytes:
    """Garbage or zeros before a member or in one, but the last: the padding may take up what its data lose."""
    at = rng.choice((rng.choice(headers), rng.choice(headers) + 1, rng.choice(headers[:-2]) + BLOCK))
    length = rng.choice((1, 100, BLOCK, 2 * BLOCK, 10_240))
    return tar[:at] + rng.choice((bytes(length), rng.randbytes(length))) + tar[at:]


def tar_zeroed(rng: random.Random, tar: bytes, headers: list[int]) -> bytes:
    """Pages that were never written."""
    at = rng.choice(headers[:-4])  # not the last sample: a tar that ends before it is a whole one
    length = rng.choice((BLOCK, 4 * BLOCK))
    return tar[:at] + bytes(length) + tar[at + length :]


def tar_extended(rng: random.Random, tar: bytes, headers: list[int]) -> bytes:
    """An extended header (pax, GNU long name, sparse) with odd content before a member."""
    at = rng.choice(headers)
    kind = rng.choice((b"x", b"g", b"L", b"K", b"S", b"X", b"V"))
    content = (
        rng.choice(_PAX) if kind in b"xgX" else rng.choice((b"n" * 3000, b"\0" * 600, b"\xff" * 20, b"../../a.jpg"))
    )
    info = tarfile.TarInfo("extended")
    info.type, info.size = kind, rng.choice((len(content), len(content), len(content), 0, 2**40))
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = rng.choice((0, 1))  # "more follows" of a sparse file
    blocks = content + bytes(-len(content) % BLOCK)
    return tar[:at] + (_with_checksum(header) + blocks) * rng.choice((1, 1, 1, 2000)) + tar[at:]


def tar_repeated(rng: random.Random, tar: bytes, headers: list[int]) -> bytes:
    """A member comes again: the keys of a shard are unique."""
    which = rng.randrange(len(headers) - 1)
    member = tar[headers[which] : headers[which + 1]]
    return tar[: headers[-1]] + member + tar[headers[-1] :]


def _changed(data: bytes, at: int, change: Callable[[int], int]) -> bytes:
    return data[:at] + bytes([change(data[at])]) + data[at + 1 :]


def _with_checksum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


_ABSURD = (
    (
        124,
        (
            b"77777777777\0",
            b"\xff" * 12,
            b"\x80" + b"\xff" * 11,
            b"-0000000001\0",
            b"00000000000\0",
            b"\x80" + bytes(11),
        ),
    ),
    (124, (b"not a number", b" " * 12, b"\xff" * 11 + b"\0", b"00000001000\0", b"00000100000\0")),
    (156, (b"1", b"2", b"3", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"V", b"M", b"\0", b"\xff", b"0")),
    (
        0,
        (
            b"a" * 100,
            b"\0" * 100,
            b".\0",
            b"../../x.jpg\0",
            b"/etc/x.jpg\0",
            b"\xff\xfe.jpg\0",
            b"\n\r\x1b[2J.jpg\0",
            b"a.b.c\0",
        ),
    ),
    (345, (b"p" * 155, b"../..\0", b"\xff" * 155)),
    (100, (b"\xff" * 8, b"zzzzzzz\0")),
    (136, (b"\xff" * 12, b"77777777777\0")),
    (257, (b"ustar  \0", b"garbage\0", b"\0" * 8)),
)
_PAX = (
    b"18 path=a/../b.jpg\n",
    b"9999999999 path=x\n",
    b"0 path=x\n",
    b"-5 path=x\n",
    b"garbage",
    b"20 size=99999999999\n",
    b"11 size=-1\n",
    b"13 size=nan\n",
    b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n",
    b"22 GNU.sparse.map=1,2\n",
    b"25 GNU.sparse.size=1e999\n",
    b"21 GNU.sparse.size=x\n",
    b"14 path=\xff\xff\xff\n",
    b"16 path=a\0b.jpg\n",
    b"22 hdrcharset=BINARY\n",
    b"12 mtime=x\n",
    b"14 mtime=inf\n",
    bytes(BLOCK),
)

TAR_MUTATIONS = (tar_cut, tar_flipped, tar_absurd, tar_inserted, tar_zeroed, tar_extended, tar_repeated)


def tar_headers(tar: bytes) -> list[int]:
    """Offsets of all headers, and of the end mark."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        members = archive.getmembers()
    return [member.offset for member in members] + [members[-1].offset_data + -(-members[-1].size // BLOCK) * BLOCK]


# --- mutations of an index file, beside a shard or consolidated


def file_flipped(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 30))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def file_tail_flipped(rng: random.Random, data: bytes) -> bytes:
    """The directory of a zip, which no checksum covers."""
    return _changed(data, len(data) - 1 - rng.randrange(min(400, len(data))), lambda _: rng.randrange(256))


def file_cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def file_garbage(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return rng.choice(
        (data[:at] + rng.randbytes(50) + data[at:], rng.randbytes(500), b"", pickle_bomb(), b"PK\x05\x06" * 9)
    )


FILE_MUTATIONS = (file_flipped, file_tail_flipped, file_cut, file_garbage)


def arrays_changed(rng: random.Random, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of an index with other values, types and shapes: such a file is whole, and wrong."""
    name = rng.choice(sorted(arrays))
    values = arrays[name]
    if rng.random() < 0.5 and {"offset", "size"} <= arrays.keys():
        name = rng.choice(("offset", "size", "crc"))
        values = arrays[name].copy()
        place = tuple(rng.randrange(side) for side in values.shape)
        numbers = (
            (0, 1, 511, 2**31, 2**32 - 1) if name == "crc" else (-1, -2, 0, 1, 511, 10**5, 2**62, -(2**63), 2**63 - 1)
        )
        values[place] = rng.choice(numbers)
        return {**arrays, name: values}
    number = values.dtype.kind in "iuf"
    changes: tuple[Callable[[], np.ndarray], ...] = (
        lambda: np.full(values.shape, np.inf) if number else values.astype("S"),
        lambda: values.astype(np.int8) if number else np.array(values, dtype=">U30"),
        lambda: values.astype(np.uint64) if number else values[..., None],
        lambda: values.astype(np.float64) if number else np.array(7),
        lambda: np.full(values.shape, 7, dtype=values.dtype) if number else np.array(["a"]),
        lambda: np.full(values.shape or (1,), 0x7FFFFFFF, dtype=np.uint32).view("<U1"),
        lambda: np.full(values.shape or (1,), 0xD800, dtype=np.uint32).view("<U1"),
        lambda: np.array([_Program()], dtype=object),
        lambda: np.array(None, dtype=object),
        lambda: values.reshape(-1)[:-1],
        lambda: values[None],
        lambda: np.zeros(0, dtype=values.dtype),
    )
    if not rng.randrange(8):
        return {other: array for other, array in arrays.items() if other != name}
    return {**arrays, name: rng.choice(changes)()}


def book_changed(rng: random.Random, book: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A consolidated index, whole, of which one file within went through `change`."""
    with zipfile.ZipFile(io.BytesIO(book)) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    name = rng.choice(sorted(parts))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for other, data in parts.items():
            file.writestr(other, change(data) if other == name else data)
    return out.getvalue()


# --- bytes of members that change where they lie


def change_in_place(rng: random.Random, file: BinaryIO, offset: int, size: int) -> None:
    """Changes some of the `size` bytes at `offset` of a shard."""
    file.seek(offset)
    data = bytearray(file.read(size))
    before = bytes(data)
    while data == before:
        first = rng.randrange(size)
        length = min(size - first, rng.choice((1, 1, 16, 512, size)))
        flip = bytes([data[first] ^ (1 << rng.randrange(8))])
        data[first : first + length] = rng.choice(
            (flip + data[first + 1 : first + length], bytes(length), rng.randbytes(length))
        )
    file.seek(offset)
    file.write(data)


def tar_with_paths_that_lead_outside() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("../../outside", "/tmp/outside", "a/../../b"):
            for kind, data in sample(random.Random(name)).items():
                info = tarfile.TarInfo(f"{name}.{kind}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return out.getvalue()
