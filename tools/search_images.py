"""Find the images that sentences or images describe best in shards: a list, a contact sheet and a page."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.errors import UserError, run_main
from clipdist.evals import front

if TYPE_CHECKING:  # torch comes in seconds, a misspelt word should be heard of before
    from torch import Tensor

    from clipdist.data.reader import Reader
    from clipdist.evals.approximate import ApproximateIndex
    from clipdist.evals.embed import Embeddings
    from clipdist.evals.search import Hit, Query
    from clipdist.models.load import LoadedModel
    from clipdist.report.search_page import Answer

EXAMPLES = """A query that ends like a picture's file (cat.jpg) is that file. The pictures' features are kept in
RUN/embeddings: the next search of the same checkpoint in the same shards takes no forward pass over pictures.

examples:
  python tools/search_images.py runs/demo runs/demo-data/shards/test "a red circle above a blue square"
  python tools/search_images.py RN50 --weights openai data/flickr8k/test "This is a dog" --top-k 12 --out dog.png
  python tools/search_images.py runs/demo runs/demo-data/shards/test --query "a red circle" ring.png --queries more.txt
  python tools/search_images.py runs/web 'data/{00000..00999}.tar' "dog" --prompts "a photo of a {}." "a {} outdoors."
several GPUs make the features together: torchrun --nproc-per-node 8 tools/search_images.py ..."""
SHOWN = 50  # queries on the sheet and the page, at most; the list and --json have all


@dataclass(frozen=True)
class SearchResult:
    """What a search has found, and where it is shown."""

    queries: list[Query]
    hits: list[list[Hit]]  # of every query, best first
    among: str  # what, and by which model
    index: ApproximateIndex | None
    sheet: Path
    page: Path


def main() -> None:
    args = parse_args()
    catalog = front.open_catalog(args, args.shards, captions=False)  # before torch is imported
    began = time.perf_counter()

    from clipdist.data.reader import open_reader
    from clipdist.evals.approximate import require_faiss
    from clipdist.evals.embed import model_encoder
    from clipdist.evals.search import encode_queries, image_embeddings, read_queries, read_query

    import_s = time.perf_counter() - began
    if args.index == "faiss":
        require_faiss()
    with front.joined_ranks(args) as dist_env:
        queries = [read_query(words) for words in args.query] + (read_queries(args.queries) if args.queries else [])
        words = "a query in words" if any(query.image is None for query in queries) else ""
        needs_text = words or ("--index faiss, which is measured with captions" if args.index == "faiss" else "")
        loaded = front.load(args, args.run, needs_text=needs_text)
        sheet = args.out or default_sheet(loaded.run_dir, [query.text for query in queries])
        page = args.page or sheet.with_suffix(".html")
        front.require_writable(sheet, "--out")
        front.require_writable(page, "--page")
        encode, share = model_encoder(loaded.model, dist_env.device), front.share_of_work(args, dist_env)
        embeddings, kept = image_embeddings(loaded, encode, catalog, share, not args.no_cache, dist_env)
    if embeddings is None or dist_env.rank:
        return
    front.tell_left_out(embeddings.bad)
    features_of = partial(encode_queries, encode, loaded.tokenizer, loaded.model.spec.transform, batch=args.batch)
    reader = open_reader(catalog)
    try:
        index = open_index(args, loaded, features_of, embeddings, reader) if args.index == "faiss" else None
        began = time.perf_counter()
        vectors = features_of(queries, args.prompts)
        encoded = time.perf_counter()
        hits, search_s = search(args, vectors, embeddings, index, reader, dist_env.device)
        among = f"among {len(embeddings.keys)} pictures, by {loaded.label}"
        result = SearchResult(queries, hits, among, index, sheet, page)
        draw(result, reader)
    finally:
        reader.close()
    print_result(result)
    left_out = {reason: len(keys) for reason, keys in embeddings.bad.items()}
    record = as_record(args, result) | {"model": loaded.label, "pictures": len(embeddings.keys), "left_out": left_out}
    if index:
        record["index"] = dataclasses.asdict(index.facts)
    times = {"import_s": import_s, "encode_s": encoded - began, "search_s": search_s}
    rounded = {name: round(seconds, 4) for name, seconds in times.items()}
    front.finish(args, record | {"kept": kept} | rounded)


def open_index(
    args: argparse.Namespace,
    loaded: LoadedModel,
    features_of: Callable[[list[Query]], Tensor],
    embeddings: Embeddings,
    reader: Reader,
) -> ApproximateIndex:
    from clipdist.evals.approximate import kept_index, spread
    from clipdist.evals.search import Query, cache_file
    from clipdist.evals.sheet import first_caption

    def captions() -> list[str]:
        found = [first_caption(reader, sample_id) for sample_id in spread(embeddings.sample_ids.tolist())]
        return [caption for caption in found if caption]

    def encode(sentences: Sequence[str]) -> Tensor:
        return features_of(list(map(Query, sentences)))

    path = cache_file(loaded, reader.catalog).with_suffix(".faiss")
    return kept_index(path, embeddings.image, captions, encode, not args.no_cache)


def search(
    args: argparse.Namespace,
    vectors: Tensor,
    embeddings: Embeddings,
    index: ApproximateIndex | None,
    reader: Reader,
    device: Any,
) -> tuple[list[list[Hit]], float]:
    """Return every query's hits, and the seconds that finding them took."""
    from clipdist.evals.search import describe_hits, nearest

    began = time.perf_counter()
    found = index.nearest(vectors, args.top_k) if index else nearest(embeddings.image, vectors, args.top_k, device)
    seconds = time.perf_counter() - began
    hits = []
    for rows, scores in zip(*found):
        there = rows >= 0  # an index may find fewer than were asked for
        hits.append(describe_hits(reader, embeddings.sample_ids[rows[there]].tolist(), scores[there].tolist()))
    return hits, seconds


def draw(result: SearchResult, reader: Reader) -> None:
    """Write the contact sheet and the page.

    Raises:
        UserError: they cannot be written, or an image is no longer what it was when its features were made.
    """
    from clipdist.evals.sheet import SheetRow, contact_sheet
    from clipdist.report.search_page import search_page

    answers = [answer_of(reader, query, hits) for query, hits in zip(result.queries[:SHOWN], result.hits)]
    rows = []
    for answer in answers:
        images, labels = list(answer.pixels), [f"{hit.rank}.  {hit.score:.3f}\n{hit.caption}" for hit in answer.hits]
        if answer.query_pixels is not None:
            images, labels = [answer.query_pixels, *images], ["the query", *labels]
        rows.append(SheetRow(answer.query, images, labels))
    remarks = [result.among, *([f"index: {result.index.facts}"] if result.index else [])]
    if result.queries[SHOWN:]:
        remarks.append(f"the first {SHOWN} of {len(result.queries)} queries")
    title = f'"{answers[0].query}"' if len(answers) == 1 else f"{len(result.queries)} queries"
    try:
        contact_sheet(rows).save(result.sheet)
        result.page.write_text(search_page(title, remarks, answers), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or result.sheet}: cannot be written ({error.strerror}); see --out") from None


def answer_of(reader: Reader, query: Query, hits: Sequence[Hit]) -> Answer:
    """Decode the images of a query's hits.

    Raises:
        UserError: an image is no longer what it was when its features were made.
    """
    from clipdist.data.bad_sample import BadSample
    from clipdist.data.decode import decode_pixels
    from clipdist.report.search_page import Answer

    pixels = []
    for hit in hits:
        try:
            pixels.append(decode_pixels(reader.sample(hit.sample_id).image()))
        except BadSample as error:
            raise UserError(
                f"{hit.shard}: sample {hit.key} was found, but cannot be shown: {error.reason}; was the shard damaged"
                " after its features were kept? --no-cache makes them anew"
            ) from None
    return Answer(query.text, hits, pixels, decode_pixels(query.image) if query.image else None)


def print_result(result: SearchResult) -> None:
    for query, hits in zip(result.queries, result.hits):
        print(f'"{query.text}" {result.among}')
        key = max(map(len, ["key", *(hit.key for hit in hits)]))
        name = max(map(len, ["filename", *(hit.filename for hit in hits)]))
        print(f"{'rank':>4}  {'score':>6}  {'key':{key}}  {'filename':{name}}  first caption")
        for hit in hits:
            print(f"{hit.rank:4}  {hit.score:6.3f}  {hit.key:{key}}  {hit.filename:{name}}  {hit.caption}")
    if result.index:
        print(f"index: {result.index.facts}")
    print(f"contact sheet: {result.sheet}")
    print(f"page: {result.page}")


def as_record(args: argparse.Namespace, result: SearchResult) -> dict[str, Any]:
    """Return query and hits, or "queries" where --query or --queries asked, and the files that show them."""
    listed: list[dict[str, Any]] = []
    for query, hits in zip(result.queries, result.hits):
        records = [dataclasses.asdict(hit) for hit in hits]
        for record in records:
            del record["sample_id"]  # of this catalog alone; shard and key say it to others
        listed.append({"query": query.text, "hits": records})
    shown = {"sheet": str(result.sheet), "page": str(result.page)}
    return ({"queries": listed} if args.several else listed[0]) | shown


def default_sheet(run_dir: Path | None, queries: Sequence[str]) -> Path:
    """Return RUN/search/<first query>.png; for a model without a run folder, search/ where the tool was started."""
    slug = re.sub(r"\W+", "-", queries[0].lower()).strip("-")[:60] or "query"
    more = f"-and-{len(queries) - 1}-more" if len(queries) > 1 else ""
    return (run_dir or Path()) / "search" / f"{slug}{more}.png"


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(
        "Finds the pictures that a sentence describes best, or that resemble a picture, in any number of\n"
        "shard folders.",
        EXAMPLES,
        usage='%(prog)s RUN SHARDS [SHARDS ...] "SENTENCE" [options]\n'
        '       %(prog)s RUN SHARDS [SHARDS ...] --query "SENTENCE" PICTURE.jpg ... [options]',
    )
    front.add_model(parser)
    what = "shard folders, patterns or tars; the sentence comes last (none with --query or --queries)"
    parser.add_argument("words", metavar="SHARDS SENTENCE", nargs="+", help=what)
    parser.add_argument("--query", nargs="+", default=[], metavar="WORDS", help="sentences, or pictures' files")
    parser.add_argument("--queries", type=Path, metavar="FILE", help="a file with a query a line")
    what = "what a sentence is put into, at {}; their mean"
    parser.add_argument("--prompts", nargs="+", default=["{}"], metavar="TEXT", help=what)
    front.add_number(parser, "--top-k", 8, "how many pictures (8)")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the contact sheet (RUN/search/<sentence>.png)")
    parser.add_argument("--page", type=Path, metavar="FILE.html", help="the page (beside the contact sheet)")
    parser.add_argument("--no-cache", action="store_true", help="neither read nor keep the pictures' features")
    what = "faiss: past a million pictures, nearly exact"
    parser.add_argument("--index", choices=("exact", "faiss"), default="exact", help=what)
    front.add_members(parser)
    front.add_work(parser)
    args = parser.parse_intermixed_args()  # options may stand between the folders and the sentence
    args.several = bool(args.query or args.queries)
    args.shards = args.words
    if not args.several:
        *args.shards, sentence = args.words
        check_sentence(parser, args.shards, sentence)
        args.query = [sentence]
    for option, path, suffix in (("--out", args.out, ".png"), ("--page", args.page, ".html")):
        if path and path.suffix.lower() != suffix:
            parser.error(f"{option} {path}: must end in {suffix}")
    for prompt in args.prompts:
        if "{}" not in prompt:
            parser.error(f'--prompts "{prompt}": holds no {{}}, where the sentence goes; name the sentence first')
    return args


def check_sentence(parser: argparse.ArgumentParser, shards: Sequence[str], sentence: str) -> None:
    if not shards:
        parser.error("expected RUN, at least one shard folder, and a sentence at the end")
    if not sentence.strip():
        parser.error("the sentence is empty")
    if sentence.endswith(".tar") or (os.path.isdir(sentence) and any(Path(sentence).glob("*.tar"))):
        parser.error(f"the last word is the sentence, but {sentence} are shards; add a sentence in quotes")


if __name__ == "__main__":
    run_main(main)
