"""axolotl: the safety step as a plugin.

plugins:
  - safegene_trl.integrations.axolotl.SafeGenePlugin
safegene:
  vector: path/or/hub-id
"""

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import Trainer, TrainerCallback

from ..callback import SafeGeneCallback
from ..config.settings import SafeGeneConfig
from ..errors import ConfigError


class SafeGeneArgs(BaseModel):
    """What the plugin adds to axolotl's YAML: the `safegene` block, keys of `SafeGeneConfig`."""

    safegene: dict[str, Any] | None = None


class SafeGenePlugin(BasePlugin):
    """Attaches a `SafeGeneCallback` to axolotl's trainer.

    Attributes:
        callback: The callback of the last training, None before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.callback: SafeGeneCallback | None = None

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Reads the block as soon as the YAML is read.

        Raises:
            ConfigError: There is none, or it has an unknown key or a value out of range.
        """
        _config(cfg)

    def get_input_args(self) -> str:
        return f"{__name__}.{SafeGeneArgs.__name__}"

    def add_callbacks_post_trainer(
        self, cfg: Mapping[str, Any], trainer: Trainer
    ) -> list[TrainerCallback]:
        """Attaches the callback itself, before the trackers, so that there is none left for axolotl
        to add.
        """
        self.callback = SafeGeneCallback(_config(cfg)).attach(trainer)
        return []


def _config(cfg: Mapping[str, Any]) -> SafeGeneConfig:
    block = cfg.get("safegene")
    if not isinstance(block, Mapping):
        raise ConfigError(
            "SafeGenePlugin needs a `safegene` block with a `vector`: add it to the YAML, or take the plugin out."
        )
    return SafeGeneConfig.from_dict(_plain(block))


def _plain(value: Any) -> Any:
    """axolotl's own dictionaries answer any key: they become plain ones."""
    return (
        {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value
    )
