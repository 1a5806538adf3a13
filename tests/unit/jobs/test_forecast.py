"""The estimated start: exact where it can be, and silent where nothing is known."""

import pytest

from bento_service.jobs.forecast import Occupation, Workload, estimated_start

NOW = 1000.0


def running(finish, *, devices=1, started=900.0):
    return Occupation(devices=devices, started_at=started, estimated_finish=finish)


def start(jobs=(), recent=(), *, devices=1, wanted=1, ahead=0):
    workload = Workload(running=jobs, recent_seconds=recent)
    return estimated_start(workload, devices=devices, wanted=wanted, ahead=ahead, now=NOW)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 1000),  # a free device, nobody before it
        ({"jobs": [running(1300)]}, 1300),
        ({"jobs": [running(950)]}, 1000),  # late: it ends any moment
        ({"jobs": [running(None)], "recent": [400.0, 600.0]}, 1400),  # 900 + the mean of 500
        ({"jobs": [running(1300)], "recent": [500.0], "ahead": 3}, 2800),
        ({"jobs": [running(1300), running(1100)], "devices": 2}, 1100),
        ({"jobs": [running(1300), running(1100)], "devices": 2, "wanted": 2}, 1300),
        ({"jobs": [running(1300), running(1100)], "devices": 2, "ahead": 1}, 1300),
        ({"jobs": [running(1300), running(1100)], "devices": 2, "ahead": 2, "recent": [500.0]}, 1600),
        ({"jobs": [running(1300, devices=2)], "devices": 3, "wanted": 2}, 1300),
        ({"jobs": [running(1300, devices=2)], "devices": 1}, 1300),  # on other hosts too
    ],
)
def test_start(given, expected):
    assert start(**given) == expected


@pytest.mark.parametrize("given", [{"ahead": 1}, {"jobs": [running(None)]}, {"devices": 0}])
def test_what_is_unknown_is_not_guessed(given):
    assert start(**given) is None
