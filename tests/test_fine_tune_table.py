"""The table of fine-tunes in docs/vectors.md: every cell is a test."""

import ast
import re
from pathlib import Path

import pytest

from .conftest import COLLECTED


TESTS = Path(__file__).resolve().parent
CALLBACK = "test_callback.py"
COMMANDS = "commands/test_commands.py"
TRAINERS = "integrations/test_trainers.py"
ADAPTER_OUTPUT = "checkpoints/test_adapter_output.py"
LIVE_MERGE = "checkpoints/test_live_merge.py"
STORED_MERGE = "checkpoints/test_stored_merge.py"
STORED_MODEL = "checkpoints/test_stored_model.py"
ARCHITECTURES = "models/test_architectures.py"
NAMES = "models/test_names.py"
PARAMETERS = "models/test_parameters.py"
SUPPORTED = "models/test_supported.py"
TRAINED_HEADS = "models/test_trained_heads.py"
GIVEN = "step/test_apply_with_coefficients.py"
FINISHED = "step/test_finished_training.py"
QUANTIZED = "step/test_quantized_step.py"
RESIZED = "step/test_resized_vocabulary.py"
WRAPPERS = "step/test_wrappers.py"

ONE_MODEL = "test_what_is_measured_is_what_is_written"
NO_ADAPTER = f"{GIVEN}::test_files_of_what_no_adapter_of_linear_layers_can_hold"
UNMERGEABLE = f"{STORED_MODEL}::test_adapters_that_cannot_be_merged_are_refused_by_name"
ONE_LORA = f"{STORED_MODEL}::test_a_folder_holds_one_lora_and_nothing_else"
OTHER_LORAS = f"{ADAPTER_OUTPUT}::test_loras_of_other_kinds_are_written_as_they_compute"
REFUSED = f"{SUPPORTED}::test_refused_by_name"
HELD_WHOLE = f"{SUPPORTED}::test_an_adapter_cannot_hold_what_is_trained_whole"
INTO_16_BITS = (
    f"{QUANTIZED}::test_apply_merges_an_adapter_of_a_quantised_training_into_the_16_bit_base"
)

# by the start of a row's first cell: the tests of the way in that changes a loaded model, and those
# of the one from files
FINE_TUNES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "full": (
        (
            f"{CALLBACK}::test_safeguarded_checkpoint_is_the_fine_tune_plus_the_vector[sft-full-layer]",
            f"{CALLBACK}::test_safeguarded_checkpoint_is_the_fine_tune_plus_the_vector[plain-full-module]",
            f"{CALLBACK}::test_adapter_output[adapter-False]",
            f"{COMMANDS}::test_sft_then_apply_agree[False]",
        ),
        (
            f"{GIVEN}::test_one_number_for_all",
            f"{STORED_MERGE}::test_checkpoint[True-llama]",
            f"{STORED_MERGE}::test_checkpoint[False-qwen2]",
            f"{GIVEN}::test_a_full_fine_tune_is_the_base_of_its_adapter",
        ),
    ),
    "LoRA, rsLoRA, several active LoRAs": (
        (
            f"{CALLBACK}::test_safeguarded_checkpoint_is_the_fine_tune_plus_the_vector[sft-lora-rank]",
            f"{CALLBACK}::test_adapter_output[adapter-True]",
            f"{COMMANDS}::test_sft_then_apply_agree[True]",
            f"{OTHER_LORAS}[rsLoRA]",
            f"{OTHER_LORAS}[several]",
            f"{TRAINERS}::test_the_policy_is_what_the_vector_is_added_to"
            "[DPOTrainer-two LoRAs, and a reference model-merged]",
            f"{TRAINERS}::test_the_policy_is_what_the_vector_is_added_to"
            "[DPOTrainer-two LoRAs, and a reference model-adapter]",
            f"{FINISHED}::test_of_adapters_that_act_together_all_are_kept_and_named",
        ),
        (
            f"{GIVEN}::test_an_earlier_report_gives_the_same_weights[merged]",
            f"{GIVEN}::test_an_earlier_report_gives_the_same_weights[adapter]",
            f"{STORED_MERGE}::test_adapter[LoRA]",
            f"{STORED_MERGE}::test_adapter[rsLoRA]",
            f"{ONE_LORA}[beside_another]",
        ),
    ),
    "DoRA": (
        (f"{PARAMETERS}::test_dora_is_folded",),
        (f"{STORED_MERGE}::test_adapter[DoRA]", f"{NO_ADAPTER}[DoRA]"),
    ),
    "PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA": (
        (
            f"{PARAMETERS}::test_other_kinds_of_lora_are_merged[PiSSA]",
            f"{PARAMETERS}::test_other_kinds_of_lora_are_merged[OLoRA]",
            f"{STORED_MODEL}::test_adapter_that_changed_its_base_is_loaded_as_it_was_trained",
        ),
        (f"{STORED_MODEL}::test_adapter_that_changed_its_base_is_refused",),
    ),
    "QLoRA: ": (
        (
            f"{QUANTIZED}::test_a_fine_tune_is_merged_into_its_16_bit_base[4]",
            f"{QUANTIZED}::test_a_fine_tune_is_merged_into_its_16_bit_base[8]",
            f"{QUANTIZED}::test_what_else_a_lora_holds_is_merged[use_rslora]",
            f"{QUANTIZED}::test_what_else_a_lora_holds_is_merged[use_dora]",
            f"{QUANTIZED}::test_an_adapter_is_written_for_the_base_that_was_loaded[adapter]",
            f"{QUANTIZED}::test_apply_on_an_adapter_whose_base_has_quantised_files",
            f"{INTO_16_BITS}[True]",
            f"{PARAMETERS}::test_dora_is_folded",
            f"{QUANTIZED}::test_a_quantised_base_that_is_sharded_is_refused[fsdp2]",
            f"{QUANTIZED}::test_a_quantised_base_that_is_sharded_is_refused[zero3]",
        ),
        (
            f"{INTO_16_BITS}[False]",
            f"{STORED_MERGE}::test_adapter[rsLoRA]",
            f"{STORED_MERGE}::test_adapter[DoRA]",
        ),
    ),
    "a base quantised otherwise": (
        (
            f"{REFUSED}[quantised by gptq]",
            f"{REFUSED}[quantised by awq]",
            f"{REFUSED}[quantised by fp8]",
            f"{REFUSED}[quantised by torchao]",
            f"{REFUSED}[quantised by hqq]",
            f"{REFUSED}[quantised by quanto]",
            f"{REFUSED}[quantised by compressed-tensors]",
            f"{REFUSED}[quantised by something]",
            f"{REFUSED}[torchao's own]",
            f"{REFUSED}[no LoRA on a quantised base]",
            f"{REFUSED}[LoftQ on a quantised base]",
            f"{INTO_16_BITS}[True]",
        ),
        (
            f"{STORED_MERGE}::test_adapter[LoRA]",
            f"{INTO_16_BITS}[False]",
            f"{STORED_MODEL}::test_quantised_checkpoint_is_refused",
            f"{STORED_MODEL}::test_adapter_that_changed_its_base_is_refused",
        ),
    ),
    "`modules_to_save`, trained biases": (
        (
            f"{PARAMETERS}::test_modules_to_save_are_merged_when_untied",
            f"{PARAMETERS}::test_tied_modules_that_are_saved_whole_together_are_merged",
            f"{PARAMETERS}::test_other_kinds_of_lora_are_merged[biases]",
            f"{HELD_WHOLE}[llama-options0-model.layers.0.post_attention_layernorm]",
            f"{HELD_WHOLE}[qwen2-options1-model.layers.0.self_attn.q_proj.bias]",
            f"{REFUSED}[tied head]",
            f"{REFUSED}[tied embeddings]",
            f"{REFUSED}[both of a tied pair, apart]",
        ),
        (
            f"{STORED_MERGE}::test_adapter[modules_to_save]",
            f"{STORED_MERGE}::test_adapter[saved layers]",
            f"{STORED_MERGE}::test_adapter[biases]",
            f"{STORED_MERGE}::test_tied_modules_saved_whole_are_merged",
            f"{NO_ADAPTER}[modules_to_save]",
            f"{NO_ADAPTER}[saved layers]",
            f"{NO_ADAPTER}[biases]",
        ),
    ),
    "grouped-query attention, fused projections, GPT-2's transposed layers": (
        (
            f"{LIVE_MERGE}::test_merged_checkpoint_equals_hooked_model[True-True-llama]",
            f"{ADAPTER_OUTPUT}::test_adapter_equals_hooked_model[True]",
            f"{ARCHITECTURES}::{ONE_MODEL}[phi3-lora]",
            f"{ARCHITECTURES}::{ONE_MODEL}[gpt_neox-full]",
            f"{ARCHITECTURES}::{ONE_MODEL}[falcon_new-full]",
            f"{ARCHITECTURES}::test_transposed_layers_are_one_model[full]",
            f"{ARCHITECTURES}::test_transposed_layers_are_one_model[lora]",
            f"{ARCHITECTURES}::test_an_adapter_computes_what_is_measured[gpt2-lora]",
            f"{ARCHITECTURES}::test_an_adapter_computes_what_is_measured[phi3-full]",
            f"{ARCHITECTURES}::test_an_adapter_computes_what_is_measured[gpt_neox-lora]",
            f"{ARCHITECTURES}::test_an_adapter_computes_what_is_measured[falcon_new-lora]",
        ),
        (
            f"{STORED_MERGE}::test_checkpoint[True-llama]",
            f"{ARCHITECTURES}::{ONE_MODEL}[phi3-lora]",
            f"{ARCHITECTURES}::{ONE_MODEL}[gpt_neox-full]",
            f"{ARCHITECTURES}::test_transposed_layers_are_one_model[full]",
            f"{ARCHITECTURES}::test_transposed_layers_are_one_model[lora]",
            f"{ARCHITECTURES}::test_an_adapter_from_files_computes_what_is_measured[gpt2]",
            f"{ARCHITECTURES}::test_an_adapter_from_files_computes_what_is_measured[phi3]",
        ),
    ),
    "mixture of experts": (
        (
            f"{ARCHITECTURES}::{ONE_MODEL}[qwen3_moe-full]",
            f"{ARCHITECTURES}::{ONE_MODEL}[mixtral-lora]",
            f"{ARCHITECTURES}::{ONE_MODEL}[gpt_oss-experts]",
            f"{ARCHITECTURES}::{ONE_MODEL}[mixtral-experts]",
            f"{ARCHITECTURES}::{ONE_MODEL}[dbrx-full]",
            f"{PARAMETERS}::test_experts_are_saved_under_their_names_in_files",
            f"{ARCHITECTURES}::test_applied_to_a_mixture_whose_experts_were_trained[searched]",
            f"{ARCHITECTURES}::test_an_adapter_of_linear_layers_cannot_hold_experts",
        ),
        (
            f"{ARCHITECTURES}::{ONE_MODEL}[qwen3_moe-full]",
            f"{ARCHITECTURES}::{ONE_MODEL}[mixtral-lora]",
            f"{ARCHITECTURES}::{ONE_MODEL}[gpt_oss-experts]",
            f"{ARCHITECTURES}::test_applied_to_a_mixture_whose_experts_were_trained[given]",
            f"{NO_ADAPTER}[experts]",
        ),
    ),
    "hybrid and state-space layers": (
        (
            f"{ARCHITECTURES}::{ONE_MODEL}[bamba-full]",
            f"{ARCHITECTURES}::{ONE_MODEL}[falcon_h1-lora]",
            f"{ARCHITECTURES}::{ONE_MODEL}[mamba-lora]",
            f"{ARCHITECTURES}::{ONE_MODEL}[mamba2-full]",
            f"{ARCHITECTURES}::{ONE_MODEL}[lfm2-lora]",
            f"{ARCHITECTURES}::test_an_adapter_computes_what_is_measured[bamba-lora]",
            f"{ARCHITECTURES}::test_an_adapter_computes_what_is_measured[lfm2-full]",
            f"{ARCHITECTURES}::test_an_adapter_that_peft_would_not_load_is_refused[mamba]",
            f"{ARCHITECTURES}::test_an_adapter_that_peft_would_not_load_is_refused[mamba2]",
            f"{ARCHITECTURES}::test_an_adapter_that_peft_would_not_load_is_refused[falcon_h1]",
            f"{ARCHITECTURES}::test_an_adapter_that_peft_would_not_load_is_refused[nemotron_h]",
        ),
        (
            f"{ARCHITECTURES}::{ONE_MODEL}[bamba-full]",
            f"{ARCHITECTURES}::{ONE_MODEL}[falcon_h1-lora]",
            f"{ARCHITECTURES}::{ONE_MODEL}[mamba-lora]",
            f"{ARCHITECTURES}::test_an_adapter_from_files_computes_what_is_measured[bamba]",
            f"{ARCHITECTURES}::test_what_a_step_on_state_space_layers_writes_as_an_adapter_is_checked",
        ),
    ),
    "single tokens": (
        (
            f"{TRAINED_HEADS}::{ONE_MODEL}[tokens]",
            f"{TRAINED_HEADS}::{ONE_MODEL}[tokens of a tied pair]",
            f"{TRAINED_HEADS}::{ONE_MODEL}[a LoRA on the head]",
            f"{TRAINED_HEADS}::{ONE_MODEL}[a LoRA on the embeddings]",
            f"{OTHER_LORAS}[on the head]",
            f"{TRAINED_HEADS}::test_an_adapter_of_linear_layers_cannot_hold_it[tokens]",
            f"{TRAINED_HEADS}::test_an_adapter_of_linear_layers_cannot_hold_it[a LoRA on the embeddings]",
        ),
        (
            f"{TRAINED_HEADS}::{ONE_MODEL}[tokens]",
            f"{TRAINED_HEADS}::{ONE_MODEL}[tokens of a tied pair]",
            f"{TRAINED_HEADS}::{ONE_MODEL}[a LoRA on the head]",
            f"{TRAINED_HEADS}::{ONE_MODEL}[a LoRA on the embeddings]",
            f"{NO_ADAPTER}[tokens]",
            f"{NO_ADAPTER}[embeddings]",
        ),
    ),
    "a LoRA on one of a tied pair": (
        (
            f"{REFUSED}[LoRA on a tied head]",
            f"{REFUSED}[LoRA on tied embeddings]",
            f"{REFUSED}[other names]",
            f"{REFUSED}[a LoRA on a router]",
        ),
        (
            f"{UNMERGEABLE}[one of a tied pair]",
            f"{UNMERGEABLE}[both of a tied pair]",
            f"{UNMERGEABLE}[a router]",
        ),
    ),
    "LoRA beside tensors unfrozen by hand": (
        (
            f"{REFUSED}[a norm that was unfrozen by hand]",
            f"{REFUSED}[a merged adapter]",
            f"{FINISHED}::test_an_adapter_that_is_not_the_fine_tune_at_the_end_is_refused",
        ),
        (f"{ONE_LORA}[unfrozen]", f"{ONE_LORA}[merged]"),
    ),
    "added tokens, a resized or padded vocabulary": (
        (
            f"{RESIZED}::test_training[tied-full]",
            f"{RESIZED}::test_training[untied-full]",
            f"{RESIZED}::test_training[untied-lora]",
            f"{RESIZED}::test_training[tied-saved whole]",
            f"{RESIZED}::test_training[untied-saved whole]",
            f"{RESIZED}::test_an_adapter_that_would_lack_the_embeddings_is_refused",
        ),
        (
            f"{RESIZED}::test_from_files[tied-full]",
            f"{RESIZED}::test_a_full_fine_tune_is_the_base_of_its_adapter[tied]",
            f"{RESIZED}::test_from_files[untied-full]",
            f"{RESIZED}::test_from_files[untied-lora]",
            f"{RESIZED}::test_from_files[tied-saved whole]",
            f"{RESIZED}::test_from_files[untied-saved whole]",
            f"{RESIZED}::test_an_adapter_that_would_lack_the_embeddings_is_refused",
        ),
    ),
    "text training of a class of text and images": (
        (
            f"{WRAPPERS}::test_training_on_text[False]",
            f"{WRAPPERS}::test_training_on_text[True]",
            f"{NAMES}::test_a_wrapper_computes_what_its_text_model_does[mistral3]",
            f"{NAMES}::test_a_wrapper_computes_what_its_text_model_does[qwen2_5_vl]",
            f"{NAMES}::test_a_wrapper_computes_what_its_text_model_does[qwen3_vl]",
            f"{NAMES}::test_a_wrapper_computes_what_its_text_model_does[qwen3_5]",
        ),
        (
            f"{WRAPPERS}::test_a_vector_of_either_class_is_merged_into_the_other[gemma3-text]",
            f"{WRAPPERS}::test_a_vector_of_either_class_is_merged_into_the_other[mistral3-text]",
            f"{WRAPPERS}::test_a_vector_of_either_class_is_merged_into_the_other[qwen2_5_vl-text]",
            f"{WRAPPERS}::test_a_vector_of_either_class_is_merged_into_the_other[qwen3_vl-text]",
            f"{WRAPPERS}::test_a_vector_of_either_class_is_merged_into_the_other[qwen3_5-text]",
            f"{WRAPPERS}::test_an_adapter_from_files",
        ),
    ),
    "Llama 4's class of text and images": (
        (f"{WRAPPERS}::test_what_cannot_read_text_alone_is_refused_before_a_search",),
        (f"{WRAPPERS}::test_a_vector_of_either_class_is_merged_into_the_other[llama4-text]",),
    ),
    "LoRA with bias, every other method of PEFT": (
        (
            f"{REFUSED}[LoRA bias]",
            f"{REFUSED}[IA3]",
            f"{REFUSED}[AdaLoRA]",
            f"{REFUSED}[PrefixTuningConfig]",
            f"{REFUSED}[PromptTuningConfig]",
            f"{REFUSED}[PromptEncoderConfig]",
        ),
        (
            f"{UNMERGEABLE}[LoRA bias]",
            f"{UNMERGEABLE}[IA3]",
            f"{STORED_MODEL}::test_other_methods_than_lora_are_refused_by_the_name_in_their_files",
        ),
    ),
}
SHOWN = sorted({test for cells in FINE_TUNES.values() for tests in cells for test in tests})


def rows():
    """The cells of every row of the table."""
    page = (TESTS.parent / "docs" / "vectors.md").read_text(encoding="utf-8")
    table = page.split("## Which fine-tunes can take it on\n\n")[1].split("\n\n")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]


def test_the_documents_have_the_rows_that_are_tested():
    found = rows()
    assert len(found) == len(FINE_TUNES)
    for row, (start, cells) in zip(found, FINE_TUNES.items(), strict=True):
        assert row[0].startswith(start), f"the docs say {row[0]!r}, the tests {start!r}"
        assert len(row) == 3 and all(cells) and len(cells) == 2
        assert all(re.match("[✓–]", cell) for cell in row[1:]), (
            f"{start!r} has a cell without a mark"
        )


def test_every_test_that_shows_a_cell_is_there():
    gone = []
    for file in sorted({test.partition("::")[0] for test in SHOWN}):
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        gone += [
            test
            for test in SHOWN
            if test.startswith(f"{file}::") and re.split(r"::|\[", test)[1] not in there
        ]
    assert not gone


def test_every_case_that_shows_a_cell_is_there(request):
    """Of the files of this run: pytest alone knows what it calls a case."""
    if any("::" in argument for argument in request.config.args):
        pytest.skip("single tests were asked for: the cases of a file are not all there")
    collected = {name.removeprefix("tests/") for name in request.config.stash[COLLECTED]}
    files = {name.partition("::")[0] for name in collected}
    gone = [
        test
        for test in SHOWN
        if "[" in test and test.partition("::")[0] in files and test not in collected
    ]
    assert not gone
