"""How much memory a device has to spare."""

import psutil
import torch


def has_own_memory(device: torch.device) -> bool:
    """Whether a device has memory beside the host's, which free memory then tells all about."""
    return device.type == "cuda"


def free_bytes(device: torch.device) -> int:
    """Bytes that new tensors can take: of a GPU also what its allocator keeps for later; else of
    the host.
    """
    if not has_own_memory(device):
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def gpu_bytes() -> list[int]:
    """Bytes of memory of each GPU that this process sees."""
    return [
        int(torch.cuda.get_device_properties(index).total_memory)
        for index in range(torch.cuda.device_count())
    ]
