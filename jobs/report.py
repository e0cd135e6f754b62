"""Make the benchmark's report from results alone, also from those of several machines.

python jobs/report.py runs/demo/benchmark
python jobs/report.py results/a100 results/h200 --out results/both
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cllm.bench.matrix_results import read_results
from cllm.report.benchmark import write_report
from jobs.cli import exit_code_of


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    result.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="with the results.json of a benchmark")
    result.add_argument("--out", type=Path, metavar="FOLDER", help="of the report; default: the first folder")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; bad input is one line and code 2."""
    arguments = parser().parse_args(argv)

    def act() -> None:
        for path in write_report(read_results(arguments.folders), arguments.out or arguments.folders[0]):
            print(path)

    return exit_code_of(act)


if __name__ == "__main__":
    sys.exit(main())
