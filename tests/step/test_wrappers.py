"""Fine-tunes in classes of text and images: whoever made the vector, with their own files' names."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from safegene_trl import SafeGeneCallback, UnsupportedModelError
from safegene_trl.checkpoints.loading import load_processor
from safegene_trl.checkpoints.portable_files import save_processor, written_template
from safegene_trl.checkpoints.stored_model import StoredModel
from safegene_trl.extraction.delta import stored_difference
from safegene_trl.models.inputs import prompt_text
from safegene_trl.models.parameters import canonical_modules, unadapted
from safegene_trl.step.apply import apply
from safegene_trl.step.plan import InputModel, Origin

from ..conftest import CHAT_TEMPLATE, config_of, make_tokenizer, with_lora
from ..test_callback import sft
from ..wrappers import CONFIGS, gemma3_processor, make_wrapper, text_model, wrapper_vector


QUICK = {
    "max_utility_loss": 100.0,
    "utility_weight": 0.0,
    "max_evaluations": 8,
    "granularity": "rank",
    "allow_other_base": True,
}
IDS = torch.arange(24).reshape(2, 12) + 5


@pytest.fixture(scope="module")
def tokenizer():
    """With the token that the tokenizers of Qwen's classes add where there is none."""
    return make_tokenizer(extra=("<|endoftext|>",))


@pytest.fixture
def saved(tokenizer, tmp_path):
    """Saves a model and its tokenizer to a folder."""

    def save(model, name):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.mark.parametrize("maker", ["wrapper", "text"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_vector_of_either_class_is_merged_into_the_other(kind, maker, saved, tokenizer, tmp_path):
    models = {"wrapper": make_wrapper(kind)}
    models["text"] = text_model(kind, models["wrapper"])
    vector = wrapper_vector(models[maker], tokenizer)
    vector.save_pretrained(tmp_path / "vector")
    for name, model in models.items():
        place, target = saved(model, name), tmp_path / f"{name}-out"
        config = config_of(vector=str(tmp_path / "vector"), output_dir=str(target), **QUICK)
        report = apply(config, place, coefficients=0.5)
        before, after = (
            load_file(f"{folder}/model.safetensors") for folder in (place, str(target))
        )
        changed = [key for key in before if not torch.equal(before[key], after[key])]
        assert before.keys() == after.keys() and len(changed) == len(vector.deltas)
        assert all("layers.1." in key and "vis" not in key for key in changed)
        architectures = json.loads((target / "config.json").read_text())["architectures"]
        assert architectures == [type(model).__name__]
        assert {key.partition("#")[0] for key in report["coefficients"]} == vector.deltas.keys()
        loaded = type(model).from_pretrained(target)
        modules, originals = canonical_modules(loaded), canonical_modules(model)
        for module, delta in vector.deltas.items():
            expected = originals[module].weight + 0.5 * delta.dense()
            torch.testing.assert_close(modules[module].weight, expected)


def test_what_cannot_read_text_alone_is_refused_before_a_search(
    saved, tokenizer, task_file, tmp_path
):
    wrapper = make_wrapper("llama4")
    try:
        wrapper(input_ids=torch.tensor([[1, 2]]))
    except (AttributeError, TypeError, ValueError):
        pass  # of images that are not there
    else:
        pytest.skip("this version of transformers computes the logits of text alone")
    wrapper_vector(wrapper, tokenizer).save_pretrained(tmp_path / "vector")
    place = {"vector": str(tmp_path / "vector"), "output_dir": str(tmp_path / "out")}
    config = config_of(task_data=str(task_file), **place, **QUICK)
    with pytest.raises(UnsupportedModelError, match="does not compute logits of text alone"):
        apply(config, saved(wrapper, "wrapper"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_difference_of_two_models_is_the_same_in_either_class(kind, saved):
    wrappers = [make_wrapper(kind, seed) for seed in (0, 1)]
    texts = [text_model(kind, wrapper) for wrapper in wrappers]
    aligned, degraded = (
        [
            StoredModel.open(saved(model[index], f"{name}-{index}"))
            for name, model in (("wrapper", wrappers), ("text", texts))
        ]
        for index in (0, 1)
    )
    expected, coverage = stored_difference(aligned[1], degraded[1], 2, show_progress=False)
    for one, other in ((aligned[0], degraded[0]), (aligned[0], degraded[1])):
        found, share = stored_difference(one, other, 2, show_progress=False)
        assert found.keys() == expected.keys()
        assert share.share == pytest.approx(coverage.share)
        for name, truncation in found.items():
            torch.testing.assert_close(truncation.delta.a, expected[name].delta.a)


def test_an_adapter_from_files(saved, tokenizer, tmp_path):
    from peft import PeftModel

    wrapper = make_wrapper()
    vector = wrapper_vector(wrapper, tokenizer)
    vector.save_pretrained(tmp_path / "vector")
    base = saved(wrapper, "base")
    tuned = with_lora(make_wrapper(), target_modules=r".*language_model.*\.(q_proj|down_proj)")
    tuned.peft_config["default"].base_model_name_or_path = base
    place, target = saved(tuned, "tuned"), tmp_path / "out"
    output = {"output_dir": str(target), "output_format": "adapter"}
    apply(config_of(vector=str(tmp_path / "vector"), **output, **QUICK), place, coefficients=0.5)
    adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), target)
    with torch.no_grad():
        for name, delta in vector.deltas.items():
            unadapted(canonical_modules(tuned)[name]).weight.add_(0.5 * delta.dense())
        torch.testing.assert_close(logits(adapted), logits(tuned), rtol=1e-4, atol=1e-5)


def logits(model):
    return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize("lora", [False, True])
def test_training_on_text(lora, tmp_path):
    """The whole way: SFT with the callback, and what it has written loaded as the base model is."""
    from peft import LoraConfig, PeftModel

    processor, base = gemma3_processor(), tmp_path / "base"
    wrapper = make_wrapper()
    wrapper.save_pretrained(base)
    processor.save_pretrained(base)
    vector = wrapper_vector(text_model("gemma3", wrapper), processor.tokenizer)
    vector.save_pretrained(tmp_path / "vector")
    output = {"output_format": "both" if lora else "merged"}
    callback = SafeGeneCallback(config_of(vector=str(tmp_path / "vector"), **QUICK, **output))
    adapter = LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    trainer = sft(
        tmp_path / "out",
        [callback],
        AutoProcessor.from_pretrained(base),
        model=AutoModelForImageTextToText.from_pretrained(base),
        peft_config=adapter if lora else None,
    )
    trainer.train()
    target = tmp_path / "out" / "safeguarded"
    merged = AutoModelForImageTextToText.from_pretrained(target)
    assert type(merged) is type(wrapper)
    assert type(AutoProcessor.from_pretrained(target)) is type(processor)
    assert load_file(target / "model.safetensors").keys() == (
        load_file(base / "model.safetensors").keys()
    )
    by_module = vector.space("rank").by_module(callback.report["coefficients"])
    assert any(callback.report["coefficients"].values())
    modules = canonical_modules(trainer.model)
    with torch.no_grad():
        for name, delta in vector.deltas.items():
            change = delta.b @ (by_module[name][:, None] * delta.a)
            unadapted(modules[name]).weight.add_(change)
        torch.testing.assert_close(logits(merged), logits(trainer.model), rtol=1e-4, atol=1e-5)
        if lora:
            on_base = AutoModelForImageTextToText.from_pretrained(base)
            adapted = PeftModel.from_pretrained(on_base, target / "adapter")
            torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", [CHAT_TEMPLATE, None])
def test_prompts_are_written_in_the_template_of_the_processor(own, tmp_path):
    """In which a trainer writes its rows, and which lies beside the checkpoint."""
    processor = gemma3_processor()
    processor.chat_template = CHAT_TEMPLATE.replace("<|end|>", "<|end|>\n")
    processor.tokenizer.chat_template = own
    model = InputModel(make_wrapper(), processor, Origin(None, None, "full"))
    assert model.tokenizer.chat_template == processor.chat_template
    assert prompt_text(model.tokenizer, [{"role": "user", "content": "sort"}]).endswith(
        "\n<|assistant|>"
    )
    assert processor.tokenizer.chat_template == own  # the trainer's is as it was
    save_processor(processor, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == processor.chat_template


def test_an_adapters_own_template_goes_before_that_of_its_bases_processor(tmp_path):
    processor, base = gemma3_processor(), tmp_path / "base"
    wrapper = make_wrapper()
    wrapper.save_pretrained(base)
    processor.save_pretrained(base)
    adapted = with_lora(wrapper)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "tuned")
    tokenizer = processor.tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", "<|end|>\n")
    tokenizer.save_pretrained(tmp_path / "tuned")
    loaded = load_processor(str(tmp_path / "tuned"))
    assert type(loaded) is type(processor)
    assert written_template(loaded) == tokenizer.chat_template
