"""Names that recipes and decoders share."""

from typing import Literal

# How a block's unknown tokens are guessed at first. prompt: random tokens of the prompt (the paper's choice);
# pad: the padding token, a learnt "unknown" mark.
GuessKind = Literal["prompt", "pad"]
