"""Average the weights of models of one architecture: WiSE-FT between two, a uniform or greedy soup of several."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdist.errors import UserError, run_main, writing
from clipdist.evals import front

if TYPE_CHECKING:
    from clipdist.evals.suite import EvalSet
    from clipdist.models.load import LoadedModel

EXAMPLES = """examples:
  python tools/interpolate.py runs/start runs/tuned --alpha 0:1:0.1 --target data/flickr8k/val \\
      --keep cifar-10-python.tar.gz --templates cifar10 --out runs/wise
  python tools/interpolate.py ViT-B-32:openai runs/tuned --alpha 0.5 --out runs/half
  python tools/interpolate.py runs/a runs/b runs/c --soup --target data/flickr8k/val --out runs/soup
  python tools/interpolate.py runs/a runs/b runs/c --greedy --target data/flickr8k/val --out runs/soup"""
RECALLS = tuple(f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10))
MOST_ALPHAS = 101
RETRIEVAL, KEPT = "mean_recall", "kept"

Row = dict[str, Any]  # "name", "weights" (the share of each model), and what was measured


def main() -> None:
    args = parse_args()
    alphas = parse_alphas(args.alpha)
    check(args, alphas)

    from clipdist.evals.suite import text_needed
    from clipdist.models.interpolate import average, require_new_run, require_same_architecture, save_run

    require_new_run(args.out)
    target, keep = open_sets(args)
    with front.joined_ranks(args) as dist_env:
        needs_text = text_needed(sets_of(target, keep))
        models = [front.load_named(args, source, needs_text) for source in args.models]
        labels = front.distinct_labels(args.models, [loaded.label for loaded in models])
        require_same_architecture(dict(zip(args.models, (loaded.model for loaded in models))))
        states = [loaded.model.state_dict() for loaded in models]
        mixed = dataclasses.replace(models[0], run_dir=None, step=None, manifest_sha256="", kept=None)
        measured = sets_of(target, keep)

        def row_of(name: str, weights: list[float]) -> Row:
            mixed.model.load_state_dict(average(states, weights), assign=True)
            return {"name": name, "weights": weights} | measure_row(measured, mixed, args, dist_env)

        rows = [row_of(name, weights) for name, weights in mixtures(args, alphas, labels)]
        if args.greedy:
            best, taken, rule = greedy_soup(rows, row_of)
        if dist_env.rank:
            return
        if not args.greedy:
            best, rule = choose(rows, [f"{alpha:g}" for alpha in alphas] or ["soup"], args.may_lose)
            taken = rows[best]["name"]
        print_table(rows, best, labels, args, keep)
        print(f"taken: {taken}; {rule}")
        mixed.model.load_state_dict(average(states, rows[best]["weights"]), assign=True)
        made_of = {"models": labels, "weights": rows[best]["weights"]}
        checkpoint = save_run(args.out, mixed.model, made_of)
    picture = draw(args.out, rows, best, keep) if target and alphas else None
    record = {"taken": taken, "rule": rule, "checkpoint": str(checkpoint), "curve": rows, **made_of}
    lines = [f"written: {args.out}, a run folder that the tools take", *([f"curve: {picture}"] if picture else [])]
    front.finish(args, record | {"picture": str(picture) if picture else None}, lines, args.out, "interpolate")


def parse_alphas(text: str | None) -> list[float]:
    """Return the values of FIRST:LAST:STEP (both ends included), or of numbers with commas between them; [] for None.

    Raises:
        UserError: not of this form, or outside of 0 .. 1.
    """
    if text is None:
        return []
    try:
        numbers = [float(part) for part in text.replace(":", ",").split(",")]
        if ":" in text:
            first, last, step = numbers
            if not step > 0 or not first <= last or (last - first) / step >= MOST_ALPHAS:
                raise ValueError
            numbers = [round(first + step * number, 10) for number in range(int((last - first) / step + 1e-6) + 1)]
    except ValueError:
        form = f"FIRST:LAST:STEP, such as 0:1:0.1 ({MOST_ALPHAS} values at most), or numbers with commas between them"
        raise UserError(f"--alpha {text}: write {form}") from None
    for alpha in numbers:
        if not 0 <= alpha <= 1:
            raise UserError(f"--alpha {text}: {alpha:g} is outside of 0 .. 1")
    return sorted(set(numbers))


def check(args: argparse.Namespace, alphas: Sequence[float]) -> None:
    """Raise UserError for arguments that do not go together."""
    if len(args.models) < 2:
        raise UserError(f"{args.models[0]}: one model; name at least two")
    if sum((args.soup, args.greedy, bool(alphas))) != 1:
        raise UserError(
            "--alpha, --soup and --greedy: give one of them: weights between two models, the mean of all, or of those"
            " that help"
        )
    if alphas and len(args.models) > 2:
        raise UserError(f"--alpha: lies between two models; of {len(args.models)} take --soup or --greedy")
    if args.greedy and not args.target:
        raise UserError("--greedy: needs --target SHARDS, on which it finds whether a model helps")
    if len(alphas) > 1 and not args.target:
        raise UserError("--alpha: several values need --target SHARDS, on which the best is found")
    if not args.keep and (args.probe or args.classes or args.templates):
        raise UserError("--probe, --classes and --templates belong to --keep")


def open_sets(args: argparse.Namespace) -> tuple[EvalSet | None, EvalSet | None]:
    """Return the target set and the kept one, as far as they are named."""
    from clipdist.evals.suite import open_set

    target = open_set("--target", "retrieval", args.target) if args.target else None
    task = "probe" if args.probe else "zero_shot"
    keep = open_set("--keep", task, args.keep, args.templates, args.classes) if args.keep else None
    return target, keep


def sets_of(target: EvalSet | None, keep: EvalSet | None) -> list[EvalSet]:
    return [each for each in (target, keep) if each]


def mixtures(args: argparse.Namespace, alphas: Sequence[float], labels: Sequence[str]) -> list[tuple[str, list[float]]]:
    """Return the name and the weights of every row: both ends of a curve, or every model of a soup, among them."""
    measured = bool(args.target or args.keep)
    if alphas:
        return [(f"{a:g}", [1 - a, a]) for a in sorted({0.0, *alphas, 1.0} if measured else alphas)]
    count = len(labels)
    singles = [(label, equal_shares([number], count)) for number, label in enumerate(labels)]
    uniform = [] if args.greedy else [("soup", equal_shares(range(count), count))]
    return [*(singles if measured else []), *uniform]


def equal_shares(taken: Sequence[int], count: int) -> list[float]:
    return [1 / len(taken) if number in taken else 0.0 for number in range(count)]


def greedy_soup(rows: list[Row], row_of: Callable[[str, list[float]], Row]) -> tuple[int, str, str]:
    """Make the greedy soup (Wortsman et al., arXiv:2203.05482, recipe 1). Collective, as `row_of` is.

    Models are tried from the highest mean of the six R@K down; one is taken unless the soup's mean falls with it.

    Args:
        rows: of the models; a row for every soup that is tried, "+ MODEL", is added to them.
        row_of: measures what has a name and weights.

    Returns:
        The index of the row to export, the models that were taken, and by which rule, with those that were not.
    """
    singles = list(rows)
    best, *others = sorted(range(len(singles)), key=lambda number: -singles[number][RETRIEVAL])
    taken = [best]
    for number in others:
        rows.append(row_of(f"+ {singles[number]['name']}", equal_shares([*taken, number], len(singles))))
        if rows[-1][RETRIEVAL] >= rows[best][RETRIEVAL]:
            taken, best = [*taken, number], len(rows) - 1
    left = [singles[number]["name"] for number in others if number not in taken]
    rule = f"{len(taken)} of {len(singles)} models, from the highest mean of the six R@K down"
    rule += f"; with {' or '.join(left)} it would fall" if left else ""
    return best, " + ".join(singles[number]["name"] for number in taken), rule


def measure_row(sets: Sequence[EvalSet], mixed: LoadedModel, args: argparse.Namespace, dist_env: Any) -> Row:
    """Return the six R@K and their mean of the target, and what is kept. Collective."""
    from clipdist.evals.suite import HEADLINES, measure

    row: Row = {}
    for each in sets:
        figures = measure(each, mixed, dist_env, front.share_of_work(args, dist_env), keep_features=False)
        if each.task == "retrieval":
            row |= {name: figures[name] for name in RECALLS} | {RETRIEVAL: figures["rsum"] / len(RECALLS)}
        elif figures:  # of a probe, rank 0 alone has them
            row[KEPT] = figures[HEADLINES[each.task][0]]
    return row


def choose(rows: Sequence[Row], wanted: Sequence[str], may_lose: float) -> tuple[int, str]:
    """Return the index of the row to export, and by which rule.

    Args:
        rows: the first is what is kept from: alpha 0.
        wanted: names of the rows to choose from.
        may_lose: of the kept figure, percentage points.
    """
    own = [number for number, row in enumerate(rows) if row["name"] in wanted]
    if len(own) == 1:
        return own[0], "the only one that was asked for"
    if KEPT not in rows[0]:
        return max(own, key=lambda number: rows[number][RETRIEVAL]), "the highest mean of the six R@K"
    least = rows[0][KEPT] - may_lose
    keeping = [number for number in own if rows[number][KEPT] >= least]
    if not keeping:
        return max(own, key=lambda number: rows[number][KEPT]), f"none keeps {least:.2f}; this one keeps most"
    best = max(keeping, key=lambda number: rows[number][RETRIEVAL])
    return best, f"the highest mean of the six R@K among those that keep {least:.2f} (alpha 0's less --may-lose)"


def print_table(
    rows: Sequence[Row], best: int, labels: Sequence[str], args: argparse.Namespace, keep: EvalSet | None
) -> None:
    if args.alpha:
        print(f"alpha 0: {labels[0]}; alpha 1: {labels[1]}")
    if not args.target and not keep:
        return
    titles = {name: f"{name[:3]} R@{name[5:]}" for name in RECALLS} | {RETRIEVAL: "mean R@K", KEPT: "kept"}
    shown = [name for name in titles if name in rows[0]]
    about = [*(["R@K of --target"] if args.target else []), *([f"kept: {accuracy_of(keep)}"] if keep else [])]
    width = max(len("alpha"), *(len(row["name"]) for row in rows))
    print(f"percent; {'; '.join(about)}")
    print(f"{'alpha' if args.alpha else '':{width}}" + "".join(f"{titles[name]:>10}" for name in shown))
    for number, row in enumerate(rows):
        mark = "  <- taken" if number == best else ""
        print(f"{row['name']:{width}}" + "".join(f"{row[name]:10.2f}" for name in shown) + mark)


def accuracy_of(keep: EvalSet) -> str:
    return f"{keep.task.replace('_', '-')} accuracy on {Path(keep.source).name}"


def draw(out: Path, rows: Sequence[Row], best: int, keep: EvalSet | None) -> Path:
    """Draw the target figure against the kept one, or against alpha, into the results of the run folder."""
    from clipdist.report.tradeoff import tradeoff_figure

    points = [(row[KEPT] if keep else row["weights"][1], row[RETRIEVAL], row["name"] if keep else "") for row in rows]
    x_title = f"kept: {accuracy_of(keep)}, %; numbers are alpha" if keep else "alpha"
    path = out / "results" / "interpolate.png"
    with writing(f"--out {out}"):
        path.parent.mkdir(exist_ok=True)
        tradeoff_figure(points, best, x_title, "target: mean of the six R@K, %").savefig(path)
    return path


def parse_args() -> argparse.Namespace:
    parser = front.make_parser(
        "Averages weights: (1 - alpha) of the first model's and alpha of the second's (WiSE-FT), the mean of all\n"
        "(a uniform soup), or of those that help (a greedy soup); measures them, and writes the best as a run folder.",
        EXAMPLES,
    )
    front.add_models(parser)
    add = parser.add_argument
    add("--alpha", metavar="FIRST:LAST:STEP|LIST", help="shares of the second model, in 0 .. 1: 0:1:0.1, or 0.3,0.5")
    add("--soup", action="store_true", help="the mean of all models, with equal shares")
    add("--greedy", action="store_true", help="the mean of those that do not lower the R@K of --target, best first")
    add("--target", nargs="+", default=[], metavar="SHARDS", help="captioned shards: retrieval, which shall get better")
    add("--keep", metavar="PATH", help="labelled images, as zero_shot.py --data: accuracy, which shall not be lost")
    add("--probe", action="store_true", help="measure --keep by the linear probe instead of zero-shot")
    front.add_prompts(parser)
    front.add_number(
        parser, "--may-lose", 1.0, "percentage points of --keep that the best may lose (1)", least=0, most=100
    )
    add("--out", required=True, type=Path, metavar="RUN", help="a new run folder: checkpoint, results, plot")
    front.add_work(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
