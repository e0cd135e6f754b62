"""Make the benchmark's report from results alone, also from those of several machines, and with ablations
and a judge's scores.

python jobs/report.py runs/demo/benchmark
python jobs/report.py results/a100 results/h200 runs/demo/ablation --out results/both
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cllm.ablation.results import RESULTS_NAME as ABLATION_NAME
from cllm.bench.matrix_results import RESULTS_NAME, MatrixResults, read_results
from cllm.report.benchmark import write_report
from cllm.report.documents import read_ablation, read_judged
from jobs.cli import exit_code_of
from jobs.judge import RESULTS_NAME as JUDGE_NAME


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    what = f"with the {RESULTS_NAME} of a benchmark, the {ABLATION_NAME} of an ablation, or both"
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
    # A folder with neither is read as a benchmark's, whose error says what to do.
    measured = [folder for folder in folders if folder not in ablated or (folder / RESULTS_NAME).is_file()]
    return write_report(
        read_results(measured) if measured else MatrixResults(matrices=(), records=()),
        out,
        ablations=[read_ablation(folder / ABLATION_NAME) for folder in ablated],
        judged=[read_judged(folder / JUDGE_NAME) for folder in measured if (folder / JUDGE_NAME).is_file()],
    )


if __name__ == "__main__":
    sys.exit(main())
