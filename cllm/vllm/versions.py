"""Which vLLM is installed, and whether we have tried it.

What ran where: 0.29 in the tests, on CPUs, its model runner V2 under Triton's interpreter and with synchronous
scheduling, the only one that vLLM has there. Asynchronous scheduling and CUDA graphs need a GPU: see
`tests/gpu/test_jacobi_in_vllm.py`. A first version of the sampler ran there with 0.26, whose source has all hooks.
"""

import warnings
from importlib.util import find_spec

from cllm.errors import InputError

TESTED = ((0, 26), (0, 29))  # first and last minor version, both included
TESTED_TEXT = " to ".join(f"{major}.{minor}" for major, minor in TESTED)
UNTESTED = "the speculative methods, and the hooks of Jacobi decoding (model runner V2, scheduler, CUDA graphs)"


def is_installed() -> bool:
    """Whether vLLM is there; it is not imported."""
    return find_spec("vllm") is not None


def check_installed() -> None:
    """Raise InputError if vLLM is not installed; it is not imported."""
    if not is_installed():
        raise InputError("vLLM is not installed: pip install -e .[gpu], or .[cpu] on a machine without a GPU")


def require_vllm() -> str:
    """The version of vLLM.

    Raises:
        InputError: it is not installed.
    """
    check_installed()
    import vllm

    version = str(vllm.__version__)
    warn_if_untested(version)
    return version


def warn_if_untested(version: str) -> None:
    first, last = TESTED
    if not first <= _minor(version) <= last:
        warnings.warn(
            f"vLLM {version} is outside the tested range {TESTED_TEXT}; untested are {UNTESTED}",
            stacklevel=3,
        )


def _minor(version: str) -> tuple[int, int]:
    """(0, 29) of "0.29.0+cpu"; (0, 0) of what does not look like a version."""
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
