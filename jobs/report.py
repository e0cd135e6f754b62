"""Make one page from results alone: of benchmarks, judges, ablations and serving, also of several machines.

    python jobs/report.py runs/demo/benchmark
    python jobs/report.py results/a100 results/h200 runs/demo/ablation --out results/both

A folder may hold a benchmark with the scores of its judges, an ablation, or what serving measured (load*.json,
overhead*.json). The page comes as HTML and as Markdown.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cllm.ablation.document import RESULTS_NAME as ABLATION_NAME
from cllm.ablation.document import read_document
from cllm.bench.judged import judge_files, read_judged
from cllm.bench.matrix_results import CELLS_NAME, RESULTS_NAME, MatrixResults, read_results
from cllm.report.benchmark import write_report
from cllm.report.served import find_served, read_served
from jobs.cli import exit_code_of


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    what = f"with the {RESULTS_NAME} of a benchmark, the {ABLATION_NAME} of an ablation, or what serving measured"
    result.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=what)
    result.add_argument("--out", type=Path, metavar="FOLDER", help="of the report; default: the first folder")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; bad input is one line and code 2."""
    arguments = parser().parse_args(argv)

    def act() -> None:
        for path in report(arguments.folders, arguments.out or arguments.folders[0]):
            print(path)

    return exit_code_of(act)


def report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write the report of all folders; its files.

    Raises:
        InputError: a folder without results, results that cannot be read, or `out` cannot be written.
    """
    ablated = [folder for folder in folders if (folder / ABLATION_NAME).is_file()]
    served = {folder: find_served(folder) for folder in folders}
    # A folder with none of them is read as a benchmark's, whose error says what to do.
    measured = [folder for folder in folders if is_measured(folder) or not (folder in ablated or served[folder])]
    return write_report(
        read_results(measured) if measured else MatrixResults(matrices=(), records=()),
        out,
        ablations=[read_document(folder / ABLATION_NAME) for folder in ablated],
        judged=[read_judged(path) for folder in measured for path in judge_files(folder)],
        served=[read_served(path) for paths in served.values() for path in paths],
    )


def is_measured(folder: Path) -> bool:
    """Whether a benchmark has written there: its document, or cells of one that was killed."""
    return (folder / RESULTS_NAME).is_file() or any((folder / CELLS_NAME).glob("*.json"))


if __name__ == "__main__":
    sys.exit(main())
