"""The command line that all jobs share: `python jobs/NAME.py --recipe NAME --set a.b=c`.

The benchmark takes a matrix in the recipe's place (`--matrix NAME`), the ablation a grid (`--grid NAME`).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from cllm.config import Config
from cllm.recipe import Recipe
from cllm.recipes import get_recipe, recipe_names
from jobs.errors import input_error_in

EXIT_PARTS_FAILED = 1
EXIT_BAD_INPUT = 2
Job = Callable[[Recipe, argparse.Namespace], None]
NamedConfig = TypeVar("NamedConfig", bound=Config)


def main(
    job: Job,
    description: str | None,
    argv: Sequence[str] | None = None,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Parse the arguments, build the recipe, run the job; returns the exit code.

    Bad input, wherever Ray found it, becomes one line `error: ...` on stderr and exit code 2. Any other exception is a
    defect and passes through with its traceback (exit code 1).

    Args:
        description: the job module's docstring; its first line is shown by --help.
        argv: the arguments without the program's name; None: those of this process.
        add_arguments: adds the job's own options to the parser.
    """
    parser = _parser(description, "recipe", recipe_names())
    if add_arguments is not None:
        add_arguments(parser)
    arguments = parser.parse_args(argv)

    def act() -> None:
        recipe = get_recipe(arguments.recipe).with_overrides(arguments.set)
        if arguments.show:
            print(recipe.model_dump_json(indent=2))
        else:
            job(recipe, arguments)

    return exit_code_of(act)


def main_with(
    run: Callable[[NamedConfig], int],
    description: str | None,
    argv: Sequence[str] | None,
    *,
    kind: str,
    names: Iterable[str],
    get: Callable[[str], NamedConfig],
) -> int:
    """The same for a job whose configuration is of another kind than a recipe; returns the exit code.

    Args:
        run: returns how many parts of its work failed; if any, the exit code is 1.
        kind: the option's name.
        names: what `get` knows.
    """
    arguments = _parser(description, kind, names).parse_args(argv)
    failed = 0

    def act() -> None:
        nonlocal failed
        config = get(getattr(arguments, kind)).with_overrides(arguments.set)
        if arguments.show:
            print(config.model_dump_json(indent=2))
        else:
            failed = run(config)

    return exit_code_of(act) or (EXIT_PARTS_FAILED if failed else 0)


def exit_code_of(act: Callable[[], None]) -> int:
    """Call it; bad input becomes one line and exit code 2, as `main` says."""
    try:
        act()
    except Exception as error:
        message = input_error_in(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def print_last_line_json(document: Any) -> None:
    """Print `document` as one line of JSON. A job's last line is for programs, all lines above it for people.

    Raises:
        ValueError: NaN or infinity in the document, which JSON cannot say.
    """
    sys.stderr.flush()
    print(json.dumps(document, allow_nan=False), flush=True)


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Print a header before a stage, and its duration in seconds after it."""
    print(f"== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"== {title}: done in {time.perf_counter() - start:.1f} s", flush=True)


def _parser(description: str | None, kind: str, names: Iterable[str]) -> argparse.ArgumentParser:
    summary = (description or "").strip().partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False)
    parser.add_argument(f"--{kind}", required=True, metavar="NAME", help=f"one of: {', '.join(names)}")
    example = ", e.g. train.optim.steps=100" if kind == "recipe" else ""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override a key of the {kind}{example}; may be repeated",
    )
    parser.add_argument("--show", action="store_true", help=f"print the resolved {kind} as JSON and stop")
    return parser
