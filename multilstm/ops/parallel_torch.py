"""PyTorch: a process for each device, which a launcher starts.

`torchrun` does, on several hosts too; `multilstm train --devices` on one.
"""

import atexit
import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from multilstm.errors import UserError
from multilstm.launch import place_among_processes
from multilstm.ops import parallel


class _Processes(parallel.Devices):
    def __init__(self) -> None:
        told = os.environ.get("KERAS_TORCH_DEVICE", "")  # by which Keras goes
        if torch.cuda.is_available() and not told.startswith("cpu"):
            place = int(os.environ.get("LOCAL_RANK", "0"))
            found = torch.cuda.device_count()
            if place >= found:
                raise parallel.too_few("GPUs", place + 1, found)
            torch.cuda.set_device(place)
            self.device = torch.device("cuda")
        else:
            self.device = torch.device("cpu")
        if not dist.is_initialized():
            on_gpu = self.device.type == "cuda"
            dist.init_process_group("nccl" if on_gpu else "gloo")
            if not on_gpu:
                # gloo's threads may outlive Python, which then aborts: 11 of
                # 204 processes did. (NCCL's would wait for one that is lost.)
                atexit.register(_end_group)
        self.rank = dist.get_rank()
        self.count = self.num_processes = self.num_parts = dist.get_world_size()

    def all_rows(self, variable: Any) -> Any:
        mine = variable.value.detach().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(parts, mine)
        return torch.cat(parts).cpu().numpy()

    def assign_rows(self, variable: Any, value: Any) -> None:
        variable.assign(np.split(np.asarray(value), self.count)[self.rank])

    def whole_sum(self, variable: Any) -> Any:
        return self.total(super().whole_sum(variable))

    def assign_sum(self, variable: Any, value: Any) -> None:
        # The first has all of it.
        variable.assign(np.zeros_like(value) if self.rank else value)

    def spread_seed(self, variable: Any) -> None:
        variable.assign(parallel.far_seed(variable.value, self.rank))

    def of_all(self, value: Any) -> Any:
        mine = torch.as_tensor(value, dtype=torch.float64).to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(parts, mine)
        return torch.stack(parts).cpu().numpy()


def _end_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def use_devices(count: int | None) -> parallel.Devices:
    """As `parallel.use_devices`: the processes that were started together."""
    _, started = place_among_processes("torch")
    if count is not None and count != started:
        raise UserError(
            f"--devices {count} needs a process for each device; {started} "
            "were started. Use `multilstm train`, or torchrun "
            f"--nproc-per-node {count} -m multilstm train ..."
        )
    return parallel.Devices() if started == 1 else _Processes()


def add_gradients(optimizer: Any, gradients: list[Any]) -> list[Any]:
    """As `parallel.add_gradients`: the mean over processes, in one message."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return gradients
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    return [
        part.view(gradient.shape)
        for part, gradient in zip(parts, gradients, strict=True)
    ]
