"""The texts of single tokens, for showing guesses while they change from step to step."""

from transformers import PreTrainedTokenizerBase


class Pieces:
    """What each token of a vocabulary adds to a text, decoded once and kept.

    A piece does not depend on the tokens around it, so a token that stays where it is keeps its text. Hence the parts
    of a character that spreads over several tokens come out as U+FFFD. As in responses, special tokens have no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        if token_id not in self._texts:
            # Behind another token, for some tokenizers drop the space in front of the first one.
            self._texts[token_id] = self._decode([token_id, token_id])[len(self._decode([token_id])) :]
        return self._texts[token_id]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
