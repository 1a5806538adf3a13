"""Calls of a released client, run by the python of the release's environment.

One call a line of standard input, as JSON {"call": "post_training.job.status", "arguments": {...}}; one answer a line
of standard output: {"answer": ...}, or {"error": class name, "status": code, "message": text}.
"""

import importlib
import json
import sys
from typing import Any


def plain(value: Any) -> Any:
    """As JSON: clients answer with models, lists of models, or nothing."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def main(module: str, kind: str, base_url: str) -> None:
    client: Any = getattr(importlib.import_module(module), kind)(base_url=base_url)
    for line in sys.stdin:
        asked = json.loads(line)
        target: Any = client
        for name in asked["call"].split("."):
            target = getattr(target, name)
        try:
            answer = {"answer": plain(target(**asked["arguments"]))}
        except Exception as error:
            answer = {
                "error": type(error).__name__,
                "status": getattr(error, "status_code", None),
                "message": str(error),
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
