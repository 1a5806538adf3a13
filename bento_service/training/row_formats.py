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
    unpaired              prompt, completion: strings, label: true for a good completion, for kto jobs
    messages-unpaired     prompt, completion: lists of messages, label: as above

The first four and the last five are TRL's (https://huggingface.co/docs/trl/dataset_formats). TRL itself trains
silently on many broken rows (an empty reply, two equal replies), hence the checks. A new format is a function that
lists a row's defects, one that gives the row in TRL's form, a ``Format``, and its place in ``FORMATS`` and
``format_of``.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

from bento_service.training.dataset_report import Defect, Method, Row
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
    content: Literal["text", "messages"]
    methods: tuple[Method, ...]  # those that can train on it
    defects: Callable[[Row], list[Defect]]
    for_trl: Callable[[Row], Row]  # the row with the columns and types that TRL's trainers read
    identity: Callable[[Row], Hashable]  # equal for rows that say the same

    @property
    def described(self) -> str:
        held = "text" if self.content == "text" else "lists of messages"
        return f"{self.name} ({', '.join(self.columns)}: {held})"


PREFERENCE: tuple[Method, ...] = ("dpo", "reward")  # the methods that train on pairs


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


OPENAI = Format(
    name="openai",
    columns=("input", "preferred_output", "non_preferred_output"),
    content="messages",
    methods=PREFERENCE,
    defects=openai_pair,
    for_trl=_openai_for_trl,
    identity=lambda row: _conversations("prompt", "chosen", "rejected")(_openai_for_trl(row)),
)
CHAT = Format(
    name="chat",
    columns=("messages",),
    content="messages",
    methods=("supervised",),
    defects=chat,
    for_trl=_message_columns("messages"),
    identity=_conversations("messages"),
)
MESSAGES_COMPLETION = Format(
    name="messages-completion",
    columns=("prompt", "completion"),
    content="messages",
    methods=("supervised",),
    defects=message_completion,
    for_trl=_message_columns("prompt", "completion"),
    identity=_conversations("prompt", "completion"),
)
COMPLETION = Format(
    name="completion",
    columns=("prompt", "completion"),
    content="text",
    methods=("supervised",),
    defects=text_completion,
    for_trl=_columns("prompt", "completion"),
    identity=_texts("prompt", "completion"),
)
MESSAGES_IMPLICIT = Format(
    name="messages-implicit",
    columns=("chosen", "rejected"),
    content="messages",
    methods=PREFERENCE,
    defects=message_implicit,
    for_trl=_message_columns("chosen", "rejected"),
    identity=_conversations("chosen", "rejected"),
)
TRANSCRIPTS = Format(
    name="transcripts",
    columns=("chosen", "rejected"),
    content="text",
    methods=PREFERENCE,
    defects=transcript_pair,
    for_trl=split_transcripts,
    identity=_texts("chosen", "rejected"),
)
TEXT_IMPLICIT = Format(
    name="text-implicit",
    columns=("chosen", "rejected"),
    content="text",
    methods=PREFERENCE,
    defects=text_implicit,
    for_trl=_columns("chosen", "rejected"),
    identity=_texts("chosen", "rejected"),
)
MESSAGES = Format(
    name="messages",
    columns=("prompt", "chosen", "rejected"),
    content="messages",
    methods=PREFERENCE,
    defects=message_pair,
    for_trl=_message_columns("prompt", "chosen", "rejected"),
    identity=_conversations("prompt", "chosen", "rejected"),
)
TEXT = Format(
    name="text",
    columns=("prompt", "chosen", "rejected"),
    content="text",
    methods=PREFERENCE,
    defects=text_pair,
    for_trl=_columns("prompt", "chosen", "rejected"),
    identity=_texts("prompt", "chosen", "rejected"),
)

UNPAIRED = Format(
    name="unpaired",
    columns=("prompt", "completion", "label"),
    content="text",
    methods=("kto",),
    defects=text_completion,
    for_trl=_columns("prompt", "completion", "label"),
    identity=_texts("prompt", "completion", "label"),
)
MESSAGES_UNPAIRED = Format(
    name="messages-unpaired",
    columns=("prompt", "completion", "label"),
    content="messages",
    methods=("kto",),
    defects=message_completion,
    for_trl=lambda row: MESSAGES_COMPLETION.for_trl(row) | {"label": row["label"]},
    identity=lambda row: (MESSAGES_COMPLETION.identity(row), row["label"]),
)

FORMATS = (
    TEXT,
    MESSAGES,
    TEXT_IMPLICIT,
    MESSAGES_IMPLICIT,
    TRANSCRIPTS,
    OPENAI,
    CHAT,
    COMPLETION,
    MESSAGES_COMPLETION,
    UNPAIRED,
    MESSAGES_UNPAIRED,
)

# Every column that some format knows, or refuses.
COLUMNS = tuple(dict.fromkeys(column for shape in FORMATS for column in (*shape.columns, "tools", "functions")))


def format_of(row: Row) -> Format | None:
    """The format a row, right or wrong, is meant to have: by its columns first, then by what these hold.

    None when no column tells: what such a row lacks depends on the format of the file's other rows.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if "chosen" in row or "rejected" in row:
        messages = isinstance(chosen, list) or isinstance(rejected, list)
        if "prompt" in row:
            return MESSAGES if messages or isinstance(row["prompt"], list) else TEXT
        if messages:
            return MESSAGES_IMPLICIT
        return TRANSCRIPTS if _is_transcript(chosen) or _is_transcript(rejected) else TEXT_IMPLICIT
    if "preferred_output" in row or "non_preferred_output" in row:
        return OPENAI
    if "messages" in row:
        return CHAT
    messages = isinstance(row.get("prompt"), list) or isinstance(row.get("completion"), list)
    if "completion" in row:
        # A label that is true or false says whether the completion is a good one. Another one is a column of its own.
        if isinstance(row.get("label"), bool):
            return MESSAGES_UNPAIRED if messages else UNPAIRED
        return MESSAGES_COMPLETION if messages else COMPLETION
    return OPENAI if isinstance(row.get("input"), dict) else None


def _is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.startswith(HUMAN)
