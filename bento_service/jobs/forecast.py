"""When a queued job is likely to start, told from what runs now and how long jobs took lately."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True, kw_only=True)
class Occupation:
    """A running job and the devices that it holds. Times are unix seconds."""

    devices: int
    started_at: float
    estimated_finish: int | None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the forecast is made from."""

    running: Sequence[Occupation]
    recent_seconds: Sequence[float]  # how long the jobs that ended last have run


def estimated_start(workload: Workload, *, devices: int, wanted: int, ahead: int, now: float) -> int | None:
    """Unix seconds at which a job that wants ``wanted`` devices starts, with jobs that want ``ahead`` before it.

    Devices are handed out in the order in which they become free, and each is then taken for the mean running time
    of recent jobs: a job whose last device is number n, counted from 0 over all ``devices``, waits for device n %
    devices and n // devices mean running times. Exact for jobs of one device and equal length. None where a running
    time is needed and no job has ended yet, or no device exists.
    """
    mean = fmean(workload.recent_seconds) if workload.recent_seconds else None
    free_at: list[float] = []
    for job in workload.running:
        finish: float | None = job.estimated_finish
        if finish is None:
            finish = float("inf") if mean is None else job.started_at + mean
        free_at += [max(now, finish)] * job.devices
    free_at += [now] * (devices - len(free_at))
    if not free_at:
        return None
    rounds, device = divmod(ahead + wanted - 1, len(free_at))
    moment = sorted(free_at)[device]
    if moment == float("inf") or (rounds > 0 and mean is None):
        return None
    return round(moment + rounds * (mean or 0.0))
