"""The weights of a safety vector, looked through with distrust before any of them is used; without
torch, as for `safegene verify`.
"""

import math
import re
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from ..errors import VectorError
from .files import PREFIX, WEIGHTS_FILE


# of a module, or of one of the experts that lie in one parameter
_MODULE = re.compile(r"\w+(\.\w+)*(\[\d+\])?", re.ASCII)
_DTYPES = ("F32", "F16", "BF16")


def check_weights(data: bytes, name: str) -> dict[str, int]:
    """The rank of every module's delta, by canonical module name in natural order.

    Raises:
        VectorError: They are no pairs of finite matrices of one rank and one floating-point type.
    """
    try:
        tensors = deserialize(data)
    except (SafetensorError, UnicodeError, RuntimeError, ValueError) as error:
        raise VectorError(
            f"{WEIGHTS_FILE} of {name} cannot be read: download or make the vector again."
        ) from error
    halves: dict[str, dict[str, dict[str, Any]]] = {}
    for key, tensor in tensors:
        module, _, side = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if (
            f"{PREFIX}{module}.{side}.weight" != key
            or side not in ("lora_A", "lora_B")
            or not _MODULE.fullmatch(module)
        ):
            raise VectorError(
                f"The safety vector {name} holds an unexpected tensor {key[:60]!r}: make it again."
            )
        halves.setdefault(module, {})[side] = tensor
    ranks = {}
    for module, half in sorted(halves.items(), key=lambda item: _natural(item[0])):
        if set(half) != {"lora_A", "lora_B"} or not _is_pair(half["lora_A"], half["lora_B"]):
            raise VectorError(
                f"`{module}` of the safety vector {name} is not a pair B·A: make the vector again."
            )
        if not all(math.isfinite(_sum(tensor)) for tensor in half.values()):
            raise VectorError(
                f"`{module}` of the safety vector {name} holds NaN or infinity: make the vector again."
            )
        ranks[module] = half["lora_A"]["shape"][0]
    if not ranks:
        raise VectorError(f"The safety vector {name} is empty: make it again.")
    if len(set(ranks.values())) > 1:
        raise VectorError(
            f"The modules of the safety vector {name} differ in rank: make it again with one rank."
        )
    return ranks


def _is_pair(one: dict[str, Any], two: dict[str, Any]) -> bool:
    a, b = one["shape"], two["shape"]
    if len(a) != 2 or len(b) != 2 or 0 in (*a, *b):
        return False
    return a[0] == b[1] and one["dtype"] == two["dtype"] and one["dtype"] in _DTYPES


def _sum(tensor: dict[str, Any]) -> float:
    """In float32: NaN or infinite where one of the numbers is."""
    data, dtype = tensor["data"], tensor["dtype"]
    if dtype == "BF16":  # the upper half of a float32
        numbers = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        numbers = np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype])
    with np.errstate(all="ignore"):
        return float(numbers.sum(dtype=np.float32))


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"[.\[]", name.removesuffix("]"))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
