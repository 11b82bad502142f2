"""Write one self-contained HTML page about runs, to be mailed, read on a phone or printed."""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from pathlib import Path

from clipdist.checkpoint.format import run_folder
from clipdist.errors import UserError, run_main
from clipdist.evals import front
from clipdist.report.history import read_runs, run_figures
from clipdist.report.report_page import report_page
from clipdist.storage import replacing

EXAMPLES = """examples:
  python tools/report.py runs/demo
  python tools/report.py runs/baseline runs/larger-batch --out compare.html --json"""
NAMED = 3  # runs in the name of a comparison


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folders = list(map(run_folder, args.runs))
    runs = read_runs(folders)
    out = args.out or default_page(folders)
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it, or name another")
    page = report_page(runs, datetime.now(timezone.utc))
    try:
        with replacing(out) as temporary:  # a page that is open in a browser is replaced as a whole
            temporary.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another file with --out") from None
    for run in runs:
        print(f"{run.label}: {run.state()}")
        for note in run.notes:
            print(f"  note: {note}")
    print(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    figures = [
        {"run": run.label, "folder": str(run.folder)} | run_figures(run) | {"results": run.results, "notes": run.notes}
        for run in runs
    ]
    front.finish(args, {"report": str(out), "bytes": out.stat().st_size, "runs": figures})


def default_page(runs: list[Path]) -> Path:
    """Return RUN/report.html; of several, compare-A-B.html beside the first."""
    if len(runs) == 1:
        return runs[0] / "report.html"
    names = [run.resolve().name for run in runs]
    more = [f"and-{len(names) - NAMED}-more"] if len(names) > NAMED else []
    return runs[0].parent / f"{'-'.join(['compare', *names[:NAMED], *more])}.html"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = front.make_parser(
        "Writes a page about a run: curves, throughput, retrieval, pictures, results of the tools, data,\n"
        "events, configuration and environment. Of several runs: side by side.",
        EXAMPLES,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="the page (RUN/report.html)")
    args = parser.parse_args(argv)
    if args.out and args.out.suffix.lower() not in (".html", ".htm"):
        parser.error(f"--out {args.out}: must end in .html")
    return args


if __name__ == "__main__":
    run_main(main)
