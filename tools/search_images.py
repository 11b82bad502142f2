"""A run or model, shards and sentences or pictures in; the most similar pictures out: a list, a sheet and a page."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.errors import UserError, run_main

if TYPE_CHECKING:  # torch comes in seconds, a misspelt word should be heard of before
    from torch import Tensor

    from clipdist.data.catalog import Catalog
    from clipdist.data.reader import Reader
    from clipdist.distributed.rank import DistEnv
    from clipdist.evals.approximate import ApproximateIndex
    from clipdist.evals.embed import Embeddings, Encode
    from clipdist.evals.search import Hit, Query
    from clipdist.evals.sheet import SheetRow
    from clipdist.models.load import LoadedModel
    from clipdist.report.search_page import Answer

EXAMPLES = """A query that ends like a picture's file (cat.jpg) is that file. The pictures' features are kept in
RUN/embeddings: the next search of the same checkpoint in the same shards takes no forward pass over pictures.

examples:
  python tools/search_images.py runs/demo data/demo/train data/demo/test "a red circle above a blue square"
  python tools/search_images.py RN50 --weights openai data/flickr8k/test "This is a dog" --top-k 12 --out dog.png
  python tools/search_images.py runs/demo data/demo/test --query "a red circle" ring.png --queries more.txt
  python tools/search_images.py runs/web 'data/{00000..00999}.tar' "dog" --prompts "a photo of a {}." "a {} outdoors."
several GPUs make the features together: torchrun --nproc-per-node 8 tools/search_images.py ..."""
SHOWN = 50  # queries on the sheet and the page, at most; the list and --json have all
SAMPLES = 256  # captions that an index is tuned and measured with


@dataclass(frozen=True)
class Session:
    """What one run of the program works with."""

    args: argparse.Namespace
    loaded: LoadedModel
    catalog: Catalog
    encode: Encode
    queries: list[Query]
    sheet: Path
    page: Path


@dataclass(frozen=True)
class Result:
    """What it has found: the hits of every query, best first."""

    hits: list[list[Hit]]
    pictures: int
    left_out: dict[str, int]
    index: ApproximateIndex | None
    encode_s: float  # the queries' features
    search_s: float  # the pictures near them


def main() -> None:
    args = parse_args()
    began = time.perf_counter()

    from clipdist.data.catalog import Catalog

    import_s = time.perf_counter() - began
    catalog = Catalog.open(args.shards, what="SHARDS")  # a misspelt folder is heard of before torch is imported
    began = time.perf_counter()

    from clipdist.data.reader import open_reader
    from clipdist.distributed.rank import joined_ranks, resolve_device
    from clipdist.evals.approximate import require_faiss

    import_s += time.perf_counter() - began
    if args.index == "faiss":
        require_faiss()
    with joined_ranks(resolve_device(args.device)) as dist_env:
        session = prepare(args, catalog, dist_env)
        embeddings, kept = pictures_of(session, dist_env)
    if embeddings is None or dist_env.rank:
        return
    for reason, keys in embeddings.bad.items():
        tell(f"left out, {reason}: {len(keys)} ({', '.join(keys[:3])}{', ...' if keys[3:] else ''})")
    reader = open_reader(catalog)
    try:
        result = search(session, embeddings, reader, dist_env)
        draw(session, result, reader)
    finally:
        reader.close()
    print_result(session, result)
    if args.json:
        times = {"import_s": import_s, "encode_s": result.encode_s, "search_s": result.search_s}
        rounded = {name: round(seconds, 4) for name, seconds in times.items()}
        print(json.dumps(as_record(session, result) | {"kept": kept} | rounded))


def prepare(args: argparse.Namespace, catalog: Catalog, dist_env: DistEnv) -> Session:
    """Everything that can be wrong is looked at before the long work."""
    from clipdist.evals.embed import model_encoder
    from clipdist.evals.search import read_queries, read_query
    from clipdist.models.load import load_model

    queries = [read_query(words) for words in args.query] + (read_queries(args.queries) if args.queries else [])
    loaded = load_model(args.run, weights=args.weights, trust_weights=args.trust_weights)
    sheet = args.out or default_sheet(loaded.run_dir, [query.text for query in queries])
    page = args.page or sheet.with_suffix(".html")
    make_folder(sheet, "--out")
    make_folder(page, "--page")
    return Session(args, loaded, catalog, model_encoder(loaded.model, dist_env.device), queries, sheet, page)


def pictures_of(session: Session, dist_env: DistEnv) -> tuple[Embeddings | None, bool]:
    """The pictures' features, of unit length, on rank 0, and whether they were kept from an earlier search.

    Rank 0 alone looks for the file, so that all ranks agree on whether there is work to share.
    """
    from clipdist.data.loader import default_threads
    from clipdist.distributed.collectives import gather_json
    from clipdist.evals.embed import embed_catalog, gather_embeddings
    from clipdist.evals.search import cache_file, read_cache, with_unit_features, write_cache

    args, loaded, catalog = session.args, session.loaded, session.catalog
    path = cache_file(loaded, catalog)
    kept = None if args.no_cache or dist_env.rank else read_cache(path, loaded, catalog, tell)
    if gather_json(kept is not None)[0]:
        return kept, True
    part = embed_catalog(
        session.encode,
        catalog,
        loaded.tokenizer,
        loaded.model.spec.image_size,
        batch=args.batch,
        threads=default_threads(),
        rank=dist_env.rank,
        world=dist_env.world_size,
        texts=False,
    )
    embeddings = with_unit_features(gather_embeddings(part))
    if not (args.no_cache or dist_env.rank):
        write_cache(path, loaded, catalog, embeddings, tell)
    return embeddings, False


def search(session: Session, embeddings: Embeddings, reader: Reader, dist_env: DistEnv) -> Result:
    from clipdist.evals.search import describe_hits, nearest

    index = index_of(session, embeddings, reader) if session.args.index == "faiss" else None
    began = time.perf_counter()
    vectors = features_of(session, session.queries, session.args.prompts)
    encoded = time.perf_counter()
    top_k = session.args.top_k
    rows, scores = (
        index.nearest(vectors, top_k) if index else nearest(embeddings.image, vectors, top_k, dist_env.device)
    )
    found = time.perf_counter()
    hits = []
    for own_rows, own_scores in zip(rows, scores):
        there = own_rows >= 0  # an index may find fewer than were asked for
        sample_ids = embeddings.sample_ids[own_rows[there]]
        hits.append(describe_hits(reader, sample_ids.tolist(), own_scores[there].tolist()))
    left_out = {reason: len(keys) for reason, keys in embeddings.bad.items()}
    return Result(hits, len(embeddings.keys), left_out, index, encoded - began, found - encoded)


def features_of(session: Session, queries: Sequence[Query], prompts: Sequence[str]) -> Tensor:
    from clipdist.evals.search import encode_queries

    loaded = session.loaded
    size = loaded.model.spec.image_size
    return encode_queries(session.encode, loaded.tokenizer, size, queries, prompts, session.args.batch)


def index_of(session: Session, embeddings: Embeddings, reader: Reader) -> ApproximateIndex:
    """The index that was kept, or a new one."""
    from clipdist.evals.approximate import build_index, read_index, write_index
    from clipdist.evals.search import SLOT, Query, cache_file

    path = cache_file(session.loaded, session.catalog).with_suffix(".faiss")
    keep = not session.args.no_cache
    index = read_index(path, embeddings.image, tell) if keep else None
    if index:
        return index
    captions = sample_captions(reader, embeddings.sample_ids.tolist())
    if len(captions) > 1:
        index = build_index(embeddings.image, features_of(session, list(map(Query, captions)), [SLOT]), "captions")
    else:
        index = build_index(embeddings.image, spread(embeddings.image), "pictures of its own")
    if keep:
        try:
            write_index(path, index)
        except UserError as error:
            tell(f"not kept for the next search: {error}")
    return index


def spread(rows: Any) -> Any:
    """Up to SAMPLES items, evenly spread."""
    return rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]


def sample_captions(reader: Reader, sample_ids: Sequence[int]) -> list[str]:
    from clipdist.evals.sheet import first_caption

    captions = [first_caption(reader, sample_id) for sample_id in spread(sample_ids)]
    return [caption for caption in captions if caption]


def draw(session: Session, result: Result, reader: Reader) -> None:
    """Writes the contact sheet and the page.

    Raises:
        UserError: they cannot be written, or a picture is no longer what it was when its features were made.
    """
    from clipdist.evals.sheet import contact_sheet
    from clipdist.report.search_page import search_page

    shown = zip(session.queries[:SHOWN], result.hits)
    answers = [answer_of(reader, query, hits) for query, hits in shown]
    remarks = [about(session, result), *([f"index: {result.index.facts}"] if result.index else [])]
    if session.queries[SHOWN:]:
        remarks.append(f"the first {SHOWN} of {len(session.queries)} queries")
    title = f'"{answers[0].query}"' if len(answers) == 1 else f"{len(session.queries)} queries"
    try:
        contact_sheet([sheet_row(answer) for answer in answers]).save(session.sheet)
        session.page.write_text(search_page(title, remarks, answers), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or session.sheet}: cannot be written ({error.strerror}); see --out") from None


def answer_of(reader: Reader, query: Query, hits: Sequence[Hit]) -> Answer:
    """With the pictures' pixels.

    Raises:
        UserError: a picture is no longer what it was when its features were made.
    """
    from clipdist.data.decode import BadSample, decode_pixels
    from clipdist.report.search_page import Answer

    pixels = []
    for hit in hits:
        try:
            pixels.append(decode_pixels(reader.image(hit.sample_id)))
        except BadSample as error:
            raise UserError(
                f"{hit.shard}: sample {hit.key} was found, but cannot be shown: {error.reason}; was the shard damaged"
                " after its features were kept? --no-cache makes them anew"
            ) from None
    return Answer(query.text, hits, pixels, decode_pixels(query.picture) if query.picture else None)


def sheet_row(answer: Answer) -> SheetRow:
    from clipdist.evals.sheet import SheetRow

    images, labels = list(answer.pixels), [f"{hit.rank}.  {hit.score:.3f}\n{hit.caption}" for hit in answer.hits]
    if answer.query_pixels is not None:
        images, labels = [answer.query_pixels, *images], ["the query", *labels]
    return SheetRow(answer.query, images, labels)


def about(session: Session, result: Result) -> str:
    return f"among {result.pictures} pictures, by {session.loaded.label}"


def print_result(session: Session, result: Result) -> None:
    for query, hits in zip(session.queries, result.hits):
        print(f'"{query.text}" {about(session, result)}')
        print_table(hits)
    if result.index:
        print(f"index: {result.index.facts}")
    print(f"contact sheet: {session.sheet}")
    print(f"page: {session.page}")


def print_table(hits: Sequence[Hit]) -> None:
    key = max(map(len, ["key", *(hit.key for hit in hits)]))
    name = max(map(len, ["filename", *(hit.filename for hit in hits)]))
    print(f"{'rank':>4}  {'score':>6}  {'key':{key}}  {'filename':{name}}  first caption")
    for hit in hits:
        print(f"{hit.rank:4}  {hit.score:6.3f}  {hit.key:{key}}  {hit.filename:{name}}  {hit.caption}")


def as_record(session: Session, result: Result) -> dict[str, Any]:
    """For --json: query and hits, or "queries" where --query or --queries asked."""
    listed: list[dict[str, Any]] = []
    for query, hits in zip(session.queries, result.hits):
        records = [dataclasses.asdict(hit) for hit in hits]
        for record in records:
            del record["sample_id"]  # of this catalog alone; shard and key say it to others
        listed.append({"query": query.text, "hits": records})
    return {
        **({"queries": listed} if session.args.several else listed[0]),
        "sheet": str(session.sheet),
        "page": str(session.page),
        "model": session.loaded.label,
        "pictures": result.pictures,
        "left_out": result.left_out,
        **({"index": dataclasses.asdict(result.index.facts)} if result.index else {}),
    }


def default_sheet(run_dir: Path | None, queries: Sequence[str]) -> Path:
    """RUN/search/<first query>.png; for a model without a run folder, search/ where the tool was started."""
    slug = re.sub(r"\W+", "-", queries[0].lower()).strip("-")[:60] or "query"
    more = f"-and-{len(queries) - 1}-more" if len(queries) > 1 else ""
    return (run_dir or Path()) / "search" / f"{slug}{more}.png"


def make_folder(out: Path, option: str) -> None:
    """Before the long work, not after it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another file with {option}") from None
    if not os.access(out.parent, os.W_OK) or out.is_dir():
        raise UserError(f"{out}: cannot be written; name another file with {option}")


def tell(line: str) -> None:
    print(line, file=sys.stderr)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Finds the pictures that a sentence describes best, or that resemble a picture, in any number of\n"
        "shard folders.",
        epilog=EXAMPLES,
        usage='%(prog)s RUN SHARDS [SHARDS ...] "SENTENCE" [options]\n'
        '       %(prog)s RUN SHARDS [SHARDS ...] --query "SENTENCE" PICTURE.jpg ... [options]',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="run or checkpoint folder, or an open_clip name with --weights")
    parser.add_argument(
        "words",
        metavar="SHARDS SENTENCE",
        nargs="+",
        help="shard folders, patterns or tars; the sentence comes last (none with --query or --queries)",
    )
    parser.add_argument("--query", nargs="+", default=[], metavar="WORDS", help="sentences, or pictures' files")
    parser.add_argument("--queries", type=Path, metavar="FILE", help="a file with a query a line")
    parser.add_argument(
        "--prompts", nargs="+", default=["{}"], metavar="TEXT", help="what a sentence is put into, at {}; their mean"
    )
    parser.add_argument("--top-k", type=int, default=8, help="how many pictures (8)")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the contact sheet (RUN/search/<sentence>.png)")
    parser.add_argument("--page", type=Path, metavar="FILE.html", help="the page (beside the contact sheet)")
    parser.add_argument("--no-cache", action="store_true", help="neither read nor keep the pictures' features")
    parser.add_argument(
        "--index", choices=("exact", "faiss"), default="exact", help="faiss: past a million pictures, nearly exact"
    )
    parser.add_argument("--weights", default="", help="of an open_clip name: a tag or a file")
    parser.add_argument("--trust-weights", action="store_true", help="run a TorchScript file that is not OpenAI's")
    parser.add_argument("--batch", type=int, default=64, help="pictures per forward pass (64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_intermixed_args()  # options may stand between the folders and the sentence
    args.several = bool(args.query or args.queries)
    args.shards = args.words
    if not args.several:
        *args.shards, sentence = args.words
        check_sentence(parser, args.shards, sentence)
        args.query = [sentence]
    check_options(parser, args)
    return args


def check_sentence(parser: argparse.ArgumentParser, shards: Sequence[str], sentence: str) -> None:
    if not shards:
        parser.error("expected RUN, at least one shard folder, and a sentence at the end")
    if not sentence.strip():
        parser.error("the sentence is empty")
    if sentence.endswith(".tar") or (os.path.isdir(sentence) and any(Path(sentence).glob("*.tar"))):
        parser.error(f"the last word is the sentence, but {sentence} are shards; add a sentence in quotes")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for option, path, suffix in (("--out", args.out, ".png"), ("--page", args.page, ".html")):
        if path and path.suffix.lower() != suffix:
            parser.error(f"{option} {path}: must end in {suffix}")
    for prompt in args.prompts:
        if "{}" not in prompt:
            parser.error(f'--prompts "{prompt}": holds no {{}}, where the sentence goes; name the sentence first')
    if args.top_k < 1 or args.batch < 1:
        parser.error("--top-k and --batch must be at least 1")


if __name__ == "__main__":
    run_main(main)
