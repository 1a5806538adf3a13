"""Where a trainer runs and in which precision."""

import os
from dataclasses import dataclass
from typing import Literal

from bento_service.errors import InvalidRequest, TrainingFailed

Precision = Literal["auto", "bf16", "fp16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class Device:
    kind: Literal["cuda", "mps", "cpu"]
    has_bf16: bool  # computes in bfloat16 natively (a GPU), or at all (a CPU)


def find_device(wanted: Literal["auto", "cuda", "cpu", "mps"]) -> Device:
    """The device asked for; auto takes CUDA, then MPS, then the CPU. Raises TrainingFailed when it is not there."""
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "cuda" and not cuda:
        raise TrainingFailed("device cuda was asked for, but PyTorch sees no CUDA GPU: set TRL_DEVICE=cpu or auto")
    if wanted == "mps" and not mps:
        raise TrainingFailed("device mps was asked for, but this host has none: set TRL_DEVICE=cpu or auto")
    if wanted == "cuda" or (wanted == "auto" and cuda):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return Device(kind="cuda", has_bf16=torch.cuda.is_bf16_supported(including_emulation=False))
    if wanted == "mps" or (wanted == "auto" and mps):
        return Device(kind="mps", has_bf16=False)
    return Device(kind="cpu", has_bf16=True)


def choose_tf32(wanted: bool, device: Device) -> bool | None:
    """The ``tf32`` of transformers' TrainingArguments; None leaves PyTorch as it is, which computes in float32.

    Raises InvalidRequest where there is no TF32.
    """
    if not wanted:
        return None
    from transformers.utils import is_torch_tf32_available

    if device.kind != "cuda" or not is_torch_tf32_available():
        raise InvalidRequest(
            "tf32 needs an NVIDIA GPU of compute capability 8.0 or more, which this device is not: leave it out",
            param="tf32",
        )
    return True


def choose_precision(wanted: Precision, device: Device) -> Literal["bf16", "fp16", "fp32"]:
    """The precision of the forward and backward pass; weights and optimizer stay in float32.

    auto is bf16 on a GPU that has it and fp32 everywhere else: on a CPU bf16 trades accuracy for speed.
    Raises InvalidRequest for a precision the device cannot train in.
    """
    if wanted == "auto":
        return "bf16" if device.kind == "cuda" and device.has_bf16 else "fp32"
    if wanted == "fp16" and device.kind != "cuda":
        raise InvalidRequest(f"fp16 trains on CUDA GPUs only, not on {device.kind}: use fp32", param="precision")
    if wanted == "bf16" and not device.has_bf16:
        raise InvalidRequest(f"this {device.kind} device has no bf16: use fp32", param="precision")
    return wanted
