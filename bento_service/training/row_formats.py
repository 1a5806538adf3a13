"""The formats of rows, told apart by their columns and the types of these.

    text                  prompt, chosen, rejected: strings
    messages              prompt, chosen, rejected: lists of {"role", "content"}; the replies' roles are assistant's
    text-implicit         chosen, rejected: strings that begin with the same prompt
    messages-implicit     chosen, rejected: conversations that begin with the same messages
    transcripts           chosen, rejected: whole transcripts, "\\n\\nHuman: ... \\n\\nAssistant: ..." (HH-RLHF)
    openai                input.messages, preferred_output, non_preferred_output (OpenAI's preference rows)
    chat                  messages: a conversation, for supervised jobs
    completion            prompt, completion: strings, for supervised jobs
    messages-completion   prompt, completion: lists of messages, for supervised jobs

The first four and the last three are TRL's (https://huggingface.co/docs/trl/dataset_formats). TRL itself trains
silently on many broken rows (an empty reply, two equal replies), hence the checks. A new format is a function that
lists a row's defects, one that gives the row in TRL's form, and an entry in ``FORMATS``.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from bento_service.training.dataset_report import DefectsOf, Purpose, Row
from bento_service.training.message_rows import (
    chat,
    message_completion,
    message_implicit,
    message_pair,
    openai_pair,
    plain,
    spoken,
)
from bento_service.training.text_rows import (
    HUMAN,
    split_transcripts,
    text_completion,
    text_implicit,
    text_pair,
    transcript_pair,
)


@dataclass(frozen=True, kw_only=True)
class Format:
    """One shape of row. ``for_trl`` and ``identity`` take rows without defects only."""

    name: str
    columns: tuple[str, ...]
    purpose: Purpose
    matches: Callable[[Row], bool]  # whether a row, right or wrong, is meant to have this shape
    defects: DefectsOf
    for_trl: Callable[[Row], Row]  # the row with the columns and types that TRL's trainers read
    identity: Callable[[Row], Hashable]  # equal for rows that say the same


def format_of(row: Row) -> Format:
    """The format a row is meant to have."""
    return next(shape for shape in FORMATS if shape.matches(row))


def _columns(*names: str) -> Callable[[Row], Row]:
    return lambda row: {name: row[name] for name in names}


def _message_columns(*names: str) -> Callable[[Row], Row]:
    return lambda row: {name: plain(row[name]) for name in names}


def _texts(*names: str) -> Callable[[Row], Hashable]:
    return lambda row: tuple([row[name] for name in names])


def _conversations(*names: str) -> Callable[[Row], Hashable]:
    return lambda row: tuple([tuple(spoken(row[name])) for name in names])


def _openai_for_trl(row: Row) -> Row:
    return {
        "prompt": plain(row["input"]["messages"]),
        "chosen": plain(row["preferred_output"]),
        "rejected": plain(row["non_preferred_output"]),
    }


def _is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.startswith(HUMAN)


def _is_openai(row: Row) -> bool:
    return "preferred_output" in row or "non_preferred_output" in row


def _is_chat(row: Row) -> bool:
    return "messages" in row and "chosen" not in row and "rejected" not in row


def _is_completion(row: Row) -> bool:
    return "completion" in row and "chosen" not in row and "rejected" not in row


def _has_replies_only(row: Row) -> bool:
    return "prompt" not in row and ("chosen" in row or "rejected" in row)


def _has_messages(row: Row) -> bool:
    return isinstance(row.get("chosen"), list) or isinstance(row.get("rejected"), list) or _has_message_prompt(row)


def _has_message_prompt(row: Row) -> bool:
    return isinstance(row.get("prompt"), list)


# The first that matches a row is its format; the last takes every row.
FORMATS = (
    Format(
        name="openai",
        columns=("input", "preferred_output", "non_preferred_output"),
        purpose="dpo",
        matches=_is_openai,
        defects=openai_pair,
        for_trl=_openai_for_trl,
        identity=lambda row: _conversations("prompt", "chosen", "rejected")(_openai_for_trl(row)),
    ),
    Format(
        name="chat",
        columns=("messages",),
        purpose="supervised",
        matches=_is_chat,
        defects=chat,
        for_trl=_message_columns("messages"),
        identity=_conversations("messages"),
    ),
    Format(
        name="messages-completion",
        columns=("prompt", "completion"),
        purpose="supervised",
        matches=lambda row: _is_completion(row) and (_has_message_prompt(row) or isinstance(row["completion"], list)),
        defects=message_completion,
        for_trl=_message_columns("prompt", "completion"),
        identity=_conversations("prompt", "completion"),
    ),
    Format(
        name="completion",
        columns=("prompt", "completion"),
        purpose="supervised",
        matches=_is_completion,
        defects=text_completion,
        for_trl=_columns("prompt", "completion"),
        identity=_texts("prompt", "completion"),
    ),
    Format(
        name="messages-implicit",
        columns=("chosen", "rejected"),
        purpose="dpo",
        matches=lambda row: _has_replies_only(row) and _has_messages(row),
        defects=message_implicit,
        for_trl=_message_columns("chosen", "rejected"),
        identity=_conversations("chosen", "rejected"),
    ),
    Format(
        name="transcripts",
        columns=("chosen", "rejected"),
        purpose="dpo",
        matches=lambda row: (
            _has_replies_only(row) and (_is_transcript(row.get("chosen")) or _is_transcript(row.get("rejected")))
        ),
        defects=transcript_pair,
        for_trl=split_transcripts,
        identity=_texts("chosen", "rejected"),
    ),
    Format(
        name="text-implicit",
        columns=("chosen", "rejected"),
        purpose="dpo",
        matches=_has_replies_only,
        defects=text_implicit,
        for_trl=_columns("chosen", "rejected"),
        identity=_texts("chosen", "rejected"),
    ),
    Format(
        name="messages",
        columns=("prompt", "chosen", "rejected"),
        purpose="dpo",
        matches=_has_messages,
        defects=message_pair,
        for_trl=_message_columns("prompt", "chosen", "rejected"),
        identity=_conversations("prompt", "chosen", "rejected"),
    ),
    Format(
        name="text",
        columns=("prompt", "chosen", "rejected"),
        purpose="dpo",
        matches=lambda row: True,
        defects=text_pair,
        for_trl=_columns("prompt", "chosen", "rejected"),
        identity=_texts("prompt", "chosen", "rejected"),
    ),
)

# Every column that some format knows.
COLUMNS = tuple(dict.fromkeys(column for shape in FORMATS for column in (*shape.columns, "label")))
