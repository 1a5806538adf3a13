"""How many tokens a row has, counted as TRL's trainers will make them, in batches and without keeping them.

TRL's steps, for DPO (``DPOTrainer._prepare_dataset``) and for prompts with completions (``SFTTrainer``): a prompt that
both replies begin with is split off; a reply of plain text ends with the end token; messages go through the chat
template; the reply begins where the tokens of the prompt and of prompt and reply part, which need not be where the
prompt's tokens end. Conversations are tokenized as the supervised recipe does it (``assistant_turns``).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bento_service.training.dataset_report import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows tokenized at once: a batch ends with the row that passes one of these, so that long rows are held one by one.
BATCH_ROWS = 64
BATCH_CHARACTERS = 2**20


@dataclass(frozen=True, slots=True)
class RowTokens:
    """Numbers of tokens of one row, before anything is cut: the prompt, and each reply that follows it.

    ``replies`` has chosen and rejected of a pair, the completion of a row for supervised training. What comes before
    the assistant's first turn is a conversation's prompt. A row of which every token is learned has a prompt of 0.
    """

    prompt: int
    replies: tuple[int, ...]

    def sequences(self, max_length: int) -> list[int]:
        """Lengths of what the model reads, each reply with the prompt before it."""
        return [min(self.prompt + reply, max_length) for reply in self.replies]

    def is_dropped(self, max_length: int) -> bool:
        """Whether no token of a reply is left: TRL leaves such rows out."""
        return self.prompt >= max_length

    def is_cut(self, max_length: int) -> bool:
        return max_length < self.prompt + max(self.replies)


def row_tokens(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", *, replies_only: bool = True
) -> list[RowTokens]:
    """Tokens of rows in TRL's form (``preferences.load_rows``), which all have one format.

    ``replies_only`` says whether only replies are learned, and not what they reply to. Raises jinja2.TemplateError
    or RefusedConversation when the chat template refuses a conversation, InvalidRequest when it does not tell the
    assistant's turns.
    """
    if not replies_only:
        return [RowTokens(0, (found.prompt + found.replies[0],)) for found in _counted(rows, tokenizer, False)]
    return _counted(rows, tokenizer, True)


def _counted(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", replies_only: bool) -> list[RowTokens]:
    from trl.data_utils import common_prefix_length, extract_prompt

    if "messages" in rows[0]:
        if replies_only:
            return [_conversation_tokens(row["messages"], tokenizer) for row in rows]
        return [RowTokens(0, (len(ids),)) for ids in _tokenize(tokenizer, [row["messages"] for row in rows])]
    if "prompt" not in rows[0]:
        rows = [extract_prompt(row) for row in rows]
    columns = ("chosen", "rejected") if "chosen" in rows[0] else ("completion",)
    prompts = _tokenize(tokenizer, [row["prompt"] for row in rows], add_generation_prompt=True)
    wholes = [
        _tokenize(tokenizer, [row["prompt"] + _ended(row[column], tokenizer) for row in rows]) for column in columns
    ]
    found = []
    for prompt, *whole in zip(prompts, *wholes, strict=True):
        start = min(common_prefix_length(prompt, ids) for ids in whole)
        found.append(RowTokens(start, tuple(len(ids) - start for ids in whole)))
    return found


def _conversation_tokens(messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> RowTokens:
    from bento_service.training.assistant_turns import IGNORED, marking_template, tokens_by_marks, tokens_by_prefix

    template = marking_template(tokenizer)
    if template is not None:
        labels = tokens_by_marks(tokenizer, template, messages)["labels"]
    else:
        labels = tokens_by_prefix(tokenizer, messages)["labels"]
    prompt = next(position for position, label in enumerate(labels) if label != IGNORED)
    return RowTokens(prompt, (len(labels) - prompt,))


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in groups of a size that can be tokenized at once."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += _characters(row)
        if len(batch) == BATCH_ROWS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ended(reply: Any, tokenizer: "PreTrainedTokenizerBase") -> Any:
    if isinstance(reply, list) or reply.endswith(tokenizer.eos_token):
        return reply
    return reply + tokenizer.eos_token


def _tokenize(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[Any], *, add_generation_prompt: bool = False
) -> list[list[int]]:
    if isinstance(texts[0], list):
        tokens = tokenizer.apply_chat_template(
            list(texts), tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
        )
    else:
        tokens = tokenizer(text=list(texts))
    ids: list[list[int]] = tokens["input_ids"]
    return ids


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0
