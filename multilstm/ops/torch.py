"""What only PyTorch can say, and its own LSTM."""

from typing import Any

import torch

from multilstm.ops import reference


def lstm(
    x: Any, h0: Any, c0: Any, kernel: Any, recurrent_kernel: Any, bias: Any
) -> tuple[Any, Any, Any]:
    """As `reference.lstm`, by one call of PyTorch's own LSTM.

    It has the same gates in the same order, two biases of which one is zero
    here, and its matrices the other way round. The reference is a Python
    loop on PyTorch, several times slower.
    """
    weights = [
        kernel.T.contiguous(),
        recurrent_kernel.T.contiguous(),
        bias,
        torch.zeros_like(bias),
    ]
    y, h, c = torch.lstm(
        x,
        (h0.unsqueeze(0), c0.unsqueeze(0)),
        weights,
        has_biases=True,
        num_layers=1,
        dropout=0.0,
        train=torch.is_grad_enabled(),
        bidirectional=False,
        batch_first=True,
    )
    return y, h.squeeze(0), c.squeeze(0)


def device_name() -> str:
    """The name of the device that PyTorch computes on."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return reference.device_name()
