"""Sample ids in, bytes out: reads members of local shards by their offsets, from any number of threads."""

from __future__ import annotations

import json
import os
import threading

from clipdist.data.catalog import Catalog
from clipdist.data.decode import BadSample

# Descriptors that stay open, well under the usual limit of 1024; further shards are opened for each read.
MAX_OPEN = 256


class Reader:
    """Reads samples of a catalog. Thread-safe: every read is one pread."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, sample_id: int, kind: str) -> bytes | None:
        """The bytes of one member (`kind` is its extension), or None where the sample has none of that kind.

        Raises:
            BadSample: the shard ends before the member does.
        """
        shard, row = self.catalog.locate(sample_id)
        index = self.catalog.shards[shard]
        if kind not in index.kinds:
            return None
        column = index.kinds.index(kind)
        offset, size = int(index.offset[row, column]), int(index.size[row, column])
        if offset < 0:
            return None
        with self._lock:
            descriptor = self._open.get(shard)
            if descriptor is None and len(self._open) < MAX_OPEN:
                descriptor = self._open[shard] = os.open(index.tar, os.O_RDONLY)
        if descriptor is not None:
            data = os.pread(descriptor, size, offset)
        else:
            with open(index.tar, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise BadSample("truncated image")
        return data

    def image(self, sample_id: int) -> bytes:
        """The encoded picture.

        Raises:
            BadSample: the sample has none.
        """
        for kind in ("jpg", "jpeg", "png", "webp"):
            data = self.read(sample_id, kind)
            if data:
                return data
        raise BadSample("missing image")

    def captions(self, sample_id: int) -> list[str]:
        """All captions of a sample: "captions" of its .json, else its .txt.

        Raises:
            BadSample: the sample has none.
        """
        captions = self.metadata(sample_id).get("captions")
        if isinstance(captions, list):
            captions = [caption for caption in captions if isinstance(caption, str) and caption.strip()]
        if not captions:
            text = (self.read(sample_id, "txt") or b"").decode("utf-8", "replace").strip()
            captions = [text] if text else []
        if not captions:
            raise BadSample("missing caption")
        return captions

    def metadata(self, sample_id: int) -> dict:
        """The sample's .json as a dict; empty where there is none or it cannot be parsed."""
        try:
            record = json.loads(self.read(sample_id, "json") or b"{}")
        except ValueError:
            return {}
        return record if isinstance(record, dict) else {}

    def key(self, sample_id: int) -> str:
        shard, row = self.catalog.locate(sample_id)
        return str(self.catalog.shards[shard].keys[row])

    def shard_name(self, sample_id: int) -> str:
        return self.catalog.shards[self.catalog.locate(sample_id)[0]].tar.name

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()
