"""The tables of docs/ that the API's own description fills: parameters, objects and the options of ``trl``.

    python docs/tables.py            write them anew
    python docs/tables.py --check    say which pages are not current; exit status 1 when one is not

A page marks the place of a table by a line ``<!-- table: KIND NAME -->`` and one ``<!-- end -->``. KIND is
``operation`` (NAME: a method and a path), ``object`` (the name of a schema) or ``options``.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bento_service.api.app import create_app

PAGES = Path(__file__).resolve().parent
_PLACE = re.compile(r"(<!-- table: (\w+) ?(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)

# Fields whose own fields have a table of their own elsewhere.
_ELSEWHERE = {
    "trl": "[options](configuration.md#a-job)",
    "TrlOptions": "[options](configuration.md#a-job)",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of docs/ anew.")
    parser.add_argument("--check", action="store_true", help="write nothing; say which pages are not current")
    check = parser.parse_args().check
    tables, stale = Tables(create_app().openapi()), 0
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text()
        current = tables.fill(text)
        if current != text:
            stale += 1
            print(f"{page.name} {'is not current: run python docs/tables.py' if check else 'written'}")
            if not check:
                page.write_text(current)
    return 1 if check and stale else 0


class Tables:
    """Tables in Markdown, from an OpenAPI document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._paths = document["paths"]
        self._schemas = document["components"]["schemas"]

    def fill(self, page: str) -> str:
        """The page with every table as the document has it. Raises KeyError for a name that there is not."""
        return _PLACE.sub(lambda place: place[1] + self._table(place[2], place[3]) + place[4], page)

    def _table(self, kind: str, name: str) -> str:
        if kind == "operation":
            return self._operation(*name.split())
        if kind == "object":
            rows = self._fields(self._schemas[name], answered=True)
            return _markdown(("field", "type", "meaning"), [(f"`{row[0]}`", row[1], row[3]) for row in rows])
        if kind == "options":
            rows = self._fields(self._schemas["TrlOptions"])
            return _markdown(("option", "type", "default", "meaning"), [(f"`{row[0]}`", *row[1:]) for row in rows])
        raise KeyError(kind)

    def _operation(self, method: str, path: str) -> str:
        operation = self._paths[path][method.lower()]
        rows = []
        for parameter in operation.get("parameters", []):
            schema = parameter["schema"]
            meaning = parameter.get("description", "")
            rows.append((f"`{parameter['name']}`", parameter["in"], self._type(schema), _default(schema), meaning))
        for media in operation.get("requestBody", {}).get("content", {}).values():
            rows += [(f"`{row[0]}`", "body", *row[1:]) for row in self._fields(self._resolved(media["schema"]))]
        table = _markdown(("name", "in", "type", "default", "meaning"), rows) if rows else ""
        return table + self._answers(operation["responses"])

    def _answers(self, responses: dict[str, Any]) -> str:
        content = responses["200"].get("content", {})
        answered = [
            self._type(media["schema"]) if "schema" in media else f"`{kind}`" for kind, media in content.items()
        ]
        kinds = [kind for kind in content if kind != "application/json" and f"`{kind}`" not in answered]
        errors = sorted(status for status in responses if not status.startswith("2"))
        what = " or ".join(filter(None, dict.fromkeys([*answered]))) + (f" as `{'`, `'.join(kinds)}`" if kinds else "")
        return f"\nAnswers {what}. Other statuses: {', '.join(errors) or 'none'}.\n"

    def _fields(self, schema: dict[str, Any], prefix: str = "", answered: bool = False) -> Iterator[tuple[str, ...]]:
        """Dotted name, type, default and meaning of every field, those of nested objects in place of these."""
        for name, field in schema["properties"].items():
            nested = None if name in _ELSEWHERE and not answered else self._object(field)
            if nested is not None and nested.get("title") not in _ELSEWHERE:
                yield from self._fields(nested, f"{prefix}{name}.", answered)
                continue
            default = "" if answered else _default(field)
            if not answered and name in schema.get("required", []):
                default = "required"
            kind = self._type(field, name)
            if answered and {"type": "null"} in field.get("anyOf", []):
                kind += " or null"
            yield f"{prefix}{name}", kind, "" if name in _ELSEWHERE else default, field.get("description", "")

    def _object(self, schema: dict[str, Any]) -> dict[str, Any] | None:
        """The one object with named fields that a value of the schema is; None where it may be another thing."""
        found = [self._resolved(part) for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
        return found[0] if len(found) == 1 and "properties" in found[0] else None

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in schema:
            found: dict[str, Any] = self._schemas[schema["$ref"].rpartition("/")[2]]
            return found
        return schema

    def _type(self, schema: dict[str, Any], name: str = "") -> str:
        if name in _ELSEWHERE:
            return _ELSEWHERE[name]
        if "anyOf" in schema:
            return " or ".join(self._type(part) for part in schema["anyOf"] if part.get("type") != "null")
        title = schema["$ref"].rpartition("/")[2] if "$ref" in schema else ""
        schema = self._resolved(schema)
        if "enum" in schema:
            return ", ".join(f"`{value}`" for value in schema["enum"])
        if "const" in schema:
            return f"`{schema['const']}`"
        if title in _ELSEWHERE:
            return _ELSEWHERE[title]
        if title.startswith("ListOf_"):
            entry = title.removeprefix("ListOf_").rstrip("_")
            return f"a [page](#pages) of [{entry}](#{entry.lower()})"
        if title:
            return f"[{title}](#{title.lower()})"
        if schema.get("type") == "array":
            return f"list of {self._type(schema.get('items', {})) or 'anything'}"
        if schema.get("type") == "null":
            return "null"
        return _scalar(schema)


def _scalar(schema: dict[str, Any]) -> str:
    kind = str(schema.get("type", ""))
    if schema.get("format") == "binary":
        return "bytes"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{kind}, {_number(low)} to {_number(high)}"
    bounds = [
        ("minimum", "at least"),
        ("exclusiveMinimum", "more than"),
        ("maximum", "at most"),
        ("exclusiveMaximum", "less than"),
    ]
    said = [f"{words} {_number(schema[key])}" for key, words in bounds if key in schema]
    if "maxLength" in schema:
        said.append(f"at most {schema['maxLength']} characters")
    return ", ".join([kind, *said])


def _number(value: float) -> str:
    powers = {2**31: "2^31", 2**32: "2^32", 2**63: "2^63"}
    if value in powers:
        return powers[int(value)]
    return str(int(value)) if value == int(value) else str(value)


def _default(schema: dict[str, Any]) -> str:
    value = schema.get("default")
    if isinstance(value, float):
        return f"`{value:g}`"
    return "" if value is None else f"`{json.dumps(value)}`"


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    escaped = [[cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


if __name__ == "__main__":
    sys.exit(main())
