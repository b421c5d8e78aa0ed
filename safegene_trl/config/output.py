"""What users set of what is written, and where."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import ConfigError
from .validation import (
    DTYPES,
    Rule,
    check_values,
    file_size,
    folder,
    named_fields,
    repository,
    written_place,
)


OutputFormat = Literal["merged", "adapter", "both"]


@named_fields
@dataclass
class OutputConfig:
    """What is written, and where.

    Args:
        output_dir: Where the safeguarded checkpoint goes. Default: `safeguarded` in the trainer's
            output directory, or `_safeguarded` with `push_to_hub`, which leaves that name out; of
            `apply`, `<model>-safeguarded` in the working directory.
        output_format: A full `merged` checkpoint, a LoRA `adapter` with its coefficients folded in,
            or `both` (the adapter in the subfolder `adapter`).
        dtype: Data type of the merged checkpoint's weights: `float32`, `bfloat16` or `float16`.
            Default: that of the fine-tune's weights, as they were loaded where only sharding by
            FSDP2 has widened them.
        merge_base: The 16-bit model that a LoRA on a quantised base is merged into: directory or hub
            id. Default: the base that was loaded, whose files are in 16 bits as a rule.
        max_shard_size: Largest weight file, like `5GB` or `500MB`; a whole number is bytes.
        history: JSON-lines file of the model line; what came of this fine-tune is appended to it.
            Its seal lies beside it.
        hub_model_id: Repository on the hub that the finished checkpoint is uploaded to, unless it
            is rejected. `Trainer`'s own `push_to_hub` uploads the plain fine-tune, whatever the
            gate decides: leave it out where a rejected model must not be published.
        hub_private: Whether a repository made for it is private.

    Raises:
        ConfigError: A name is no setting (the nearest one is named), or a value is impossible.
    """

    output_dir: str | None = None
    output_format: OutputFormat = "merged"
    dtype: str = "auto"
    merge_base: str | None = None
    max_shard_size: str = "5GB"
    history: str | None = None
    hub_model_id: str | None = None
    hub_private: bool = True

    RULES: ClassVar[Mapping[str, Rule]] = {
        "output_dir": Rule(syntax=folder, may_be_null=True),
        "dtype": Rule(choices=DTYPES),
        "max_shard_size": Rule(syntax=file_size),
        "history": Rule(syntax=written_place),
        "hub_model_id": Rule(syntax=repository, may_be_null=True),
    }

    def __post_init__(self) -> None:
        size: object = self.max_shard_size  # a recipe may have a number, a command line its digits
        if type(size) is int or isinstance(size, str):
            size = str(size)
            is_count = re.fullmatch("[0-9]{1,18}", size) and int(size)
            self.max_shard_size = f"{int(size) / 1000}KB" if is_count else size
        check_values(self, prefix="output.")
        if self.dtype != "auto" and self.output_format == "adapter":
            raise ConfigError(
                "`output.dtype` is that of a merged checkpoint, and `output.output_format: adapter` writes none: leave one of them "
                "out."
            )
