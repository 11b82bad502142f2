"""Fetching: whole objects whatever the server does, an end to patience, and messages without secrets."""

from __future__ import annotations

import importlib.util
import os
import random
import time
from pathlib import Path

import pytest
from storage import FOREVER, Storage, Thing

from clipdist.data.fetch import Fetcher, beside, is_remote, safe_name, without_query
from clipdist.errors import Fault, UserError

DATA = random.Random(0).randbytes(50_000)
QUICK = Fetcher(retry_s=1.5, stall_s=0.3)
IMPATIENT = Fetcher(retry_s=0.3, stall_s=0.2)


@pytest.fixture
def storage(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Storage()
    yield server
    server.close()


def fetched(tmp_path: Path, url: str, fetcher: Fetcher = QUICK, size: int | None = None) -> bytes:
    to = tmp_path / "partial"
    to.write_bytes(b"old" * 30_000)  # longer than what comes
    fetcher.fetch(url, to, size)
    return to.read_bytes()


@pytest.mark.parametrize("name", ["https://h/a.tar", "http://h/a", "s3://b/a", "gs://b/a", "file:///a"])
def test_urls_are_remote(name):
    assert is_remote(name)


@pytest.mark.parametrize("name", ["/data/a.tar", "a.tar", "../a{0..3}.tar", "data/s3:/a", "C:a"])
def test_paths_are_not(name):
    assert not is_remote(name)


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("size", [None, len(DATA)])
def test_the_whole_object_arrives(storage, tmp_path, length, size):
    storage.things["/a.tar"] = Thing(DATA, length=length)
    assert fetched(tmp_path, storage.url("/a.tar"), size=size) == DATA
    assert storage.count("/a.tar") == 1


@pytest.mark.parametrize("fault", [{"cut_at": 20_000, "cuts": 2}, {"stall_at": 20_000, "stalls": 1}])
def test_a_broken_transfer_goes_on_where_it_stopped(storage, tmp_path, fault):
    storage.things["/a.tar"] = Thing(DATA, **fault)
    assert fetched(tmp_path, storage.url("/a.tar")) == DATA
    first, *later = [headers.get("Range") for _, headers in storage.requests]
    assert first is None
    assert later == [f"bytes={20_000 * (i + 1)}-" for i in range(len(later))]
    assert later


@pytest.mark.parametrize("thing", [Thing(DATA, ranges=False), Thing(DATA, etag=None)])
def test_without_ranges_or_a_validator_it_begins_again(storage, tmp_path, thing):
    thing.cut_at, thing.cuts = 20_000, 1
    storage.things["/a.tar"] = thing
    assert fetched(tmp_path, storage.url("/a.tar")) == DATA
    assert storage.count("/a.tar") == 2


def test_an_object_that_changes_is_not_patched_together(storage, tmp_path):
    new = DATA[::-1][:40_000]
    storage.things["/a.tar"] = Thing(DATA, cut_at=20_000, cuts=1, next_data=new)
    assert fetched(tmp_path, storage.url("/a.tar")) == new


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_busy_servers_are_asked_again(storage, tmp_path, status):
    storage.things["/a.tar"] = Thing(DATA, statuses=[status] * 2)
    assert fetched(tmp_path, storage.url("/a.tar")) == DATA
    assert storage.count("/a.tar") == 3


def test_retry_after_is_honoured(storage, tmp_path):
    storage.things["/a.tar"] = Thing(DATA, statuses=[503], headers={"Retry-After": "1"})
    began = time.monotonic()
    assert fetched(tmp_path, storage.url("/a.tar")) == DATA
    assert time.monotonic() - began >= 1  # a lower bound of the wait, not a speed
    storage.things["/b.tar"] = Thing(DATA, statuses=[503], headers={"Retry-After": "3600"})
    with pytest.raises(Fault, match="503"):
        fetched(tmp_path, storage.url("/b.tar"))
    assert storage.count("/b.tar") == 1


@pytest.mark.parametrize(("status", "what"), [(401, "credentials"), (403, "credentials"), (404, "check the name")])
def test_final_answers_end_it_at_once(storage, tmp_path, status, what):
    storage.things["/a.tar"] = Thing(DATA, statuses=[status] * 9)
    with pytest.raises(UserError, match=what) as caught:
        fetched(tmp_path, storage.url("/a.tar"))
    assert not isinstance(caught.value, Fault)
    assert storage.count("/a.tar") == 1


@pytest.mark.parametrize(
    "fault", [{"statuses": [503] * 1000}, {"cut_at": 9_000, "cuts": FOREVER, "ranges": False}, {"stalls": FOREVER}]
)
def test_patience_ends(storage, tmp_path, fault):
    storage.things["/a.tar"] = Thing(DATA, **fault)
    with pytest.raises(Fault, match=r"a\.tar: not fetched after \d+ tries") as caught:
        fetched(tmp_path, storage.url("/a.tar"), IMPATIENT)
    assert "the last cause: " in str(caught.value)
    assert storage.count("/a.tar") >= 2


def test_progress_renews_patience(storage, tmp_path):
    storage.things["/a.tar"] = Thing(DATA, cut_at=5_000, cuts=9)  # ten tries with a pause each
    assert fetched(tmp_path, storage.url("/a.tar"), IMPATIENT) == DATA


@pytest.mark.parametrize("url", ["http://", "https://[bad/a.tar", "http://h:99999/a.tar"])
def test_what_is_no_url(tmp_path, url):
    with pytest.raises(UserError, match="not a URL"):
        fetched(tmp_path, url)


def test_nobody_listens(tmp_path):
    with pytest.raises(Fault, match="refused"):
        fetched(tmp_path, "http://127.0.0.1:9/a.tar", IMPATIENT)


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1])
@pytest.mark.parametrize("way", ["http", "file"])
def test_another_size_than_the_index_says(storage, tmp_path, size, way):
    storage.things["/a.tar"] = Thing(DATA)
    (tmp_path / "a.tar").write_bytes(DATA)
    url = storage.url("/a.tar") if way == "http" else (tmp_path / "a.tar").as_uri()
    with pytest.raises(UserError, match=f"{size} were expected"):
        fetched(tmp_path, url, size=size)


def test_files_are_staged(tmp_path):
    source = tmp_path / "a b#1.tar"
    source.write_bytes(DATA)
    assert fetched(tmp_path, str(source)) == DATA
    assert fetched(tmp_path, source.as_uri(), size=len(DATA)) == DATA
    with pytest.raises(UserError, match="no such object"):
        fetched(tmp_path, str(tmp_path / "none.tar"))
    with pytest.raises(UserError, match="is a folder"):
        fetched(tmp_path, str(tmp_path))


def test_a_source_that_hangs_is_given_up(tmp_path):
    os.mkfifo(tmp_path / "hangs.tar")  # nobody ever writes to it, as with a dead mount
    with pytest.raises(Fault, match="no byte for 0"):
        fetched(tmp_path, str(tmp_path / "hangs.tar"), IMPATIENT)
    os.close(os.open(tmp_path / "hangs.tar", os.O_WRONLY | os.O_NONBLOCK))  # lets the threads that were left behind end


def test_fsspec_drivers(tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe("/shards/a.tar", DATA)
    assert fetched(tmp_path, "memory://shards/a.tar", size=len(DATA)) == DATA
    with pytest.raises(UserError, match="no such object"):
        fetched(tmp_path, "memory://shards/b.tar")
    with pytest.raises(UserError, match=r"b/a\.tar: cannot be fetched"):
        fetched(tmp_path, "nosuch://b/a.tar")


def test_a_missing_driver_is_named(tmp_path, monkeypatch):
    from fsspec.registry import known_implementations

    monkeypatch.setitem(known_implementations, "gs", {"class": "no_such_module.Driver", "err": "install it"})
    with pytest.raises(UserError, match="pip install gcsfs"):
        fetched(tmp_path, "gs://bucket/a.tar")


def test_commands_are_refused():
    with pytest.raises(UserError, match=r"shell command is refused.*mount the storage") as caught:
        is_remote("pipe:curl -u ann:sesame https://h/a.tar")
    assert "sesame" not in str(caught.value)


def test_small_objects(storage):
    storage.things["/a.idx"] = Thing(DATA, cut_at=9_000, cuts=1)
    assert QUICK.read_small(storage.url("/a.idx")) == DATA
    assert QUICK.read_small(storage.url("/none")) is None
    assert QUICK.read_small("/no/such/file") is None
    with pytest.raises(UserError, match="more than 999 bytes"):
        QUICK.read_small(storage.url("/a.idx"), limit_bytes=999)


def test_a_full_disk_is_not_a_failure_of_the_server(storage):
    storage.things["/a.tar"] = Thing(DATA)
    with pytest.raises(OSError, match="No space left"):
        QUICK.fetch(storage.url("/a.tar"), Path("/dev/full"))
    assert storage.count("/a.tar") == 1


def test_room_is_asked_for_before_the_file_grows_and_may_end_the_fetch(storage, tmp_path):
    storage.things["/a.tar"] = Thing(DATA)
    asked = []

    def room(size: int) -> None:
        asked.append((size, (tmp_path / "p").stat().st_size))
        if len(asked) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        QUICK.fetch(storage.url("/a.tar"), tmp_path / "p", room=room)
    assert asked == [(0, 0), (len(DATA), 0), (len(DATA), 0)]


def test_user_and_password_are_sent_and_never_shown(storage, tmp_path):
    path = "/a.tar?X-Signature=sesame"
    storage.things[path] = Thing(DATA)
    url = storage.url(path).replace("http://", "http://ann:open%40@")
    assert fetched(tmp_path, url) == DATA
    assert storage.requests[0][1]["authorization"] == "Basic YW5uOm9wZW5A"  # ann:open@
    for statuses in ([403], [404], [418], [503] * 1000):
        storage.things[path] = Thing(DATA, statuses=list(statuses))
        with pytest.raises(UserError) as caught:
            fetched(tmp_path, url, IMPATIENT)
        assert "a.tar" in str(caught.value)
        assert not any(secret in repr(caught.value) for secret in ("sesame", "ann", "open"))
    for closed in ("http://ann:open@127.0.0.1:9/a.tar?sesame", "https://ann:open@no-such-host.invalid/a.tar?sesame=1"):
        with pytest.raises(Fault) as caught:
            fetched(tmp_path, closed, IMPATIENT)
        assert not any(secret in str(caught.value) for secret in ("sesame", "ann", "open@"))


def test_names_for_messages():
    assert safe_name("s3://bucket/a/b.tar") == "s3://bucket/a/b.tar"
    assert safe_name("https://u:p@h:8/a@b.tar?sig=1#f") == "https://h:8/a@b.tar"
    assert safe_name("/a/b?c.tar") == "/a/b?c.tar"


@pytest.mark.skipif(
    not (importlib.util.find_spec("moto") and importlib.util.find_spec("s3fs")),
    reason="no S3 test server: moto[server] and s3fs are not installed",
)
def test_s3(tmp_path, monkeypatch):
    from moto.server import ThreadedMotoServer

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        import s3fs

        system = s3fs.S3FileSystem()
        system.mkdir("bucket")
        data = DATA * 400  # 20 MB: several requests
        system.pipe("bucket/a.tar", data)
        patient = Fetcher(retry_s=5, stall_s=10)
        assert fetched(tmp_path, "s3://bucket/a.tar", patient, len(data)) == data
        assert patient.read_small("s3://bucket/none") is None
        with pytest.raises(UserError, match="1 were expected"):
            fetched(tmp_path, "s3://bucket/a.tar", patient, 1)
    finally:
        server.stop()


def test_a_signature_is_no_part_of_a_name():
    url = "https://host/a/00000.tar?sig=secret&se=2026#part"
    assert without_query(url) == "https://host/a/00000.tar"
    assert beside(url, ".idx.npz") == "https://host/a/00000.tar.idx.npz?sig=secret&se=2026#part"
    assert without_query("data/what?.tar") == "data/what?.tar"
