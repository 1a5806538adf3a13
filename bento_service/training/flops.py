"""How much arithmetic training takes, and how much a GPU can do.

Model FLOPs as in the PaLM paper's appendix B (arXiv 2204.02311), without its term for attention over long sequences:
2 a parameter for the forward pass, 4 for the backward pass through trained weights and 2 through frozen ones.
"""

import re

import torch
from torch import nn
from transformers import PreTrainedModel

# Dense 16-bit tensor FLOP/s by words of the device's name, the longer ones first: NVIDIA's data sheets, of which the
# newer give twice as much, with sparsity. Left out is what has no such figure, or contradicting ones, as the A10G.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100S": 130e12,
    "V100-PCIE": 112e12,
    "V100": 125e12,
    "T4": 65e12,
}


def flops_per_position(model: PreTrainedModel, *, all_trained: bool, further_passes: int) -> float:
    """FLOPs that one position of a training batch takes, with ``further_passes`` forward beside the trained one.

    All parameters count but embeddings that are only looked up; those that also serve as the output head count once.
    """
    parameters = model.num_parameters()  # of packed 4-bit weights too
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        parameters -= embeddings.weight.numel()
    backward = 4 if all_trained else 2
    return float(parameters * (2 + backward + 2 * further_passes))


def device_flops(model: nn.Module) -> float | None:
    """Peak 16-bit FLOP/s of the GPU that the model is on; None for other devices and GPUs that are not listed."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # Whole words: an RTX A4000 is no A40.
    return next((peak for known, peak in PEAK_FLOPS.items() if re.search(rf"\b{known}\b", name)), None)
