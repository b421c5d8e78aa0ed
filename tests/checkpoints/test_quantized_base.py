"""The 16-bit base that a fine-tune of a quantised one is merged into."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.merge_terms import NO_VECTOR, ScaledVector
from safegene_trl.checkpoints.quantized_base import QuantizedFineTune, check_base, open_base
from safegene_trl.checkpoints.stored_merge import check_written, write_merged
from safegene_trl.errors import CheckpointError, UnsupportedModelError

from ..conftest import make_deltas
from ..quantization import quantised, wide_model


DOWN, UP = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture
def base_dir(tmp_path):
    wide_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def live(folder, bits=4, **lora):
    return get_peft_model(quantised(folder, bits), LoraConfig(target_modules=["up_proj"], **lora))


def low_rank(weight, share=0.05):
    """Adds what a LoRA could have added, of that share of the weight's norm."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, 2, generator=generator) for size in weight.shape)
    change = a @ b.T
    weight.data += (share * weight.norm() / change.norm() * change).to(weight.dtype)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_is_told_from_every_other_model(bits, base_dir, tmp_path):
    model = live(base_dir, bits)
    check_base(QuantizedFineTune.on(open_base(str(base_dir)), model), [DOWN])
    model.get_base_model().model.norm.float()  # as `prepare_model_for_kbit_training` does
    check_base(QuantizedFineTune.on(open_base(str(base_dir)), model), [DOWN])
    others = {
        "norms alone": lambda other: other.model.norm.weight.data.mul_(1.05),
        "one token": lambda other: other.model.embed_tokens.weight.data[7].mul_(1.05),
        "a layer alone": lambda other: other.model.layers[0].self_attn.q_proj.weight.data.neg_(),
        "a little of the last": lambda other: low_rank(other.model.layers[-1].mlp.down_proj.weight),
    }
    for what, change in others.items():
        other = wide_model()
        change(other)
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(UnsupportedModelError, match="is not the one that the quantised base"):
            check_base(QuantizedFineTune.on(open_base(str(tmp_path / "other")), model), [DOWN])
            pytest.fail(f"{what} were not noticed")
    wide_model(vocab_size=384).save_pretrained(tmp_path / "larger")
    with pytest.raises(UnsupportedModelError, match=r"`model.embed_tokens.weight` of .* is not"):
        check_base(QuantizedFineTune.on(open_base(str(tmp_path / "larger")), model), [DOWN])
    with pytest.raises(UnsupportedModelError, match="`elsewhere` in another form"):
        check_base(QuantizedFineTune.on(open_base(str(base_dir)), model), ["elsewhere"])


def test_a_base_of_another_class_is_refused(base_dir):
    class Own(LlamaForCausalLM):
        """A class of somebody's own."""

    model = live(base_dir)
    model.get_base_model().__class__ = Own
    with pytest.raises(UnsupportedModelError, match=r"The fine-tune is a Own and .* a LlamaFor"):
        QuantizedFineTune.on(open_base(str(base_dir)), model)


def test_what_cannot_be_merged_into_is_refused_with_the_remedy(base_dir, tmp_path):
    quantised(base_dir, 8).save_pretrained(tmp_path / "packed")
    live(base_dir).save_pretrained(tmp_path / "adapter")
    for name, message in (
        (None, "does not say where its files are"),
        (str(tmp_path / "gone"), "cannot be read"),
        ("somebody/nothing", "cannot be read"),
        (str(tmp_path / "packed"), "is quantised itself"),
        (str(tmp_path / "adapter"), "is an adapter"),
    ):
        with pytest.raises(UnsupportedModelError, match=f"{message}: name .*`output.merge_base`"):
            open_base(name)


def test_the_config_of_the_training_is_written_without_the_quantisation(base_dir):
    model = live(base_dir)
    model.config.use_cache = False
    config = QuantizedFineTune.on(open_base(str(base_dir)), model).model.config
    assert config.use_cache is False and config.dtype == torch.bfloat16
    assert "quantization_config" not in config.to_dict()
    assert model.config.quantization_config is not None


@pytest.mark.parametrize("place", ["a LoRA", "a vector", "what is copied"])
def test_one_bit_of_a_written_tensor_is_missed(place, base_dir, tmp_path, tokenizer):
    model = live(base_dir)
    torch.nn.init.normal_(model.get_submodule(f"base_model.model.{UP}").lora_B.default.weight)
    fine_tune = QuantizedFineTune.on(open_base(str(base_dir)), model)
    deltas = make_deltas(wide_model())
    vector = ScaledVector(deltas, dict.fromkeys(deltas, 0.5))
    folder = CheckpointFolder(tmp_path / "out", tokenizer, "5GB")
    folder.path.mkdir()
    write_merged(fine_tune, vector, folder, show_progress=False)
    assert check_written(fine_tune, vector, folder.path) == len(fine_tune.files)
    with pytest.raises(CheckpointError, match="is not the base's tensor"):
        check_written(fine_tune, NO_VECTOR, folder.path)
    name = {"a LoRA": UP, "a vector": DOWN, "what is copied": "model.norm"}[place] + ".weight"
    tensor = open_base(str(folder.path)).files[name]
    with open(tensor.path, "r+b") as file:
        file.seek(tensor.begin + tensor.num_bytes - 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CheckpointError, match=f"`{name}` in the written checkpoint is not the"):
        check_written(fine_tune, vector, folder.path)
