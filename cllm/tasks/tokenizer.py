"""A byte-level BPE tokenizer of our own, for models trained from random weights."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cllm.errors import InputError

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
NUM_BYTES = 256

# GPT-2's split, but numbers in groups of up to three digits (as in Llama 3): small ones become one token each.
_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train on `texts`; the same texts in any order give the same tokenizer.

    Any text round-trips through it, for every byte is a token. It adds <|bos|> in front by itself; padding and end are
    two tokens. `vocab_size` counts everything; little text may yield fewer tokens. Saved with `save_pretrained`, it
    loads with `transformers.AutoTokenizer`.

    Raises:
        InputError: a vocabulary too small for the bytes and the special tokens.
    """
    special = [PAD, BOS, EOS]
    if vocab_size < NUM_BYTES + len(special):
        raise InputError(f"vocab_size: must be at least {NUM_BYTES + len(special)}, got {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
