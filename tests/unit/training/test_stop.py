"""The switch that SIGTERM turns on."""

import signal
from collections.abc import Iterator

import pytest

from bento_service.training.stop import StopRequested, StopSwitch


@pytest.fixture
def stop() -> Iterator[StopSwitch]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    switch = StopSwitch()
    switch.install()
    yield switch
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_the_work_at_once_while_nothing_is_at_stake(stop: StopSwitch, number: signal.Signals) -> None:
    with pytest.raises(StopRequested):
        signal.raise_signal(number)
    assert stop.requested
    signal.raise_signal(number)  # a second one does not disturb what the first one led to


def test_a_deferred_signal_only_sets_the_request(stop: StopSwitch) -> None:
    stop.defer()
    assert not stop.requested
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested


def test_no_library_swallows_a_stop(stop: StopSwitch) -> None:
    assert not issubclass(StopRequested, Exception)
