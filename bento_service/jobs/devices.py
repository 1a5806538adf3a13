"""What this host trains on, counted without torch (a CUDA context would cost the API process its memory)."""

import os
import platform
from dataclasses import dataclass
from typing import Any, Literal

import pynvml

from bento_service import host_memory
from bento_service.settings import Settings


@dataclass(frozen=True)
class Devices:
    """The places where jobs can run: GPU indices or UUIDs for cuda, slot numbers otherwise."""

    kind: Literal["cuda", "cpu", "mps"]
    ids: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.ids)

    def describe(self) -> str:
        """For error messages: "2 GPUs", "1 CPU slot"."""
        noun = {"cuda": "GPU", "mps": "Apple GPU", "cpu": "CPU slot"}[self.kind]
        return f"{self.count} {noun}{'' if self.count == 1 else 's'}"


def visible_devices(settings: Settings) -> Devices:
    """The devices that the settings and CUDA_VISIBLE_DEVICES leave to this service."""
    if settings.device in ("auto", "cuda"):
        gpus = _gpus()
        if gpus or settings.device == "cuda":
            return Devices("cuda", gpus)
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    if settings.device == "mps" or (settings.device == "auto" and apple):
        return Devices("mps", ("0",))
    return Devices("cpu", tuple(str(slot) for slot in range(settings.cpu_slots)))


def device_memory(devices: Devices) -> int | None:
    """Bytes of memory of one device, of the largest where they differ; None when that cannot be told.

    Of a CPU it is the host's memory, or what the control group of this process may use.
    """
    if devices.kind != "cuda":
        return host_memory.total()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return max(int(pynvml.nvmlDeviceGetMemoryInfo(_handle(name)).total) for name in devices.ids)
    except pynvml.NVMLError:
        return None  # a driver that does not tell, as of some virtual GPUs
    finally:
        pynvml.nvmlShutdown()


def has_bf16(devices: Devices) -> bool:
    """Whether all of them are GPUs that compute in bfloat16 natively: NVIDIA's from compute capability 8.0 on."""
    if devices.kind != "cuda":
        return False
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    try:
        return all(pynvml.nvmlDeviceGetCudaComputeCapability(_handle(name))[0] >= 8 for name in devices.ids)
    except pynvml.NVMLError:
        return False
    finally:
        pynvml.nvmlShutdown()


def _handle(name: str) -> Any:
    """NVML's handle of a GPU, by its index or its UUID."""
    if name.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def _gpus() -> tuple[str, ...]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(name.strip() for name in chosen.split(",") if name.strip() and name.strip() != "-1")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()  # no driver, no GPU
    try:
        return tuple(str(index) for index in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()
