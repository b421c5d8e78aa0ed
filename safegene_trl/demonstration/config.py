"""`DemoConfig`: everything that can be set about the page of `safegene demo`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..auditing.config import AuditConfig
from ..config.docstrings import with_help
from ..config.validation import COUNT, DTYPES, Rule, check_values, named_fields
from ..errors import ConfigError


@with_help
@named_fields
@dataclass
class DemoConfig:
    """Which models stand side by side, and where the page is.

    Args:
        safeguarded: The folder that a safety step has written. Without `model` it is both: its
            fine-tune is what its weights are without the vector.
        model: The fine-tune that it was made from: checkpoint or LoRA adapter, directory or hub id.
        vector: The safety vector: directory or hub id. Default: the one that the report in
            `safeguarded` names.
        aligned_model: The aligned model: directory or hub id. Default: the one that the vector
            names, or that the fine-tune is an adapter of, where it is on this machine.
        dtype: Data type to load the models in, e.g. float32.
        num_prompts: Harmful prompts of the vector on which refusals are counted.
        max_new_tokens: Tokens after which every answer is cut.
        port: Port of the page at 127.0.0.1; 0 takes a free one.
        no_browser: Do not open the page in a browser.

    Raises:
        ConfigError: A name is no setting. Values are checked by `check`.
    """

    safeguarded: str = ""
    model: str = ""
    vector: str = ""
    aligned_model: str = ""
    dtype: str = "auto"
    num_prompts: int = 20
    max_new_tokens: int = 48
    port: int = 0
    no_browser: bool = False

    RULES: ClassVar[Mapping[str, Rule]] = {
        "dtype": Rule(choices=DTYPES),
        "num_prompts": COUNT,
        "max_new_tokens": COUNT,
        "port": Rule(at_least=0, at_most=65535),
    }

    def check(self) -> None:
        """Checks every value.

        Raises:
            ConfigError: One is missing or impossible.
        """
        check_values(self)
        if not self.release:
            raise ConfigError(
                "No safeguarded checkpoint is named: write `safegene demo FOLDER` with the folder that a safety step has written."
            )

    @property
    def release(self) -> str:
        """The folder whose report is read."""
        return self.safeguarded or self.model

    @property
    def fine_tune(self) -> str:
        """The model that is loaded, and that the vector is put on."""
        return self.model or self.safeguarded

    def asking(self, vector: str) -> AuditConfig:
        """The same as an audit has it, which asks the same models.

        Args:
            vector: The safety vector's place.
        """
        return AuditConfig(
            vector=vector,
            aligned_model=self.aligned_model,
            model=self.fine_tune,
            safeguarded=self.safeguarded if self.model else "",
            dtype=self.dtype,
            max_new_tokens=self.max_new_tokens,
            max_reasoning_tokens=0,  # an answer is to be seen within the tokens that it is cut at
        )
