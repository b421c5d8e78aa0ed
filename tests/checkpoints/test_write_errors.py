"""Whatever fails while something is written is one plain sentence."""

from pathlib import Path

import pytest
from transformers import GenerationConfig

from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.write_errors import saving, writing
from safegene_trl.errors import OutputError

from ..conftest import make_model


@pytest.mark.parametrize(
    "error", [Exception("No space left on device"), RuntimeError("x"), ValueError("y\nz")]
)
def test_whatever_other_libraries_raise_is_said_plainly(error):
    with (
        pytest.raises(OutputError, match=r"Saving the tokenizer failed \(\w+: [^\n]*\)"),
        saving("the tokenizer"),
    ):
        raise error
    with pytest.raises(KeyboardInterrupt), saving("the tokenizer"):
        raise KeyboardInterrupt
    with pytest.raises(OutputError, match=r"^as it is$"), saving("the tokenizer"):
        raise OutputError("as it is")
    with pytest.raises(RuntimeError), writing():  # what is no failure to write stays what it is
        raise RuntimeError("x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_in_the_writers_of_other_libraries(tokenizer, tmp_path):
    model = make_model()
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(
        OutputError, match=r"Saving the tokenizer failed \(Exception: .*No space left"
    ):
        CheckpointFolder(tmp_path, tokenizer, "5GB").save_record(model)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"Saving the model's config failed .*No space left"):
        CheckpointFolder(tmp_path, tokenizer, "5GB").save_record(model)


def test_a_generation_config_that_cannot_be_saved(tokenizer, tmp_path):
    model = make_model()
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.3)
    with pytest.raises(
        OutputError, match=r"Saving the generation config failed .*\btemperature\b|GenerationConfig"
    ):
        CheckpointFolder(tmp_path, tokenizer, "5GB").save_record(model)
