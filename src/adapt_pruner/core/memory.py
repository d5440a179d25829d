"""How much memory the process has held."""

import resource
import sys

import torch
from torch import nn

__all__ = ["peak_bytes", "peak_rss_bytes"]


def peak_rss_bytes() -> int:
    """The most memory this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_bytes(model: nn.Module) -> int:
    """The most memory held so far on the device of `model`, in bytes: of the GPU, or of this process."""
    device = next(model.parameters()).device
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()
