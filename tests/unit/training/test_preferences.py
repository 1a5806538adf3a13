"""What the check of a data file reports, and what a recipe gets from it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from bento_service.errors import InvalidDataset
from bento_service.training import preferences
from bento_service.training.dataset_report import SHOWN_VALUE, DefectCode
from bento_service.training.preferences import check_file, load_rows, require_valid
from bento_service.training.row_bounds import Bounds
from bento_service.training.row_formats import FORMATS

TEXT = {"prompt": "Hello", "chosen": "Hi there.", "rejected": "Go away."}
MESSAGES = {
    "prompt": [{"role": "user", "content": "Hello"}],
    "chosen": [{"role": "assistant", "content": "Hi there."}],
    "rejected": [{"role": "assistant", "content": "Go away."}],
}
IMPLICIT_TEXT = {"chosen": "User: hello. Bot: hi", "rejected": "User: hello. Bot: no"}
IMPLICIT_MESSAGES = {
    "chosen": MESSAGES["prompt"] + MESSAGES["chosen"],
    "rejected": MESSAGES["prompt"] + MESSAGES["rejected"],
}
TRANSCRIPT = {
    "chosen": "\n\nHuman: hello\n\nAssistant: yes?\n\nHuman: go\n\nAssistant: I will.",
    "rejected": "\n\nHuman: hello\n\nAssistant: yes?\n\nHuman: go\n\nAssistant: Never.",
}
OPENAI: dict[str, Any] = {
    "input": {"messages": MESSAGES["prompt"], "tools": [], "parallel_tool_calls": True},
    "preferred_output": MESSAGES["chosen"],
    "non_preferred_output": MESSAGES["rejected"],
}
CHAT = {"messages": MESSAGES["prompt"] + MESSAGES["chosen"]}
COMPLETION = {"prompt": "Hello", "completion": "Hi there."}
MESSAGE_COMPLETION = {"prompt": MESSAGES["prompt"], "completion": MESSAGES["chosen"]}
UNPAIRED = {**COMPLETION, "label": False}
CALL = [{"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}]
SYSTEM_LATE = [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Be nice."}]

# A row of each format, its form for TRL, and the method that it is for.
GOOD = {
    "text": (TEXT, TEXT, "dpo"),
    "messages": (MESSAGES, MESSAGES, "dpo"),
    "text-implicit": (IMPLICIT_TEXT, IMPLICIT_TEXT, "dpo"),
    "messages-implicit": (IMPLICIT_MESSAGES, IMPLICIT_MESSAGES, "dpo"),
    "transcripts": (
        TRANSCRIPT,
        {
            "prompt": "\n\nHuman: hello\n\nAssistant: yes?\n\nHuman: go\n\nAssistant:",
            "chosen": " I will.",
            "rejected": " Never.",
        },
        "dpo",
    ),
    "openai": (OPENAI, MESSAGES, "dpo"),
    "chat": (CHAT, CHAT, "supervised"),
    "completion": (COMPLETION, COMPLETION, "supervised"),
    "messages-completion": (MESSAGE_COMPLETION, MESSAGE_COMPLETION, "supervised"),
    "unpaired": (UNPAIRED, UNPAIRED, "kto"),
    "messages-unpaired": (MESSAGE_COMPLETION | {"label": True}, MESSAGE_COMPLETION | {"label": True}, "kto"),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_lines(*lines: dict[str, Any] | list[Any] | str | bytes) -> Path:
        path = tmp_path / "rows.jsonl"
        encoded = [
            line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
            for line in lines
        ]
        path.write_bytes(b"\n".join(encoded))
        return path

    return write_lines


def said(role: str, content: object) -> list[dict[str, object]]:
    return [{"role": role, "content": content}]


# The methods that train on the rows of one of them.
FIT = {"dpo": ("dpo", "reward"), "supervised": ("supervised",), "kto": ("kto",)}


@pytest.mark.parametrize("name", GOOD)
def test_good_rows_of_each_format_are_accepted_and_loaded(write: Callable[..., Path], name: str) -> None:
    row, for_trl, method = GOOD[name]
    path = write(row, row)
    report = require_valid(path, method=method)
    assert (report.format, report.rows, report.problems, report.total_problems) == (name, 2, (), 0)
    assert (report.container, report.gzipped, report.methods, report.bad_rows) == ("jsonl", False, FIT[method], 0)
    assert list(load_rows(path)) == [for_trl, for_trl]


@pytest.mark.parametrize("name", GOOD)
def test_rows_for_the_other_method_are_refused(write: Callable[..., Path], name: str) -> None:
    row, _, method = GOOD[name]
    fitting = " or ".join(FIT[method])
    for other in {"dpo", "supervised", "kto", "reward"} - {*FIT[method]}:
        said = f"format {name}, which are for {fitting} jobs: a {other} job needs .* Set the method to {fitting}"
        with pytest.raises(InvalidDataset, match=said) as caught:
            require_valid(write(row), method=other)
        assert caught.value.report.methods == FIT[method]


def test_a_label_that_is_no_boolean_is_a_column_of_its_own(write: Callable[..., Path]) -> None:
    assert require_valid(write({**COMPLETION, "label": "greeting"}), method="supervised").format == "completion"


def test_the_documentation_has_a_good_row_of_every_format_and_all_codes(write: Callable[..., Path]) -> None:
    text = (Path(__file__).parents[3] / "docs" / "datasets.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| ([\w, ]+) \| `(.*)` \|$", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == [shape.name for shape in FORMATS]
    for name, methods, row in rows:
        for method in methods.split(", "):
            assert require_valid(write(row), method=method).format == name
    assert set(get_args(DefectCode)) <= set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def test_loading_keeps_only_what_the_format_knows(write: Callable[..., Path]) -> None:
    row = {**MESSAGES, "prompt": [{"role": "user", "content": "Hello", "name": "Ann"}], "score": 3}
    assert list(load_rows(write(row))) == [MESSAGES]


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_no_problem(write: Callable[..., Path]) -> None:
    line = json.dumps(TEXT).encode()
    report = check_file(write(b"\xef\xbb\xbf" + line + b"\r", b"", b"  ", line, b""))
    assert (report.rows, report.total_problems) == (2, 0)


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        ("{not json", None, "is not JSON"),
        ("[[1, 2]]", None, "must be a JSON object, not a list"),
        ("null", None, "must be a JSON object, not null"),
        ('{"prompt": "a", "chosen": "b", "rejected": NaN}', None, "NaN is not a JSON value"),
        ('{"prompt": "a", "chosen": "b", "rejected": ' + "9" * 5000 + "}", None, "is not JSON"),
        ("[" * 100_000, None, "is not JSON"),
        ('{"prompt": ' + "[" * 100_000, None, "is nested too deep"),
        ("garbage", None, "is neither JSON nor a CSV header"),
        (b'{"prompt": "\xff"}', None, "is not UTF-8 at byte 12"),
        ({"chosen": "a", "prompt": "p"}, "rejected", "is missing"),
        ({"prompt": "p"}, "chosen", "is missing"),
        ({}, "prompt", "is missing"),
        ({**TEXT, "chosen": ""}, "chosen", "is empty"),
        ({**TEXT, "prompt": " \n"}, "prompt", "is only white space"),
        ({**TEXT, "chosen": None}, "chosen", "not null"),
        ({**TEXT, "chosen": 1.5}, "chosen", "not a number"),
        ({**TEXT, "chosen": True}, "chosen", "not a boolean"),
        ({**TEXT, "rejected": TEXT["chosen"]}, "rejected", "is the same as chosen"),
        ('{"prompt": "p", "chosen": "\\ud800", "rejected": "r"}', "chosen", "half of a surrogate pair"),
        ({**MESSAGES, "prompt": "text"}, "prompt", "must be a list of messages"),
        ({**MESSAGES, "chosen": "text"}, "chosen", "must be a list of messages"),
        ({**MESSAGES, "chosen": []}, "chosen", "has no messages"),
        ({**MESSAGES, "chosen": ["text"]}, "chosen.0", "not text"),
        ({**MESSAGES, "chosen": said("robot", "Hi")}, "chosen.0.role", "must be one of"),
        ({**MESSAGES, "chosen": said("user", "Hi")}, "chosen.0.role", "begins and ends with the assistant"),
        ({**MESSAGES, "prompt": said("assistant", "Hi")}, "prompt", "ends with the assistant"),
        ({**MESSAGES, "chosen": [{"role": "assistant"}]}, "chosen.0.content", "is missing"),
        ({**MESSAGES, "chosen": [{"content": "Hi"}]}, "chosen.0.role", "is missing"),
        ({**MESSAGES, "chosen": said("assistant", [{"type": "text"}])}, "chosen.0.content", "must be text"),
        ({**MESSAGES, "chosen": said("assistant", " ")}, "chosen.0.content", "is only white space"),
        ({**MESSAGES, "rejected": MESSAGES["chosen"]}, "rejected", "is the same as chosen"),
        ({"chosen": "a", "rejected": "b"}, None, "begin differently"),
        ({"chosen": "same start", "rejected": "same"}, "rejected", "holds no reply"),
        ({"chosen": MESSAGES["chosen"], "rejected": MESSAGES["rejected"]}, None, "begin differently"),
        ({**MESSAGES, "prompt": SYSTEM_LATE}, "prompt.1.role", "an instruction after the conversation began"),
        ({**MESSAGES, "prompt": said("assistant", "Hi") + said("user", "Hi")}, "prompt.0.role", "speaks first"),
        ({**MESSAGES, "prompt": said("user", "Hi") + said("tool", "42")}, "prompt.1.role", "tool's result"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"},
            None,
            "the transcripts differ before their last",
        ),
        (
            {**TRANSCRIPT, "rejected": TRANSCRIPT["rejected"] + "\n\nHuman: thanks"},
            "rejected",
            "ends with the human's turn",
        ),
        ({**TRANSCRIPT, "rejected": "\n\nHuman: hello"}, "rejected", "has no"),
        ({**TRANSCRIPT, "rejected": "hello"}, "rejected", "does not begin with"),
        ({**TRANSCRIPT, "rejected": "\n\nHuman: hello\n\nAssistant: "}, "rejected", "holds nothing after"),
        ({**TRANSCRIPT, "rejected": TRANSCRIPT["chosen"]}, "rejected", "is the same as chosen"),
        ({**OPENAI, "input": {}}, "input.messages", "is missing"),
        ({**OPENAI, "input": "Hello"}, "input", "must be"),
        ({**OPENAI, "input": {**OPENAI["input"], "tools": [{}]}}, "input.tools", "are not trained on here"),
        ({**OPENAI, "preferred_output": said("user", "a")}, "preferred_output.0.role", "begins and ends"),
        ({"input": OPENAI["input"], "preferred_output": said("assistant", "a")}, "non_preferred_output", "is missing"),
        (
            {**OPENAI, "non_preferred_output": OPENAI["preferred_output"]},
            "non_preferred_output",
            "is the same as preferred_output",
        ),
        ({"messages": said("user", "Hi")}, "messages", "has no message of the assistant's"),
        ({"messages": CHAT["messages"] + said("user", "Bye")}, "messages.2.role", "ends with the assistant"),
        ({"messages": said("assistant", "Hi")}, "messages.0.role", "speaks first"),
        ({"messages": []}, "messages", "has no messages"),
        ({"messages": said("user", "Hi") + said("assistant", "")}, "messages.1.content", "is empty"),
        (
            {"messages": CHAT["messages"] + SYSTEM_LATE[1:] + CHAT["messages"]},
            "messages.2.role",
            "an instruction after",
        ),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools", "are not trained on here"),
        ({"messages": said("user", "Hi") + CALL}, "messages.1.tool_calls", "calls of tools are not trained on"),
        ({**MESSAGES, "chosen": CALL}, "chosen.0.tool_calls", "calls of tools are not trained on"),
        (
            {"messages": [*said("user", "Hi"), {"role": "assistant", "content": "x", "weight": 0}]},
            "messages.1.weight",
            "leaves a message out",
        ),
        ({**MESSAGE_COMPLETION, "completion": []}, "completion", "has no messages"),
        ({**MESSAGE_COMPLETION, "completion": said("user", "a")}, "completion.0.role", "begins and ends"),
        (
            {**MESSAGE_COMPLETION, "completion": said("assistant", "a") + SYSTEM_LATE[1:] + said("assistant", "b")},
            "completion.1.role",
            "an instruction after",
        ),
        ({**MESSAGE_COMPLETION, "completion": "text"}, "completion", "must be a list of messages"),
        ({**MESSAGE_COMPLETION, "prompt": said("assistant", "a")}, "prompt", "ends with the assistant"),
        ({"completion": "a"}, "prompt", "is missing"),
        ({**COMPLETION, "completion": None}, "completion", "not null"),
        ({**UNPAIRED, "completion": " "}, "completion", "is only white space"),
        ({"messages": "Hi"}, "messages", "must be a list"),
        ({"prompt": "a", "completion": ""}, "completion", "is empty"),
        (
            {"chosen": IMPLICIT_MESSAGES["chosen"], "rejected": MESSAGES["prompt"]},
            "rejected",
            "holds no reply after the messages",
        ),
    ],
)
def test_a_bad_row_is_reported_with_its_place(
    write: Callable[..., Path], line: dict[str, Any] | str | bytes, field: str | None, reason: str
) -> None:
    report = check_file(write(line))
    assert report.rows == 1
    assert report.total_problems == len(report.problems) >= 1
    problem = report.problems[0]
    assert problem.row == 1
    assert problem.field == field
    assert reason in problem.message
    assert problem.value is None or len(problem.value) <= SHOWN_VALUE
    json.dumps(problem.value).encode()


@pytest.mark.parametrize("odd", [1, 2, 5])
def test_the_odd_row_is_reported_wherever_it_stands(write: Callable[..., Path], odd: int) -> None:
    rows = [{**TEXT, "prompt": f"Question {number}"} for number in range(4)]
    report = check_file(write(*rows[: odd - 1], MESSAGES, *rows[odd - 1 :]))
    assert (report.format, report.formats, report.bad_rows) == ("text", {"text": 4, "messages": 1}, 1)
    assert [(problem.row, problem.code, problem.message) for problem in report.problems] == [
        (
            odd,
            "mixed_formats",
            "is messages (prompt, chosen, rejected: lists of messages) although 4 of 5 rows are "
            "text (prompt, chosen, rejected: text): use one format",
        )
    ]


def test_without_a_majority_the_most_frequent_format_is_the_files(write: Callable[..., Path]) -> None:
    report = check_file(write(TEXT, MESSAGES, CHAT, MESSAGES, TEXT))
    assert (report.format, report.formats) == ("text", {"text": 2, "messages": 2, "chat": 1})
    assert [problem.row for problem in report.problems] == [2, 3, 4]
    assert "none that most have (text 2 rows, messages 2 rows, chat 1 rows)" in str(report.refusal)


def test_problems_of_all_formats_are_listed_by_row_and_counted_beyond_the_cap(write: Callable[..., Path]) -> None:
    block = ["{", MESSAGES, {}, {**TEXT, "chosen": ""}, TEXT, TEXT]
    report = check_file(write(*block * 5), cap=6)
    assert [(problem.row, problem.code) for problem in report.problems] == [
        (1, "not_json"),
        (2, "mixed_formats"),
        (3, "missing"),
        (3, "missing"),
        (3, "missing"),
        (4, "empty"),
    ]
    assert (report.rows, report.bad_rows, report.total_problems) == (30, 20, 30)
    assert report.counts == {"not_json": 5, "mixed_formats": 5, "missing": 15, "empty": 5, "duplicate": 9}
    assert (len(report.warnings), report.total_warnings) == (6, 9)


def test_a_row_without_telling_columns_lacks_those_of_the_files_format(write: Callable[..., Path]) -> None:
    report = check_file(write({"prompt": "Hello", "answer": 1}, COMPLETION), method="supervised")
    assert [(problem.row, problem.field, problem.message) for problem in report.problems] == [
        (1, "completion", "is missing: the row has prompt, answer")
    ]


def test_the_report_as_json(write: Callable[..., Path]) -> None:
    report = check_file(write(TEXT, {**TEXT, "chosen": ""}, TEXT))
    assert json.loads(json.dumps(report.to_json())) == {
        "valid": False,
        "refusal": "has 1 of 3 rows that cannot be trained on: row 2, chosen is empty",
        "method": "dpo",
        "container": "jsonl",
        "gzipped": False,
        "format": "text",
        "formats": {"text": 3},
        "methods": ["dpo", "reward"],
        "rows": 3,
        "bad_rows": 1,
        "problems": [{"row": 2, "field": "chosen", "code": "empty", "message": "is empty", "value": ""}],
        "total_problems": 1,
        "counts": {"empty": 1, "duplicate": 1},
        "warnings": [
            {"row": 3, "field": None, "code": "duplicate", "message": "says the same as row 1", "value": None}
        ],
        "total_warnings": 1,
    }


def test_row_numbers_are_line_numbers(write: Callable[..., Path]) -> None:
    report = check_file(write(TEXT, "", "", {**TEXT, "chosen": ""}))
    assert report.problems[0].row == 4


def test_equal_pairs_are_a_warning_with_the_first_one(write: Callable[..., Path]) -> None:
    other = {**TEXT, "prompt": "Bye"}
    report = require_valid(write(TEXT, other, {**TEXT, "score": 1}, other), cap=1)
    assert [(warning.row, warning.message) for warning in report.warnings] == [(3, "says the same as row 1")]
    assert (report.total_warnings, report.counts, report.total_problems) == (2, {"duplicate": 2}, 0)


@pytest.mark.parametrize("name", GOOD)
def test_equal_rows_of_every_format_are_noticed(write: Callable[..., Path], name: str) -> None:
    assert check_file(write(GOOD[name][0], GOOD[name][0])).counts == {"duplicate": 1}


def test_equal_pairs_are_looked_for_in_bounded_memory(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preferences, "MAX_DIGESTS", 1)
    other = {**TEXT, "prompt": "Bye"}
    assert [warning.row for warning in check_file(write(TEXT, other, other, TEXT)).warnings] == [4]


def test_fifteen_defects_in_forty_rows_are_those_fifteen(write: Callable[..., Path]) -> None:
    def row(number: int, **changes: object) -> dict[str, object]:
        return {**MESSAGES, "prompt": said("user", f"Question {number}")} | changes

    lines: list[Any] = [row(number) for number in range(1, 41)]
    rejected = {key: value for key, value in row(2).items() if key != "rejected"}
    defects: dict[int, tuple[Any, str | None, str]] = {
        2: (rejected, "rejected", "is missing"),
        4: (row(4, rejected=MESSAGES["chosen"]), "rejected", "is the same as chosen"),
        7: (row(7, chosen=said("assistant", "")), "chosen.0.content", "is empty"),
        9: (row(9, rejected=said("assistant", " \n")), "rejected.0.content", "is only white space"),
        12: (row(12, prompt=SYSTEM_LATE), "prompt.1.role", "an instruction after the conversation began"),
        13: (row(13, chosen=said("assistant", 7)), "chosen.0.content", "must be text, not a number"),
        16: (TEXT, None, "is text (prompt, chosen, rejected: text) although 34 of 35 rows are messages"),
        18: (json.dumps(row(18)).encode().replace(b"Question", b"Quest\xff"), None, "is not UTF-8 at byte"),
        20: (row(20, chosen=float("nan")), None, "NaN is not a JSON value"),
        23: ('{"prompt": [', None, "is not JSON"),
        27: ("[1, 2]", None, "must be a JSON object, not a list"),
        30: (row(30, prompt=said("robot", "Hi")), "prompt.0.role", "must be one of"),
        33: (row(33, rejected="No."), "rejected", "must be a list of messages"),
        36: (row(36, chosen=[]), "chosen", "has no messages"),
        40: (json.dumps(row(40, chosen=said("assistant", "\ud800"))), "chosen.0.content", "half of a surrogate pair"),
    }
    for number, (line, _, _) in defects.items():
        lines[number - 1] = line
    with pytest.raises(InvalidDataset, match="15 of 40 rows") as caught:
        require_valid(write(*lines))
    found = caught.value.problems
    assert caught.value.report.total_problems == len(found) == len(defects) == 15
    assert [(problem.row, problem.field) for problem in found] == [(n, field) for n, (_, field, _) in defects.items()]
    for problem, (_, _, reason) in zip(found, defects.values(), strict=True):
        assert reason in problem.message
    report = check_file(write(*lines))
    assert (report.bad_rows, report.total_warnings, sum(report.counts.values())) == (15, 0, 15)
    assert report.counts == {
        "missing": 1,
        "equal_replies": 1,
        "empty": 3,
        "role_order": 1,
        "wrong_type": 2,
        "mixed_formats": 1,
        "not_utf8": 1,
        "not_json": 2,
        "not_an_object": 1,
        "unknown_role": 1,
        "surrogate": 1,
    }


def test_problems_are_listed_up_to_the_cap_and_counted_beyond(write: Callable[..., Path]) -> None:
    path = write(TEXT, *({**TEXT, "chosen": ""} for _ in range(9)))
    with pytest.raises(InvalidDataset) as caught:
        require_valid(path, param="validation_file", cap=5)
    assert len(caught.value.problems) == 5
    assert caught.value.report.total_problems == 9
    assert caught.value.param == "validation_file"
    assert "row 2, chosen is empty" in caught.value.message
    assert "6 more problems" in caught.value.message


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(write: Callable[..., Path], content: bytes) -> None:
    with pytest.raises(InvalidDataset, match="training_file is empty"):
        require_valid(write(content))


def test_a_line_without_end_is_not_read_whole(write: Callable[..., Path]) -> None:
    report = check_file(write({**TEXT, "prompt": "x" * 1000}, TEXT), bounds=Bounds(row_bytes=200))
    assert report.rows == 2
    assert [problem.row for problem in report.problems] == [1]
    assert "is longer than" in report.problems[0].message


def test_loading_a_file_that_changed_since_its_check_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(InvalidDataset, match="row 2 is not JSON"):
        list(load_rows(write(TEXT, "{")))
