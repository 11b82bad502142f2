"""Measure models on many test sets in one go: zero-shot, probe and retrieval, in one table and on one page."""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from clipdist.errors import UserError, run_main, writing
from clipdist.evals import front

EXAMPLES = """examples:
  python tools/eval_suite.py runs/demo --suite suite.yaml
  python tools/eval_suite.py runs/mine runs/wise ViT-B-32:openai --suite suite.yaml --out compare.html --json
  torchrun --nproc-per-node 8 tools/eval_suite.py runs/web --suite suite.yaml     ranks share the work

suite.yaml, paths relative to it:
  cifar10: wds/cifar10                                     CLIP_benchmark's form; dataset_type.txt tells the task
  pets: {data: wds/pets, task: [zero_shot, probe]}
  flickr8k: {data: flickr8k/test, task: retrieval}
  cifar: {data: cifar-10-python.tar.gz, templates: cifar10}"""


def main() -> None:
    args = parse_args()
    page = args.out or args.suite.with_suffix(".html")
    if twice := next((name for name in args.models if args.models.count(name) > 1), None):
        raise UserError(f"{twice}: named twice")
    from clipdist.evals.suite import measure_all, read_suite, text_needed

    sets = read_suite(args.suite)
    needs_text = text_needed(sets)
    front.require_writable(page, "--out")

    results: list[list[dict[str, Any]]] = []
    facts: list[dict[str, Any]] = []
    with front.joined_ranks(args) as dist_env:
        share = front.share_of_work(args, dist_env)
        for source in args.models:
            loaded = front.load_named(args, source, needs_text)
            found = measure_all(sets, loaded, dist_env, share, cache=not args.no_cache)
            results.append(found)
            facts.append({"model": loaded.label, "step": loaded.step, "fingerprint": loaded.fingerprint})
            if dist_env.rank == 0:
                from clipdist.evals.results import keep_result

                keep_result(loaded.run_dir, "eval_suite", {"suite": args.suite.name, **facts[-1], "results": found})
    if dist_env.rank:
        return
    labels = front.distinct_labels(args.models, [fact["model"] for fact in facts])
    for fact, label in zip(facts, labels):
        fact["model"] = label
    for fact, found in zip(facts, results):
        for each in found:
            if each.get("left_out"):
                front.tell(f"{fact['model']}, {each['set']}: left out, cannot be used: {each['left_out']:g} samples")
    print_table(labels, results)
    write_page(page, args.suite, labels, results)
    print(f"page: {page}")
    record = [fact | {"results": found} for fact, found in zip(facts, results)]
    front.finish(args, {"suite": str(args.suite), "page": str(page), "models": record})


def print_table(labels: list[str], results: list[list[dict[str, Any]]]) -> None:
    from clipdist.evals.suite import headlines
    from clipdist.report.suite_page import task_words
    from clipdist.report.words import label_of

    rows = [(name, task_words(task), label_of(figure), values) for name, task, figure, values in headlines(results)]
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(3)]
    columns = [max(len(label), 6) + 2 for label in labels]
    print(f"{'':{sum(widths)}}" + "".join(f"{label:>{width}}" for label, width in zip(labels, columns)))
    for *words, values in rows:
        head = "".join(f"{word:{width}}" for word, width in zip(words, widths))
        print(head + "".join(f"{value:{width}.2f}" for value, width in zip(values, columns)))
    taken = sum(each["cached"] for found in results for each in found)
    print(f"{sum(map(len, results)) - taken} measured, {taken} taken from earlier calls with the same weights and data")


def write_page(page: Path, suite: Path, labels: list[str], results: list[list[dict[str, Any]]]) -> None:
    from clipdist.report.suite_page import suite_page
    from clipdist.storage import replacing

    remarks = ["R@K counts ties against the model; a probe follows Radford et al. 2021, A.3."]
    text = suite_page(f"{suite.name}: {', '.join(labels)}", labels, results, remarks, datetime.now(timezone.utc))
    with writing(f"--out {page}"), replacing(page) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(
        "Measures models on the sets of a suite, with the code of zero_shot.py, probe_cifar10.py and\n"
        "eval_retrieval.py. Figures are kept in RUN/suite under the fingerprints of weights and data.",
        EXAMPLES,
    )
    front.add_models(parser)
    parser.add_argument("--suite", required=True, type=Path, metavar="FILE.yaml", help="the sets: see below")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="the page (the suite's name with .html)")
    parser.add_argument("--no-cache", action="store_true", help="neither take nor keep figures")
    front.add_work(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
