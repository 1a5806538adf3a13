"""How long a row may be, how much is read at once, and what is said when a file cannot be read on."""

from bento_service.training.dataset_report import Defect, DefectCode, Row

MAX_ROW_BYTES = 16 * 2**20  # longest accepted row; it is held in memory whole
CHUNK_BYTES = 2**20

NumberedRow = tuple[int, Row | Defect]


class Unreadable(Exception):
    """The rest of a file cannot be read; the message says why, as the reason of a defect."""

    def __init__(self, reason: str, code: DefectCode = "unreadable") -> None:
        super().__init__(reason)
        self.reason = reason
        self.code: DefectCode = code


def too_long() -> Defect:
    return Defect("too_long", None, f"is longer than {MAX_ROW_BYTES // 2**20} MiB")


def unpacks_to_more(max_bytes: int) -> str:
    return f"is where the unpacked file passes {max_bytes} bytes, the most that is read: split it"
