"""Conversations as tokens, with the loss on the assistant's turns only.

A chat template can say itself which part the assistant wrote, with ``{% generation %}``; for well-known templates
without it TRL has versions with it. For any other template the turns are found by rendering the conversation up to
each of them, which works whenever a longer conversation begins as the shorter one does.
"""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from bento_service.errors import InvalidRequest, RefusedConversation
from bento_service.training.dataset_report import Row

IGNORED = -100  # the label of a token that is not learned


def tokenize_chat(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The column ``messages`` as ``input_ids`` and ``labels``, both lists of token ids of the same length.

    Raises InvalidRequest when the tokenizer's template does not let the assistant's turns be told apart,
    RefusedConversation for one in which it renders none.
    """
    template = marking_template(tokenizer)

    def tokenize(row: Row) -> Row:
        if template is not None:
            return tokens_by_marks(tokenizer, template, row["messages"])
        return tokens_by_prefix(tokenizer, row["messages"])

    return dataset.map(tokenize, remove_columns=dataset.column_names)


def marking_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template, or TRL's version of it, that marks the assistant's turns; None when there is none."""
    if has_generation_markers(tokenizer.chat_template):
        return default_template(tokenizer)
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except ValueError:  # not one of those that TRL knows
        return None
    return template


def tokens_by_marks(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]]) -> Row:
    encoding = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return labelled(encoding["input_ids"], [bool(mark) for mark in encoding["assistant_masks"]])


def tokens_by_prefix(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> Row:
    """A turn begins where the prompt to it ends, and ends where the conversation up to it does.

    So its end token, and what the template writes after that, are learned, as in a row of prompt and completion.
    """
    if not tokenizer.is_fast:
        raise InvalidRequest(
            "this model's tokenizer does not tell where in the text its tokens are, so the assistant's turns cannot "
            "be found: give rows of prompt and completion, or set sft.completion_only_loss to false",
            param="model",
        )
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    turns: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt: str = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        through: str = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not through.startswith(prompt) or not text.startswith(through):
            raise InvalidRequest(
                "this model's chat template renders a conversation differently as it goes on, so the assistant's "
                "turns cannot be found: give rows of prompt and completion, or set sft.completion_only_loss to false",
                param="model",
            )
        turns.append((len(prompt), len(through)))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learned = [any(begin <= start < end for begin, end in turns) for start, _ in encoding["offset_mapping"]]
    return labelled(encoding["input_ids"], learned)


def labelled(input_ids: list[int], learned: list[bool]) -> Row:
    if not any(learned):
        raise RefusedConversation(
            "it has no tokens of the assistant's, so nothing can be learned from it", param="training_file"
        )
    labels = [token if mark else IGNORED for token, mark in zip(input_ids, learned, strict=True)]
    return {"input_ids": input_ids, "labels": labels}


def default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template; of named variants the default, as in TRL."""
    template = tokenizer.chat_template
    return str(template["default"] if isinstance(template, dict) else template)
