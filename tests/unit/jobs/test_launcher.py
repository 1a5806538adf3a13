"""The environment of a trainer: an allowlist, its devices, and an allocator that keeps what it has had."""

import subprocess
import sys

import pytest

from bento_service.jobs.launcher import trainer_environment

# Page faults while blocks of 64 MB are taken and freed five times, the first time aside.
PAGE_FAULTS = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for number in range(6):
    if number == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(ctypes.c_size_t(1 << 26)) for _ in range(3)]
    for block in blocks:
        ctypes.memset(block, 1, 1 << 26)
    for block in blocks:
        libc.free(ctypes.c_void_p(block))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(environment):
    run = subprocess.run([sys.executable, "-c", PAGE_FAULTS], env=environment, capture_output=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="settings of glibc's allocator")
def test_on_a_cpu_freed_memory_is_kept():
    pages = 5 * 3 * (1 << 26) // 4096
    assert page_faults({}) > pages / 2
    assert page_faults(trainer_environment((), "cpu")) < pages / 100


def test_the_operator_may_say_otherwise(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    assert trainer_environment((), "cpu")["MALLOC_TRIM_THRESHOLD_"] == "1000"
    assert "MALLOC_MMAP_THRESHOLD_" not in trainer_environment(("0",), "cuda")


def test_devices_and_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = trainer_environment(("2", "5"), "cuda", threads=3)
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("2,5", "3")
    assert trainer_environment((), "cpu")["CUDA_VISIBLE_DEVICES"] == ""
