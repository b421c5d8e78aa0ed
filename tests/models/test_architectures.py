"""Every architecture × every kind of fine-tune: a vector by difference, measured live, merged live and
from files, all of which is one model.
"""

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safegene_trl.checkpoints.adapter_output import save_adapter
from safegene_trl.checkpoints.checkpoint_folder import CheckpointFolder
from safegene_trl.checkpoints.live_merge import save_merged
from safegene_trl.checkpoints.merge_terms import ScaledVector
from safegene_trl.checkpoints.stored_merge import write_merged
from safegene_trl.checkpoints.stored_model import StoredModel
from safegene_trl.errors import UnsupportedModelError
from safegene_trl.extraction.delta import adapter_delta, stored_difference
from safegene_trl.models.experts import can_be_changed, expert_weights, matrix_shapes
from safegene_trl.models.inputs import Sample, batches
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.models.names import layer_index, shared_parameter
from safegene_trl.models.parameters import canonical_modules
from safegene_trl.models.supported import (
    check_adapter_layers,
    check_adapter_output,
    check_experts,
    check_supported,
)
from safegene_trl.step.apply import apply
from safegene_trl.step.read_back import as_written
from safegene_trl.step.shipped_weights import merged_weights
from safegene_trl.vectors.safety_vector import SafetyVector

from ..architectures import CONFIGS, make_architecture
from ..conftest import ALONE, attachment_of, config_of, make_tokenizer, make_vector
from .test_parameters import gpt2


# transformers' own experts, each in a layout of its own; other mixtures share these
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v3")
HYBRID_MIXTURES = ("granitemoehybrid", "lfm2_moe", "jamba", "nemotron_h", "qwen3_next")
QUICK = {"mixtral lora", "gpt_oss experts", "qwen3_moe full", "phi3 lora", "bamba full"}
# these PEFT lets no LoRA on: kernels of a training read the weight without calling the layer
NO_LORA = {"out_proj", "dt_proj", "conv1d", "router", "layer"}
IDS = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(5))


def kinds(name: str) -> list[str]:
    return ["full", "lora", *(["experts"] if name in (*MIXTURES, *HYBRID_MIXTURES) else [])]


def test_the_documents_name_those_that_are_tried():
    page = (Path(__file__).parents[2] / "docs" / "vectors.md").read_text(encoding="utf-8")
    table = page.split("<!-- architectures -->\n")[1].split("\n\n")[0]
    assert table == as_table(), f"the table in docs/vectors.md should be:\n{as_table()}"


def as_table():
    """A line for each architecture: which of its fine-tunes are tried."""
    lines = ["| architecture | full | LoRA | LoRA on experts |", "| --- | --- | --- | --- |"]
    for name in CONFIGS:
        marks = ["✓" if kind in kinds(name) else "–" for kind in ("full", "lora", "experts")]
        lines.append(f"| `{name}` | {' | '.join(marks)} |")
    return "\n".join(lines)


def lora(model, experts: bool, seed: int, rank: int = 2):
    """A random LoRA on all linear layers that can take one, or on experts too."""
    modules = canonical_modules(model)
    names = [name for name in matrix_shapes(modules) if layer_index(name) is not None]
    targets = {name.rpartition(".")[2] for name in names}
    targets = {leaf for leaf in targets if not leaf.endswith("]")} - NO_LORA
    parameters = {
        ".".join([*name.split(".")[-2:], leaf])
        for name, module in modules.items()
        for leaf in (expert_weights(module) if experts else ())
    }
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted(targets),
        target_parameters=sorted(parameters) or None,
        exclude_modules=r".*\.(gate|router)\..*",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return adapted.eval()


def changed(model, seed: int, rank: int = 2):
    """The model after a full fine-tune: in its layers every weight of more than one dimension is a
    little other, by a change of a low rank.
    """
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.dim() > 1 and layer_index(name) is not None:
                *more, rows, columns = parameter.shape
                change = torch.randn(*more, rows, rank) @ torch.randn(*more, rank, columns)
                parameter.add_(0.02 * change)
    return other


def saved(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def aligned(name: str):
    return make_architecture(name)


def difference(name: str, folder, dtype=torch.float32):
    """The aligned model saved, its vector from another full fine-tune of it, and what that leaves
    out. In the layers both are as the files say.
    """
    own = aligned(name).to(dtype)
    base, other = saved(own, folder / "aligned"), changed(own, 7)
    degraded = saved(other, folder / "degraded")
    truncations, coverage = stored_difference(
        StoredModel.open(str(base)), StoredModel.open(str(degraded)), 2, show_progress=False
    )
    here, there = dict(own.named_parameters()), dict(other.named_parameters())
    for matrix, truncation in truncations.items() if dtype == torch.float32 else ():
        change = before_matrix(here, matrix) - before_matrix(there, matrix)
        change = change.T if change.shape != truncation.delta.dense().shape else change
        torch.testing.assert_close(truncation.delta.dense(), change, atol=1e-4, rtol=1e-3)
    return {matrix: each.delta for matrix, each in truncations.items()}, coverage.left_out


def fine_tune(name: str, kind: str, folder):
    """A live fine-tune as loaded, and where it is saved."""
    base = AutoModelForCausalLM.from_pretrained(folder / "aligned").eval()
    if kind == "full":
        model = changed(base, 11)
    else:
        model = lora(base, kind == "experts", 11)
        model.peft_config["default"].base_model_name_or_path = str(folder / "aligned")
    return model, saved(model, folder / "tuned")


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(
            name, kind, marks=() if f"{name} {kind}" in QUICK else (pytest.mark.exhaustive,)
        )
        for name in CONFIGS
        for kind in kinds(name)
    ],
)
def test_what_is_measured_is_what_is_written(name, kind, tmp_path):
    deltas, left_out = difference(name, tmp_path)
    assert any(shared_parameter(matrix) for matrix in deltas) == ("experts" in kinds(name))
    # what is no matrix product, and the routers
    assert {tensor.removesuffix(".weight").rpartition(".")[2] for tensor in left_out} <= {
        "gate",
        "router",
        "layer",
        "conv",
        "conv1d",
        "dt_proj",
        "A_log",
        "gate_up_proj_bias",
        "down_proj_bias",
        *(("w1", "v1", "w2") if name == "dbrx" else ()),
    }
    model, tuned = fine_tune(name, kind, tmp_path)
    check_experts(model, deltas, merged=True)
    assert_one_model(model, tuned, deltas, tmp_path)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_transposed_layers_are_one_model(kind, tmp_path):
    base = wide_gpt2()
    saved(base, tmp_path / "aligned")
    model, tuned = fine_tune("gpt2", kind, tmp_path)
    assert_one_model(model, tuned, in_layers(random_deltas(base)), tmp_path)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "falcon_new", "bamba", "lfm2"])
def test_an_adapter_computes_what_is_measured(name, kind, tmp_path):
    base = wide_gpt2() if name == "gpt2" else make_architecture(name)
    saved(base, tmp_path / "aligned")
    model, tuned = fine_tune(name, kind, tmp_path)
    deltas = in_layers(random_deltas(base))
    attachment = attachment_of(model, deltas, "module")
    values = torch.rand(len(attachment.space.names), generator=torch.Generator().manual_seed(1))
    vector = ScaledVector(deltas, attachment.space.by_module(attachment.space.named(values)))
    with attachment.applied(values):
        attached = logits_of(model)
    named = tuned if kind == "full" else tmp_path / "aligned"
    save_adapter(model, vector, str(named), make_tokenizer(), tmp_path / "adapter", ALONE)
    written = AutoModelForCausalLM.from_pretrained(named)
    written = PeftModel.from_pretrained(written, tmp_path / "adapter").eval()
    scale = float(attached.abs().max())
    torch.testing.assert_close(logits_of(written), attached, atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "bamba"])
def test_an_adapter_from_files_computes_what_is_measured(name, tmp_path):
    base = wide_gpt2() if name == "gpt2" else make_architecture(name)
    saved(base, tmp_path / "aligned")
    deltas = in_layers(random_deltas(base))
    save_vector(base, deltas, tmp_path / "vector")
    model, tuned = fine_tune(name, "lora", tmp_path)
    place = {"vector": str(tmp_path / "vector"), "output_dir": str(tmp_path / "out")}
    config = config_of(**place, output_format="adapter", allow_other_base=True)
    apply(config, tuned, coefficients=0.5)
    attachment = attachment_of(model, deltas, "module")
    with attachment.applied(torch.full((len(attachment.space.names),), 0.5)):
        attached = logits_of(model)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "aligned")
    written = PeftModel.from_pretrained(written, tmp_path / "out").eval()
    scale = float(attached.abs().max())
    torch.testing.assert_close(logits_of(written), attached, atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_h1", "nemotron_h"])
def test_an_adapter_that_peft_would_not_load_is_refused(name, tmp_path):
    model = make_architecture(name)
    deltas = random_deltas(model)
    inside = {each: delta for each, delta in deltas.items() if each.endswith("out_proj")}
    others = {each: delta for each, delta in deltas.items() if each.endswith("in_proj")}
    check_adapter_layers(model, others)
    with pytest.raises(UnsupportedModelError, match=r"out_proj`, on which .*output_format: merged"):
        check_adapter_layers(model, inside)
    for chosen, loads in ((others, True), (inside, False)):
        vector, place = ScaledVector(chosen, dict.fromkeys(chosen, 0.5)), tmp_path / str(loads)
        save_adapter(model, vector, "base", make_tokenizer(), place, ALONE)
        with nullcontext() if loads else pytest.raises(ValueError, match="incompatible"):
            PeftModel.from_pretrained(make_architecture(name), place)


def test_what_a_step_on_state_space_layers_writes_as_an_adapter_is_checked(tmp_path):
    base = saved(make_architecture("mamba2"), tmp_path / "aligned")
    deltas = in_layers(random_deltas(make_architecture("mamba2")))
    save_vector(make_architecture("mamba2"), deltas, tmp_path / "vector")
    place = {"vector": str(tmp_path / "vector"), "output_dir": str(tmp_path / "out")}
    config = config_of(**place, output_format="both", allow_other_base=True)
    with pytest.raises(UnsupportedModelError, match="on which PEFT loads no LoRA"):
        apply(config, base, coefficients=0.5)
    assert not (tmp_path / "out").exists()


def test_files_in_bfloat16_hold_what_was_measured(tmp_path):
    deltas, _ = difference("gpt_oss", tmp_path, torch.bfloat16)
    model, tuned = fine_tune("gpt_oss", "experts", tmp_path)
    assert model.dtype == torch.bfloat16
    assert_one_model(model, tuned, deltas, tmp_path, tolerance=0.05)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_each_sample_has_gradients_of_its_own(name):
    model = make_architecture(name).requires_grad_(False)
    deltas = random_deltas(model)
    attachment = attachment_of(model, deltas, "module")
    shape = (len(IDS), len(attachment.space.names))
    values = torch.rand(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def loss(ids, own):
        with attachment.applied(own):
            return model(ids).logits.square().sum()

    (together,) = torch.autograd.grad(loss(IDS, values), values)
    for row, ids in enumerate(IDS):
        own = values[row].detach().requires_grad_()
        (alone,) = torch.autograd.grad(loss(ids[None], own), own)
        torch.testing.assert_close(together[row], alone, atol=1e-2, rtol=1e-3)
    assert together.abs().min(dim=1).values.max() > 0


def test_a_degrading_lora_on_experts_is_the_vector_exactly():
    base = make_architecture("mixtral")
    before = {name: tensor.detach().clone() for name, tensor in base.named_parameters()}
    degraded = lora(base, experts=True, seed=3)
    found = adapter_delta(torch.nn.Module(), degraded)
    assert not any(shared_parameter(m) for m in adapter_delta(base, degraded, experts=False))
    merged = dict(degraded.merge_and_unload().named_parameters())
    for matrix, truncation in found.items():
        change = before_matrix(before, matrix) - before_matrix(merged, matrix)
        torch.testing.assert_close(truncation.delta.dense(), change, atol=1e-5, rtol=1e-4)
    assert sum(bool(shared_parameter(matrix)) for matrix in found) == 2 * 2 * 4


def test_experts_share_a_coefficient_and_are_called_by_their_parameter():
    model = make_architecture("mixtral")
    for granularity, number in (("layer", 2), ("module", 2 * 6), ("rank", 2 * 6 * 2)):
        names = attachment_of(model, random_deltas(model), granularity).space.names
        assert len(names) == number and not any("[" in name for name in names)


def test_an_adapter_of_linear_layers_cannot_hold_experts():
    model = make_architecture("mixtral")
    with pytest.raises(UnsupportedModelError, match=r"experts in `model.*output_format: merged"):
        check_experts(model, random_deltas(model), merged=False)
    check_experts(model, ["model.layers.0.self_attn.q_proj"], merged=False)
    with pytest.raises(UnsupportedModelError, match=r"LoRA on `model.*output_format: merged"):
        check_adapter_output(lora(model, experts=True, seed=0))


def test_an_experts_module_that_is_gone_around_is_refused():
    model = make_architecture("mixtral")
    moe = model.model.layers[1].mlp
    moe.forward = lambda x: torch.nn.functional.linear(x, moe.experts.down_proj[0][:, :32])
    attachment = attachment_of(model, random_deltas(model), "module")
    with pytest.raises(UnsupportedModelError, match=r"experts.*is never called"):
        attachment.verify(sample_batch())


@pytest.mark.parametrize("coefficients", [None, 0.5], ids=["searched", "given"])
def test_applied_to_a_mixture_whose_experts_were_trained(coefficients, tmp_path, task_file):
    deltas, _ = difference("mixtral", tmp_path)
    save_vector(aligned("mixtral"), deltas, tmp_path / "vector")
    held = SafetyVector.from_pretrained(tmp_path / "vector").deltas
    assert held.keys() == deltas.keys()
    assert all(torch.equal(held[name].b, delta.b) for name, delta in deltas.items())
    fine_tune("mixtral", "experts", tmp_path)
    config = config_of(
        vector=str(tmp_path / "vector"),
        output_dir=str(tmp_path / "out"),
        task_data=str(task_file),
        allow_other_base=True,
        max_evaluations=3,
        max_utility_loss=100.0,
        num_test_prompts=2,
        max_new_tokens=2,
    )
    report = apply(config, tmp_path / "tuned", coefficients=coefficients)
    assert report["status"] == "safeguarded"
    before = load_file(tmp_path / "aligned" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    expert = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert not torch.equal(before[expert], after[expert])


def sample_batch():
    sample = Sample(IDS[0].tolist(), [False] * 6 + [True] * 6)
    return batches([sample], 1, 0, torch.device("cpu"))[0]


def wide_gpt2():
    """GPT-2, whose layers hold their weights as `(d_in, d_out)`, with logits that can move."""
    model = gpt2()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def save_vector(model, deltas, folder):
    vector = make_vector(model, make_tokenizer(), deltas)
    vector.selection |= {"selected_layers": [0, 1], "scores": [0.0, 0.1]}
    vector.save_pretrained(folder)


def in_layers(deltas):
    return {name: delta for name, delta in deltas.items() if layer_index(name) is not None}


def random_deltas(model):
    generator = torch.Generator().manual_seed(3)
    shapes = matrix_shapes(canonical_modules(model)).items()
    return {
        name: LowRankDelta(
            torch.randn(2, shape[1], generator=generator) * 0.1,
            torch.randn(shape[0], 2, generator=generator) * 0.1,
        )
        for name, shape in shapes
        if can_be_changed(name)
    }


def before_matrix(tensors, matrix):
    parameter = shared_parameter(matrix)
    if parameter is None:
        return tensors[f"{matrix}.weight"]
    return tensors[parameter][int(matrix.removesuffix("]").rpartition("[")[2])]


def assert_one_model(model, tuned, deltas, folder, tolerance=1e-4):
    """A fine-tune with a vector attached, with merged weights in place, read back, loaded from the
    checkpoint that a live merge wrote, and that from files: all of them are one model.
    """
    check_supported(model)
    attachment = attachment_of(model, deltas, "module")
    waiting = attachment.verify(sample_batch())
    assert all(shared_parameter(matrix) for matrix in waiting)
    values = torch.rand(len(attachment.space.names), generator=torch.Generator().manual_seed(1))
    vector = ScaledVector(deltas, attachment.space.by_module(attachment.space.named(values)))
    plain = logits_of(model)
    with attachment.applied(values):
        attached = logits_of(model)
    with merged_weights(model, vector, ALONE):
        measured = logits_of(model)
    assert (measured - plain).abs().max() > 0.01
    scale = float(measured.abs().max())
    torch.testing.assert_close(attached, measured, atol=tolerance * scale, rtol=0)
    (folder / "live").mkdir()
    save_merged(model, vector, CheckpointFolder(folder / "live", make_tokenizer(), "5GB"), ALONE)
    torch.testing.assert_close(logits_of(model), plain, atol=0, rtol=0)
    with as_written(model, folder / "live", ALONE):
        torch.testing.assert_close(logits_of(model), measured, atol=0, rtol=0)
    written = AutoModelForCausalLM.from_pretrained(folder / "live").eval()
    assert written.dtype == model.dtype
    torch.testing.assert_close(logits_of(written), measured, atol=1e-5, rtol=1e-5)
    (folder / "streamed").mkdir()
    place = CheckpointFolder(folder / "streamed", make_tokenizer(), "5GB")
    write_merged(StoredModel.open(str(tuned)), vector, place, show_progress=False)
    live, streamed = (load_file(folder / p / "model.safetensors") for p in ("live", "streamed"))
    assert live.keys() == streamed.keys()
    for name, tensor in live.items():
        step = 1e-5 if tensor.dtype == torch.float32 else 1e-2  # an order of additions
        torch.testing.assert_close(streamed[name], tensor, atol=step, rtol=step, msg=name)
