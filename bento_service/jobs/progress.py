"""How far a job is, derived from its trainer's events one at a time."""

from collections.abc import Mapping
from typing import Any

from bento_service.training.events import TrainerEvent


def advance(progress: Mapping[str, Any], event: TrainerEvent) -> dict[str, Any]:
    """The progress after one more event.

    One key beside those of ``jobs.job.Progress``: ``origin``, time and step at which this attempt began to train,
    from which the remaining time is estimated.
    """
    data = event.data
    if event.type == "evaluation":
        values = _numbers(data)
        baseline = {"baseline": values} if data.get("step") == 0 else {}
        return {**progress, **baseline, "evaluation": values}
    if best := data.get("best"):
        return {**progress, "best": best}
    if event.type not in ("progress", "metrics"):
        return dict(progress)
    counters = {key: data[key] for key in ("step", "total_steps", "epoch", "tokens") if data.get(key) is not None}
    after = {**progress, **counters}
    if event.type == "progress":
        after["origin"] = {"time": event.time, "step": after.get("step", 0)}
    else:
        after["metrics"] = _numbers(data)
    after["estimated_finish"] = _estimated_finish(after, event.time)
    return after


def _estimated_finish(progress: Mapping[str, Any], now: float) -> int | None:
    """Unix seconds at which the last step ends if the rest goes on at this attempt's average pace."""
    origin, total = progress.get("origin"), progress.get("total_steps")
    if origin is None or total is None or progress["step"] <= origin["step"]:
        return None
    pace = (now - origin["time"]) / (progress["step"] - origin["step"])
    return round(now + pace * (total - progress["step"]))


def _numbers(data: Mapping[str, Any]) -> dict[str, float | None]:
    counters = {"step", "total_steps", "epoch", "tokens"}
    return {key: value for key, value in data.items() if key not in counters and isinstance(value, int | float | None)}
