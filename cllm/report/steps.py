"""A response with its decoding steps made visible: what each forward pass committed."""

from collections.abc import Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

_COLOURS = ("\033[96m", "\033[93m")  # bright cyan and yellow, in turns
_RESET = "\033[0m"
_PROMPT_CHARACTERS = 200  # shown of a prompt
_INCOMPLETE = "\ufffd"  # what a tokenizer shows for the first bytes of a character


def step_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], accepted: Sequence[int]) -> list[str]:
    """The text that each forward pass added, end token included; the texts join to the whole response.

    A step that ends inside a character adds nothing; the step that completes the character shows it.
    """
    texts, shown = [], ""
    for end in accumulate(accepted):
        text = str(tokenizer.decode(list(token_ids[:end]), skip_special_tokens=False))
        if text.endswith(_INCOMPLETE) and end < len(token_ids):
            texts.append("")
            continue
        texts.append(text[len(shown) :])
        shown = text
    return texts


def marked_steps(texts: Sequence[str]) -> str:
    """The steps on one line with a bar between them."""
    return " | ".join(text.strip(" ").replace("\n", "↵") for text in texts)


def coloured_step(number: int, text: str) -> str:
    """One step for a terminal; neighbours have different colours."""
    return f"{_COLOURS[number % 2]}{text}{_RESET}"


def prompt_end(prompt: str) -> str:
    """The end of a prompt on one line."""
    return f"… {' '.join(prompt.split())[-_PROMPT_CHARACTERS:]}"


def step_example(prompt: str, texts: Sequence[str], ar_forwards: int) -> str:
    """The end of a prompt, its response by steps, and the forwards that it took beside those of AR decoding."""
    return f"{prompt_end(prompt)}\n{marked_steps(texts)}\n  {len(texts)} forward passes; AR takes {ar_forwards}"
