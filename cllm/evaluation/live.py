"""A response while it is being decoded, for people to watch."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from cllm.decoding.backend import stream
from cllm.engine.detokenize import StreamDecoder
from cllm.evaluation.decode import Engines, MethodName, make_request, methods
from cllm.evaluation.subject import Decodable
from cllm.recipe import EvaluateConfig
from cllm.tasks.prompts import Prompt

Step = tuple[MethodName, str]  # how it is decoded, and the text that one forward pass added


def live_steps(
    subject: Decodable, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, config: EvaluateConfig
) -> Iterator[Step]:
    """Decode a prompt by AR and then by sliding Jacobi, yielding each forward pass when its tokens are committed.

    The texts of a method join to the response without special tokens.
    """
    ar, _, sliding = methods(config.block_size)
    engines = Engines(subject, config, [prompt], rows=1, record=False)
    for method in (ar, sliding):
        text = StreamDecoder(tokenizer)
        for (commit,) in stream(engines[method], [make_request(prompt, config)]):
            added = text.push(commit.token_ids)
            yield method.name, added if commit.finish_reason is None else added + text.finish()
