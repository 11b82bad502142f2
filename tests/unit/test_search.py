"""Search: exact in tiles, prompts, pictures as queries, kept features; the tool on a tiny model; an index of faiss."""

from __future__ import annotations

import io
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipdist import config
from clipdist.data.catalog import Catalog
from clipdist.data.members import Members
from clipdist.data.tokens import make_tokenizer
from clipdist.data.transform import EvalTransform
from clipdist.errors import UserError
from clipdist.evals import approximate, search
from clipdist.evals.approximate import build_index, read_index, require_faiss, write_index
from clipdist.evals.embed import Embeddings
from clipdist.evals.search import (
    Query,
    cache_file,
    encode_queries,
    nearest,
    read_cache,
    read_queries,
    read_query,
    unit,
    write_cache,
)
from clipdist.models import load
from clipdist.models.build import build_model
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.load import LoadedModel

REPOSITORY = Path(__file__).resolve().parents[2]


def random_unit(rows: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize(("pictures", "queries", "k"), [(1, 1, 1), (50, 7, 5), (64, 3, 64), (33, 2, 100)])
def test_tiles_give_what_one_product_gives(
    pictures: int, queries: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "TILE_IMAGES", 16)
    monkeypatch.setattr(search, "TILE_QUERIES", 2)
    images, asked = random_unit(pictures), random_unit(queries, seed=1)
    rows, scores = nearest(images, asked, k)
    whole = (asked @ images.T).sort(dim=1, descending=True)
    assert rows.tolist() == whole.indices[:, :k].tolist()
    assert torch.allclose(scores, whole.values[:, :k], atol=1e-6)


def test_pictures_that_score_alike_come_in_catalog_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "TILE_IMAGES", 4)
    images = torch.zeros(10, 2)
    images[:, 0] = 1
    images[7] = torch.tensor([0.0, 1.0])
    rows, _ = nearest(images, torch.tensor([[1.0, 0.0]]), 10)
    assert rows.tolist() == [[0, 1, 2, 3, 4, 5, 6, 8, 9, 7]]


def letters(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[float(text.count(letter)) for letter in "abc{"] for text in texts])


def encode(image: torch.Tensor | None, tokens: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A sentence is its letters, a picture its colour; neither of unit length."""
    if image is not None:
        return torch.cat([image.float().mean((2, 3)), torch.zeros(len(image), 1)], 1), None
    return None, tokens


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(file, "PNG")
    return file.getvalue()


def test_prompts_are_averaged_as_directions_and_pictures_keep_their_place() -> None:
    queries = [Query("b"), Query("p.png", png((0, 0, 200))), Query("cc")]
    vectors = encode_queries(encode, letters, EvalTransform(4), queries, ["aaa {}", "{}"], batch=2)
    three_to_one = torch.tensor([3.0, 1, 0, 0]) / 10**0.5
    first = F.normalize((three_to_one + torch.tensor([0.0, 1, 0, 0]))[None])[0]
    assert torch.allclose(vectors[0], first, atol=1e-6)
    assert vectors[1].tolist() == [0, 0, 1, 0]
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3))
    assert vectors[2][2] > vectors[2][0] > 0


def test_braces_in_a_sentence_are_left_alone() -> None:
    assert encode_queries(encode, letters, EvalTransform(4), [Query("{0}{x")]).tolist() == [[0, 0, 0, 1]]


def test_diverged_weights_are_named() -> None:
    with pytest.raises(UserError, match="not finite"):
        unit(torch.tensor([[1.0, float("nan")]]))


def test_reading_queries(tmp_path: Path) -> None:
    (tmp_path / "p.PNG").write_bytes(png((1, 2, 3)))
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    assert read_query("A dog. ") == Query("A dog. ")
    assert read_query(str(tmp_path / "p.PNG")).image == png((1, 2, 3))
    for words, says in ((" ", "empty"), ("no.jpg", "No such file"), (str(tmp_path / "cut.jpg"), "an image")):
        with pytest.raises(UserError, match=says):
            read_query(words)


def test_a_file_of_queries(tmp_path: Path) -> None:
    path = tmp_path / "queries.txt"
    path.write_bytes("\ufeffa dog\r\n\r\n  naïve ☃ \n".encode())
    assert [query.text for query in read_queries(path)] == ["a dog", "naïve ☃"]
    for data, says in (
        (b"\n \n", "holds no query"),
        (b"\xff\xfe\xff", "cannot be read"),
        (b"a\nb.jpg", "line 2: .*b.jpg"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=says):
            read_queries(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_queries(tmp_path)


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    torch.manual_seed(0)
    return build_model(config.Model(name=str(REPOSITORY / "configs/models/tiny_vit.json"))).eval()


def loaded_as(model: DualEncoder, run_dir: Path | None, digest: str = "0" * 16) -> LoadedModel:
    return LoadedModel(model, make_tokenizer(model.spec), "tiny", run_dir, 3, digest)


def kept(count: int = 3) -> Embeddings:
    none = torch.zeros(0, dtype=torch.int64)
    keys = [f"k{row}" for row in range(count)]
    return Embeddings(random_unit(count), torch.zeros(0, 0), none, [], keys, torch.arange(count), {"too large": ["x"]})


def test_features_are_kept_for_one_model_and_one_set_of_shards(
    tmp_path: Path, shards: Path, model: DualEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = loaded_as(model, tmp_path)
    catalog, other = Catalog.open([str(shards / "train")]), Catalog.open([str(shards / "val")])
    path = cache_file(loaded, catalog)
    assert path.parent == tmp_path / "embeddings"
    assert len({path, cache_file(loaded, other), cache_file(loaded_as(model, tmp_path, "1" * 16), catalog)}) == 3
    assert cache_file(loaded, Catalog(catalog.shards, members=Members(("png", "jpg")))) != path  # other images
    assert read_cache(path, loaded, catalog) is None
    assert not capsys.readouterr().err  # nothing wrong with a first search
    write_cache(path, loaded, catalog, kept())
    again = read_cache(path, loaded, catalog)
    assert again is not None
    assert torch.equal(again.image, kept().image)
    assert again.bad == {"too large": ["x"]}
    assert not capsys.readouterr().err
    assert read_cache(path, loaded, other) is None  # a file that was renamed
    path.write_bytes(path.read_bytes()[:-7])
    assert read_cache(path, loaded, catalog) is None
    renamed, damaged = capsys.readouterr().err.splitlines()
    assert "other shards: made again" in renamed
    assert damaged.endswith("made again")


def test_a_folder_that_cannot_be_written_costs_a_line(
    tmp_path: Path, shards: Path, model: DualEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "embeddings").write_text("a file where the folder should be")
    loaded, catalog = loaded_as(model, tmp_path), Catalog.open([str(shards / "val")])
    write_cache(cache_file(loaded, catalog), loaded, catalog, kept())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("not kept")


def test_a_model_without_a_run_keeps_them_in_the_home_folder(
    tmp_path: Path, shards: Path, model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = cache_file(loaded_as(model, None), Catalog.open([str(shards / "val")]))
    assert path.parent == tmp_path / ".cache/clipdist/embeddings"


class Tool:
    """search_images.py's main in this process, on the tiny model as if it came from a run."""

    def __init__(
        self, run_dir: Path, model: DualEncoder, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        self.run_dir, self._patch, self._capsys = run_dir, patch, capsys
        self.passes = 0  # of the image tower
        patch.setattr(load, "load_model", lambda *args, **options: loaded_as(model, run_dir))
        forward = model.visual.forward

        def counted(images: torch.Tensor) -> torch.Tensor:
            self.passes += 1
            return forward(images)

        patch.setattr(model.visual, "forward", counted)

    def ask(self, *words: str) -> dict:
        """What --json ends in; the lines before in "said", stderr's in "told"."""
        self.passes = 0
        argv = ["search_images.py", str(self.run_dir), *words, "--device", "cpu", "--json"]
        self._patch.setattr(sys, "argv", argv)
        runpy.run_path(str(REPOSITORY / "tools/search_images.py"))["main"]()
        captured = self._capsys.readouterr()
        lines = captured.out.splitlines()
        return json.loads(lines[-1]) | {"said": lines[:-1], "told": captured.err}


@pytest.fixture
def tool(
    tmp_path: Path, model: DualEncoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Tool:
    return Tool(tmp_path / "run", model, monkeypatch, capsys)


def test_a_repeated_search_looks_at_no_picture(tool: Tool, shards: Path) -> None:
    first = tool.ask(str(shards / "train"), "a red square")
    assert (tool.passes, first["kept"]) == (2, False)  # 70 pictures in batches of 64
    second = tool.ask(str(shards / "train"), "a red square")
    assert (tool.passes, second["kept"]) == (0, True)
    assert second["hits"] == first["hits"]
    assert len(list((tool.run_dir / "embeddings").iterdir())) == 1
    fresh = tool.ask(str(shards / "train"), "a red square", "--no-cache")
    assert (tool.passes, fresh["kept"]) == (2, False)
    assert fresh["hits"] == first["hits"]


def test_damaged_features_are_made_again(tool: Tool, shards: Path) -> None:
    first = tool.ask(str(shards / "val"), "a red square")
    (file,) = (tool.run_dir / "embeddings").iterdir()
    file.write_bytes(b"\0" * 99)
    again = tool.ask(str(shards / "val"), "a red square")
    assert again["hits"] == first["hits"]
    assert "made again" in again["told"]
    assert tool.ask(str(shards / "val"), "a red square")["told"] == ""


def test_no_cache_leaves_nothing_behind(tool: Tool, shards: Path) -> None:
    tool.ask(str(shards / "val"), "a red square", "--no-cache")
    assert sorted(path.name for path in tool.run_dir.rglob("*")) == ["a-red-square.html", "a-red-square.png", "search"]


def test_a_picture_finds_itself(tool: Tool, shards: Path, tmp_path: Path) -> None:
    from clipdist.data.reader import Reader

    catalog = Catalog.open([str(shards / "val")])
    reader = Reader(catalog)
    (tmp_path / "query.png").write_bytes(reader.sample(13).image())
    key = reader.key(13)
    reader.close()
    record = tool.ask(str(shards / "val"), str(tmp_path / "query.png"), "--top-k", "3")
    assert record["hits"][0]["key"] == key
    assert record["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert (
        Image.open(record["sheet"]).width
        > Image.open(tool.ask(str(shards / "val"), "x", "--top-k", "3")["sheet"]).width
    )
    assert Path(record["page"]).read_text().count("data:image/jpeg") == 4  # the query itself, and three


def test_many_queries(tool: Tool, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "queries.txt").write_text("blue field\na grey square\n")
    out = tmp_path / "there/sheet.png"
    record = tool.ask(
        str(shards / "val"),
        "--queries",
        str(tmp_path / "queries.txt"),
        "--query",
        "red",
        "--top-k",
        "2",
        "--out",
        str(out),
    )
    assert [answer["query"] for answer in record["queries"]] == ["red", "blue field", "a grey square"]
    assert all([hit["rank"] for hit in answer["hits"]] == [1, 2] for answer in record["queries"])
    assert "hits" not in record
    alone = tool.ask(str(shards / "val"), "blue field", "--top-k", "2")
    assert record["queries"][1]["hits"] == alone["hits"]
    assert record["sheet"] == str(out)
    assert record["page"] == str(out.with_suffix(".html"))
    assert out.exists()
    assert Path(record["page"]).read_text().count("<section") == 3


def test_prompts_change_the_scores(tool: Tool, shards: Path) -> None:
    plain = tool.ask(str(shards / "val"), "red")
    assert tool.ask(str(shards / "val"), "red", "--prompts", "{}")["hits"] == plain["hits"]
    assert tool.ask(str(shards / "val"), "red", "--prompts", "a photo of {}.", "{}, left")["hits"] != plain["hits"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompts", "a photo", "--query", "red"], "holds no {}"),
        (["--page", "page.txt", "red"], "must end in .html"),
    ],
)
def test_bad_options(tool: Tool, shards: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tool.ask(str(shards / "val"), *words)
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_a_shard_damaged_since_is_named(tool: Tool, tmp_path: Path) -> None:
    from pairs import write_pairs

    write_pairs(tmp_path / "own", 4)
    tool.ask(str(tmp_path / "own"), "red")
    (tar,) = (tmp_path / "own").glob("*.tar")
    times, data = tar.stat(), tar.read_bytes()
    tar.write_bytes(data.replace(b"\x89PNG", b"JUNK"))
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=r"sample 000000000 .* cannot be shown: wrong checksum; .*--no-cache"):
        tool.ask(str(tmp_path / "own"), "red")


def test_without_faiss_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        require_faiss()


def faiss_or_skip() -> None:
    pytest.importorskip("faiss", reason="faiss is not installed: pip install faiss-cpu")


def test_an_index_agrees_with_the_exact_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faiss_or_skip()
    pictures = random_unit(3000)
    index = build_index(pictures, random_unit(80, seed=1), "captions", progress=False)
    assert index.facts.asked == "40 captions"
    assert 1 < index.facts.looked_into <= index.facts.cells == 76
    asked = random_unit(50, seed=2)
    rows, scores = index.nearest(asked, 10)
    exact, _ = nearest(pictures, asked, 10)
    found = sum(len(set(a) & set(b)) for a, b in zip(rows.tolist(), exact.tolist())) / exact.numel()
    assert found > 0.85
    assert abs(100 * found - index.facts.recall["10"]) < 10  # what it says of itself
    assert torch.allclose(scores, (pictures[rows] * asked[:, None]).sum(2), atol=1e-5)

    path = tmp_path / "deep" / "x.faiss"
    write_index(path, index)
    again = read_index(path, pictures)
    assert again.facts == index.facts
    assert torch.equal(again.nearest(asked, 10)[0], rows)
    assert sorted(file.name for file in path.parent.iterdir()) == ["x.faiss", "x.faiss.json"]
    with pytest.raises(UserError, match="of other pictures"):
        read_index(path, pictures[:-1])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="not whole"):
        read_index(path, pictures)


def test_the_cells_to_look_into_grow_until_the_answers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss_or_skip()
    pictures, samples = random_unit(2000), random_unit(40, seed=1)
    loose = build_index(pictures, samples, "captions", progress=False)
    monkeypatch.setattr(approximate, "AGREE", 100.0)
    strict = build_index(pictures, samples, "captions", progress=False)
    assert strict.facts.looked_into > loose.facts.looked_into
    assert strict.facts.recall["10"] >= loose.facts.recall["10"]


def test_searching_with_an_index(tool: Tool, shards: Path) -> None:
    faiss_or_skip()
    record = tool.ask(str(shards / "train"), "a red square", "--index", "faiss", "--top-k", "3")
    assert record["index"]["cells"] == 1  # 70 pictures: all are looked at
    assert record["hits"] == tool.ask(str(shards / "train"), "a red square", "--top-k", "3")["hits"]
    assert any("recall @1 100.0 %" in line for line in record["said"])
