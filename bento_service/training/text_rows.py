"""Rows of text: what is wrong with them, and their form in TRL."""

from bento_service.training.dataset_report import Defect, Row, text_defects

# The turns of Anthropic's HH-RLHF transcripts (https://huggingface.co/datasets/Anthropic/hh-rlhf).
HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"

PAIR = ("prompt", "chosen", "rejected")
REPLIES = ("chosen", "rejected")
SAME_REPLIES = "is the same as chosen: there is nothing to prefer"


def text_pair(row: Row) -> list[Defect]:
    defects = text_defects(row, PAIR)
    if not defects and row["chosen"] == row["rejected"]:
        defects.append(Defect("equal_replies", "rejected", SAME_REPLIES, row["rejected"]))
    return defects


def text_implicit(row: Row) -> list[Defect]:
    defects = text_defects(row, REPLIES)
    if defects:
        return defects
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen == rejected:
        return [Defect("equal_replies", "rejected", SAME_REPLIES, rejected)]
    # Where TRL's extract_prompt cuts: at the first difference, or before the space in front of it.
    shared = shared_length(chosen, rejected)
    if not chosen[:shared].strip():
        reason = "chosen and rejected begin differently: without a prompt column they must share one"
        defects.append(Defect("no_shared_prompt", None, reason))
    for column in REPLIES:
        if not row[column][shared:].strip():
            reason = "holds no reply after the beginning it shares with the other one"
            defects.append(Defect("no_reply", column, reason, row[column]))
    return defects


def transcript_pair(row: Row) -> list[Defect]:
    defects = text_defects(row, REPLIES)
    if defects:
        return defects
    turns = []  # where the last reply's turn begins
    for column in REPLIES:
        text = row[column]
        last = text.rfind(ASSISTANT)
        turns.append(last)
        if not text.startswith(HUMAN):
            reason = r'does not begin with "\n\nHuman:", as the other transcript does'
            defects.append(Defect("role_order", column, reason, text))
        elif last < 0:
            defects.append(Defect("no_reply", column, r'has no "\n\nAssistant:" turn', text))
        elif text.find(HUMAN, last) >= 0:
            reason = "ends with the human's turn: a transcript ends with the assistant's"
            defects.append(Defect("role_order", column, reason, text[text.rfind(HUMAN) :]))
        elif not text[last + len(ASSISTANT) :].strip():
            defects.append(Defect("no_reply", column, r'holds nothing after its last "\n\nAssistant:"', text[last:]))
    if defects:
        return defects
    prompt, other = row["chosen"][: turns[0]], row["rejected"][: turns[1]]
    if prompt != other:
        shared = shared_length(prompt, other)
        reason = (
            r'the transcripts differ before their last "\n\nAssistant:", from character '
            f"{shared} on: they must share all but the last reply"
        )
        return [Defect("no_shared_prompt", None, reason, row["rejected"][shared:])]
    if row["chosen"] == row["rejected"]:
        return [Defect("equal_replies", "rejected", SAME_REPLIES, row["rejected"][len(prompt) :])]
    return []


def split_transcripts(row: Row) -> Row:
    """A pair of transcripts as prompt (up to and with the last ``\\n\\nAssistant:``), chosen and rejected."""
    cut = row["chosen"].rfind(ASSISTANT) + len(ASSISTANT)
    return {"prompt": row["chosen"][:cut], "chosen": row["chosen"][cut:], "rejected": row["rejected"][cut:]}


def text_completion(row: Row) -> list[Defect]:
    return text_defects(row, ("prompt", "completion"))


def shared_length(a: str, b: str) -> int:
    """How many leading characters two texts share, by bisection: comparing slices is what Python does fast."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
