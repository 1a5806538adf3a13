"""Rows of messages: what is wrong with them, and their form in TRL."""

from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from bento_service.training.dataset_report import ABSENT, Defect, Row, empty, kind
from bento_service.training.text_rows import PAIR, REPLIES, SAME_REPLIES

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})  # what chat templates know
INSTRUCTIONS = frozenset({"system", "developer"})

# What a message may hold beside its text, and why it is refused: leaving it out would teach something else.
UNTAUGHT = {
    "tool_calls": "calls of tools are not trained on here",
    "function_call": "calls of functions are not trained on here",
    "audio": "only text is trained on here",
}

Messages = list[dict[str, Any]]


def message_pair(row: Row) -> list[Defect]:
    defects = tool_defects(row) + columns_defects(row, PAIR)
    if defects:
        return defects
    return _pair_defects(("prompt", row["prompt"]), ("chosen", row["chosen"]), ("rejected", row["rejected"]))


def openai_pair(row: Row) -> list[Defect]:
    """https://platform.openai.com/docs/guides/direct-preference-optimization"""
    given = row.get("input", ABSENT)
    defects: list[Defect] = []
    if given is ABSENT:
        defects.append(Defect("missing", "input", "is missing"))
    elif not isinstance(given, dict):
        defects.append(Defect("wrong_type", "input", f'must be {{"messages": [...]}}, not {kind(given)}', given))
    else:
        defects += message_defects("input.messages", given.get("messages", ABSENT))
        defects += tool_defects(given, "input.")
    defects += columns_defects(row, ("preferred_output", "non_preferred_output"))
    if defects:
        return defects
    return _pair_defects(
        ("input.messages", row["input"]["messages"]),
        ("preferred_output", row["preferred_output"]),
        ("non_preferred_output", row["non_preferred_output"]),
    )


def message_implicit(row: Row) -> list[Defect]:
    defects = tool_defects(row) + columns_defects(row, REPLIES)
    if defects:
        return defects
    chosen, rejected = spoken(row["chosen"]), spoken(row["rejected"])
    if chosen == rejected:
        return [Defect("equal_replies", "rejected", SAME_REPLIES, chosen[-1][1])]
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if shared == 0:
        reason = "chosen and rejected begin differently: without a prompt column they must share one"
        defects.append(Defect("no_shared_prompt", None, reason))
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) == shared:
            reason = "holds no reply after the messages it shares with the other one"
            defects.append(Defect("no_reply", column, reason, messages[-1][1]))
        else:
            defects += _reply_defects(column, row[column], shared)
    if not defects:
        defects += _order_defects("chosen", row["chosen"], 0)
        defects += _order_defects("rejected", row["rejected"], shared)
    return defects


def chat(row: Row) -> list[Defect]:
    """https://platform.openai.com/docs/guides/supervised-fine-tuning"""
    defects = tool_defects(row) + columns_defects(row, ("messages",))
    if defects:
        return defects
    messages = row["messages"]
    if messages[-1]["role"] != "assistant":
        if not any(message["role"] == "assistant" for message in messages):
            return [Defect("no_reply", "messages", "has no message of the assistant's: that is what is learned")]
        reason = "a conversation ends with the assistant: that is what is learned"
        return [Defect("role_order", f"messages.{len(messages) - 1}.role", reason, messages[-1]["role"])]
    return _order_defects("messages", messages, 0)


def message_completion(row: Row) -> list[Defect]:
    defects = tool_defects(row) + columns_defects(row, ("prompt", "completion"))
    if not defects:
        defects += _prompt_defects("prompt", row["prompt"])
        defects += _reply_defects("completion", row["completion"], 0)
    return defects


def tool_defects(holder: dict[str, Any], prefix: str = "") -> list[Defect]:
    """Definitions of tools beside messages: a model cannot learn to call what it is not shown."""
    if "tools" not in holder and "functions" not in holder:
        return []
    return [
        Defect("unsupported", prefix + name, "are not trained on here: leave them out", holder[name])
        for name in ("tools", "functions")
        if holder.get(name)
    ]


def columns_defects(row: Row, columns: Iterable[str]) -> list[Defect]:
    defects: list[Defect] = []
    for column in columns:
        messages = row.get(column, ABSENT)
        if not _are_sound(messages):  # they nearly always are, and this is quicker than finding out what is wrong
            defects += message_defects(column, messages)
    return defects


def message_defects(column: str, messages: object) -> list[Defect]:
    """What is wrong with a list of messages, each by itself; ``messages`` is ABSENT when there is none."""
    if messages is ABSENT:
        return [Defect("missing", column, "is missing")]
    if not isinstance(messages, list):
        reason = f"must be a list of messages, as the other columns are, not {kind(messages)}"
        return [Defect("wrong_type", column, reason, messages)]
    if not messages:
        return [Defect("empty", column, "has no messages", messages)]
    defects: list[Defect] = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            reason = f'must be {{"role": ..., "content": ...}}, not {kind(message)}'
            defects.append(Defect("wrong_type", f"{column}.{index}", reason, message))
            continue
        role, content = message.get("role", ABSENT), message.get("content", ABSENT)
        place = f"{column}.{index}"
        if untaught := _untaught(message):
            name, reason = untaught
            defects.append(Defect("unsupported", f"{place}.{name}", reason, message[name]))
            continue
        if role is ABSENT:
            defects.append(Defect("missing", f"{place}.role", "is missing"))
        elif not isinstance(role, str) or role not in ROLES:
            reason = f"must be one of {', '.join(sorted(ROLES))}"
            defects.append(Defect("unknown_role", f"{place}.role", reason, role))
        if content is ABSENT:
            defects.append(Defect("missing", f"{place}.content", "is missing"))
        elif not isinstance(content, str):
            defects.append(Defect("wrong_type", f"{place}.content", f"must be text, not {kind(content)}", content))
        elif not content or content.isspace():
            defects.append(empty(content, f"{place}.content"))
    return defects


def _are_sound(messages: object) -> bool:
    """Whether these are messages in which ``message_defects`` finds nothing."""
    if type(messages) is not list or not messages:
        return False
    for message in messages:
        try:
            role, content = message["role"], message["content"]
        except (TypeError, KeyError):
            return False
        if type(role) is not str or role not in ROLES or type(content) is not str or not content or content.isspace():
            return False
        if len(message) > 2 and _untaught(message):
            return False
    return True


def _untaught(message: dict[str, Any]) -> tuple[str, str] | None:
    """What a message holds that cannot be learned from, and why."""
    for name, reason in UNTAUGHT.items():
        if message.get(name):
            return name, f"{reason}: leave the row out"
    # OpenAI's way to leave a turn of the assistant's out of the loss.
    if message.get("weight", 1) == 0:
        return (
            "weight",
            "leaves a message out of the training, which is not done here: leave the weight or the row out",
        )
    return None


def plain(messages: Messages) -> Messages:
    """Messages with role and content only."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def spoken(messages: Messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def _pair_defects(
    prompt: tuple[str, Messages], chosen: tuple[str, Messages], rejected: tuple[str, Messages]
) -> list[Defect]:
    """What is wrong between sound messages, each with the name of its column."""
    defects = _prompt_defects(*prompt)
    for column, messages in (chosen, rejected):
        defects += _reply_defects(column, messages, 0)
    last = rejected[1][-1]["content"]
    if chosen[1][-1]["content"] == last and spoken(chosen[1]) == spoken(rejected[1]):
        reason = f"is the same as {chosen[0]}: there is nothing to prefer"
        defects.append(Defect("equal_replies", rejected[0], reason, last))
    return defects


def _prompt_defects(column: str, messages: Messages) -> list[Defect]:
    if messages[-1]["role"] == "assistant":
        reason = "ends with the assistant: the reply needs something to reply to"
        return [Defect("role_order", column, reason, messages[-1]["content"])]
    return _order_defects(column, messages, 0)


def _reply_defects(column: str, messages: Messages, start: int) -> list[Defect]:
    if len(messages) - start == 1 and messages[start]["role"] == "assistant":
        return []  # nearly every reply
    for index in (start, len(messages) - 1):
        role = messages[index]["role"]
        if role != "assistant":
            return [Defect("role_order", f"{column}.{index}.role", "a reply begins and ends with the assistant", role)]
    return _order_defects(column, messages, start + 1)


def _order_defects(column: str, messages: Messages, start: int) -> list[Defect]:
    """The first message from ``start`` on whose role cannot follow what was said before it.

    Two messages of the same role in a row are accepted: most chat templates render them.
    """
    role = messages[start - 1]["role"] if start else None
    for index in range(start, len(messages)):
        message = messages[index]
        previous, role = role, message["role"]
        if role == "user":
            continue
        if role in INSTRUCTIONS and previous is not None and previous not in INSTRUCTIONS:
            reason = "is an instruction after the conversation began: it comes first"
        elif role == "assistant" and (previous is None or previous in INSTRUCTIONS):
            reason = "the assistant speaks first: a conversation begins with the user"
        elif role == "tool" and previous not in ("assistant", "tool"):
            reason = "a tool's result does not follow the assistant's call"
        else:
            continue
        return [Defect("role_order", f"{column}.{index}.role", reason, role)]
    return []
