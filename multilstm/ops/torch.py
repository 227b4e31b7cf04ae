"""What only PyTorch can say."""

import torch

from multilstm.ops import reference


def device_name() -> str:
    """The name of the device that PyTorch computes on."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return reference.device_name()
