"""Prompts to tokens."""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from cllm.errors import InputError
from serving.messages import Chat, Prompt


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    """A text with the tokenizer's own special tokens, a chat by its template; tokens stay as they are.

    Raises:
        InputError: no chat template, messages that it refuses, or half a surrogate pair.
    """
    if isinstance(prompt, tuple):
        return prompt
    if isinstance(prompt, str):
        _check_unicode("prompt", prompt)
        return tuple(tokenizer(prompt).input_ids)
    for _, content in prompt.messages:
        _check_unicode("messages", content)
    return _encode_chat(tokenizer, prompt)


def _encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[int, ...]:
    if not tokenizer.chat_template:
        raise InputError("messages: the model has no chat template; use /v1/completions")
    messages = [{"role": role, "content": content} for role, content in chat.messages]
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:  # how templates refuse, say, two user messages in a row
        raise InputError(f"messages: refused by the model's chat template: {error}") from error
    return tuple(ids)


def _check_unicode(name: str, text: str) -> None:
    """JSON can say what no text is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: half a surrogate pair at character {error.start}") from None
