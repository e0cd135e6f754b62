"""What the paper (arXiv 2403.00835) reports, and how sure we are of each figure.

The tables were not at hand as such: the values were gathered from copies, plots and recollection, and each says so.
All speeds are at batch 1 in bfloat16 on an A100 with 40 GB; AR is `generate` of transformers.
"""

from dataclasses import dataclass
from typing import Literal

HARDWARE = "A100-40GB, batch 1, models of 7B parameters, AR by transformers' generate"
Certainty = Literal["V", "F", "X", "R", "R/X", "V/F", "F/X", "?"]
CERTAINTIES: dict[str, str] = {
    "V": "read in a public copy",
    "F": "measured again on the authors' own plots",
    "X": "recalled and checked against their plots",
    "R": "recalled only: check before quoting",
    "?": "sources disagree",
}
PaperMethod = Literal["AR", "Jacobi", "lookahead", "Medusa-2", "speculative, distilled 160M draft"]


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One row of Table 1 or 2; `model` is target (the fine-tuned model) or CLLM."""

    model: Literal["target", "CLLM"]
    method: PaperMethod
    tokens_per_s: float
    speedup: float
    metric: float
    size: str
    certainty: Certainty


@dataclass(frozen=True, slots=True)
class PublishedTask:
    """The rows of a task. `tasks` are ours whose metric is the same; of `kin` only speed compares."""

    table: int
    title: str
    teacher: str
    metric: str
    tasks: tuple[str, ...]
    kin: tuple[str, ...]
    rows: tuple[PublishedRow, ...]


_SIZE, _HEADS, _DRAFT = "6.7B", "8.3B", "6.8B"
_SPECULATIVE: PaperMethod = "speculative, distilled 160M draft"

TASKS: tuple[PublishedTask, ...] = (
    PublishedTask(
        1,
        "GSM8K",
        "ABEL-7B-001 (LLaMA-2-7B)",
        "test@1, %",
        ("gsm8k",),
        (),
        (
            PublishedRow("target", "AR", 43.5, 1.0, 59.1, _SIZE, "V"),
            PublishedRow("target", "Jacobi", 45.7, 1.1, 59.1, _SIZE, "V/F"),
            PublishedRow("target", "lookahead", 74.8, 1.7, 59.1, _SIZE, "V"),
            PublishedRow("CLLM", "AR", 43.5, 1.0, 56.4, _SIZE, "V"),
            PublishedRow("CLLM", "Jacobi", 132.4, 3.0, 56.4, _SIZE, "V/F"),
            PublishedRow("CLLM", "lookahead", 125.2, 2.9, 56.4, _SIZE, "V"),
            PublishedRow("target", "Medusa-2", 70.2, 1.6, 51.3, _HEADS, "F/X"),
            PublishedRow("target", _SPECULATIVE, 73.8, 1.7, 59.1, _DRAFT, "X"),
        ),
    ),
    PublishedTask(
        1,
        "ShareGPT",
        "LLaMA-2-7B",
        "MT-bench score",
        ("mt_bench",),
        ("sharegpt",),
        (
            PublishedRow("target", "AR", 37.6, 1.0, 6.5, _SIZE, "R"),
            PublishedRow("target", "Jacobi", 39.9, 1.1, 6.5, _SIZE, "F"),
            PublishedRow("target", "lookahead", 60.8, 1.6, 6.5, _SIZE, "X"),
            PublishedRow("CLLM", "AR", 36.7, 1.0, 6.4, _SIZE, "R"),
            PublishedRow("CLLM", "Jacobi", 88.4, 2.4, 6.4, _SIZE, "F"),
            PublishedRow("CLLM", "lookahead", 95.0, 2.5, 6.4, _SIZE, "?"),
            PublishedRow("target", "Medusa-2", 102.5, 2.7, 6.4, _HEADS, "F"),
            PublishedRow("target", _SPECULATIVE, 51.3, 1.4, 6.5, _DRAFT, "F"),
        ),
    ),
    PublishedTask(
        2,
        "Spider",
        "Deepseek-Coder-7B-instruct",
        "execution accuracy, %",
        ("spider",),
        (),
        (
            PublishedRow("target", "AR", 38.0, 1.0, 70.0, _SIZE, "R"),
            PublishedRow("target", "Jacobi", 39.5, 1.0, 70.0, _SIZE, "F"),
            PublishedRow("target", "lookahead", 55.3, 1.5, 70.0, _SIZE, "R"),
            PublishedRow("CLLM", "AR", 38.0, 1.0, 69.3, _SIZE, "R/X"),
            PublishedRow("CLLM", "Jacobi", 127.4, 3.4, 69.3, _SIZE, "F"),
            PublishedRow("CLLM", "lookahead", 135.2, 3.6, 69.3, _SIZE, "R"),
            PublishedRow("target", "Medusa-2", 104.2, 2.7, 66.4, _HEADS, "F/X"),
            PublishedRow("target", _SPECULATIVE, 66.8, 1.8, 70.0, _DRAFT, "X"),
        ),
    ),
    PublishedTask(
        2,
        "CodeSearchNet-Python",
        "Deepseek-Coder-7B-instruct",
        "pass@1 in the style of HumanEval, %",
        ("humaneval",),
        ("codesearchnet",),
        (
            PublishedRow("target", "AR", 40.1, 1.0, 60.4, _SIZE, "R/X"),
            PublishedRow("target", "Jacobi", 43.2, 1.1, 60.4, _SIZE, "F"),
            PublishedRow("target", "lookahead", 68.0, 1.7, 60.4, _SIZE, "R"),
            PublishedRow("CLLM", "AR", 38.5, 1.0, 59.2, _SIZE, "R"),
            PublishedRow("CLLM", "Jacobi", 102.1, 2.5, 59.2, _SIZE, "F"),
            PublishedRow("CLLM", "lookahead", 115.7, 2.9, 59.2, _SIZE, "R"),
            PublishedRow("target", "Medusa-2", 128.0, 3.2, 48.3, _HEADS, "F/X"),
            PublishedRow("target", _SPECULATIVE, 59.3, 1.5, 60.4, _DRAFT, "X"),
        ),
    ),
)

# Single cells of these tables are in no source that we have.
TABLE_3 = (
    "Published: fast-forwarded and stationary token counts of the CLLM are 2.0 to 6.8 times the target model's on all "
    "four data sets (V, an excerpt of section 4.2); the target fast-forwards about 1.1 tokens an iteration (R). The "
    "single cells are not in our sources."
)
TABLE_4 = (
    "Published (V, an excerpt of section 4.3): more Jacobi trajectories bring more speed, which saturates as the data "
    "grows; students of more data do well even at lengths n on which they were not trained. The single cells are not "
    "in our sources. Data is the share or number of the run's prompts here; task, model and hardware are not the "
    "paper's."
)
FIGURE_3 = (
    "Published (V, an excerpt of section 4.3 and the figure's caption): on GSM8K, accuracy holds for all lengths n "
    "that were tried, each model decoding with the n of its training; longer ones cost computation, so a moderate n "
    "is best. The values of its points are not in our sources."
)
LOSS_ABLATION = (
    "Published (R, the direction only; section 4.3): the consistency loss alone loses the quality, a larger weight of "
    "the AR loss trades speed for quality (10 was chosen), and the global consistency loss does better than the local "
    "one; the divergence is the forward KL throughout. The single cells are not in our sources."
)
TABLE_5 = (
    "Published: perplexity on raw WikiText-2 and PTB (V that the table exists; its cells are not in our sources, its "
    "number is not certain). Corpora here are read by models of other sizes, and tokenizers differ, so only figures "
    "per word compare across models. The perplexity of the run's held-out reference answers is another quantity and "
    "compares teacher and CLLM only with each other."
)
TABLE_7 = (
    "Published (R): of vanilla Jacobi, speculative decoding, lookahead, EAGLE, Medusa and CLLM, the paper credits CLLM "
    "with no change of architecture, no change of attention and no extra memory, at 2.4 to 3.4 times AR. Below is what "
    "our code knows of each method that ran."
)
