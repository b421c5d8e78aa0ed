"""`safegene init`: what it finds out, what it chooses, what it writes, and what it refuses."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, MixtralConfig

from safegene_trl.callback import DryRunComplete
from safegene_trl.commands import sft
from safegene_trl.commands.init import family_name
from safegene_trl.commands.init_model import find_model
from safegene_trl.commands.init_plan import Machine, plan_for
from safegene_trl.commands.main import main
from safegene_trl.commands.parsing import parse
from safegene_trl.errors import ConfigError
from safegene_trl.estimation.training import ModelSizes
from safegene_trl.extraction.config import ExtractionConfig
from safegene_trl.models.experts import can_be_changed
from safegene_trl.models.low_rank import LowRankDelta
from safegene_trl.models.parameters import canonical_modules, linear_shape

from ..architectures import make_architecture
from ..conftest import (
    BENIGN,
    HARMFUL,
    make_model,
    make_tokenizer,
    make_vector,
    refusing,
    small_shape,
)
from ..quantization import wide_model


FAMILIES = ("llama", "qwen3", "gemma2", "mistral", "phi3", "mixtral", "qwen3_moe", "mamba2")
MIXTURES = ("mixtral", "qwen3_moe")
TARGETS: dict[str, object] = {kind: ["q_proj", "k_proj", "v_proj", "o_proj"] for kind in MIXTURES}
TARGETS["mamba2"] = r".*\.in_proj"  # PEFT puts no LoRA on its `out_proj`
FILES = {"sft.yaml", "apply.yaml", "README.md"}
TO_MAKE = {"degrade.yaml", "extract.yaml"}
OWN_DATA = [
    *("--data", "task.jsonl", "--degrade_data", "task.jsonl"),
    *("--harmful_data", "harmful.jsonl", "--benign_data", "benign.jsonl"),
]
RECIPE = Path("recipes/model")
GIB = 2**30


@pytest.fixture
def place(tmp_path, task_file, monkeypatch):
    """A working folder with data in it."""
    for name, texts in (("harmful", HARMFUL), ("benign", BENIGN)):
        rows = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("safegene_trl.commands.init.gpu_bytes", lambda: [])
    return tmp_path


def saved(kind: str, template: bool = True):
    """A tiny model of an architecture in the folder `model`, and its vector."""
    known = kind in ("llama", "qwen3", "gemma2", "mistral")
    model = make_model(kind) if known else make_architecture(kind)
    tokenizer = make_tokenizer()
    if not template:
        tokenizer.chat_template = None
    for part in (model, tokenizer):
        part.save_pretrained("model")
    deltas = {}
    for name, module in canonical_modules(model).items():
        is_meant = can_be_changed(name) and ("attn" in name or name.endswith(".in_proj"))
        if is_meant and (shape := linear_shape(module)):
            rows, columns = shape
            deltas[name] = LowRankDelta(torch.full((2, columns), 0.1), torch.full((rows, 2), 0.1))
    vector, layers = make_vector(model, tokenizer, deltas), model.config.num_hidden_layers
    vector.selection |= {"scores": [0.1] * layers, "selected_layers": list(range(layers))}
    return model, vector


def config_only(config, folder: str = "model"):
    """A model of any size, of which there is all but the weights."""
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def written() -> set[str]:
    return {path.name for path in RECIPE.iterdir()}


def refused(capsys, *words: str) -> str:
    """The one line that it ends with."""
    capsys.readouterr()
    assert main(["init", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and said.endswith((".", "?"))
    return said


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_file_is_taken_by_its_command(kind, place, capsys):
    model, vector = saved(kind)
    assert main(["init", "model", *OWN_DATA]) == 0
    told = capsys.readouterr().out
    assert written() == FILES | TO_MAKE and f"{model.config.model_type}, " in told
    assert ("mixture of 4 experts" in told) == (kind in MIXTURES)
    assert ("untied embeddings" in told) == (kind in (*MIXTURES, "phi3", "mamba2"))
    vector.save_pretrained("build/model/safety-vector")  # as `extract` would
    recipe = yaml.safe_load((RECIPE / "sft.yaml").read_text())
    targets = recipe["lora_target_modules"]
    assert targets == TARGETS.get(kind, "all-linear")
    parse(sft.ARGUMENTS, ["--config", str(RECIPE / "degrade.yaml")], "", "")
    (config,) = parse((ExtractionConfig,), ["--config", str(RECIPE / "extract.yaml")], "", "")
    config.check()
    words = ["--safegene.dry_run", "true", "--disable_tqdm", "true"]
    with pytest.raises(DryRunComplete):
        main(["sft", "--config", str(RECIPE / "sft.yaml"), *words])
    adapted(model, targets).save_pretrained("build/model/fine-tuned")
    assert main(["apply", "--config", str(RECIPE / "apply.yaml"), *words[:2]]) == 0
    assert "Dry run" in capsys.readouterr().out


def adapted(model, targets):
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    found = get_peft_model(model, config)
    found.peft_config["default"].base_model_name_or_path = "model"
    return found


def test_the_commands_make_a_vector_and_a_fine_tune_takes_it_on(place, monkeypatch, capsys):
    saved("llama")
    assert main(["init", "model", *OWN_DATA]) == 0
    commands = (RECIPE / "README.md").read_text().split("```")[1].splitlines()[1:]
    steps = [shlex.split(line, comments=True)[1:] for line in commands]
    assert [step[0] for step in steps] == ["sft", "extract", "sft", "apply"]
    for step in steps:
        assert f"# Run: safegene {shlex.join(step)}\n" in Path(step[2]).read_text()
    monkeypatch.setattr("safegene_trl.extraction.answers.answers_to_tokens", refusing)
    short = ["--max_steps", "2", "--warmup_steps", "0", "--learning_rate", "0.01"]
    assert main([*steps[0], *short, "--disable_tqdm", "true"]) == 0
    assert main(steps[1]) == 0
    with pytest.raises(DryRunComplete):
        main([*steps[2], "--safegene.dry_run", "true", "--disable_tqdm", "true"])


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_what_is_for_gpus_parses(kind, place):
    _, vector = saved(kind)
    vector.save_pretrained("build/model/safety-vector")
    for folder, options in (("one", ["--num_gpus", "1"]), ("four", ["--num_gpus", "4"])):
        assert main(["init", "model", *OWN_DATA, *options, "--output_dir", folder]) == 0
        recipe = yaml.safe_load(Path(folder, "sft.yaml").read_text())
        assert recipe["dtype"] == "bfloat16" and recipe["bf16"] and recipe["gradient_checkpointing"]
        steps = recipe["per_device_train_batch_size"] * recipe.get("gradient_accumulation_steps", 1)
        assert steps == (16 if folder == "one" else 4)
        launch = "--accelerate_config ddp --num_processes 4"
        assert (launch in Path(folder, "sft.yaml").read_text()) == (folder == "four")
    words = ["--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--disable_tqdm", "true"]
    changes = ["--safegene.dry_run", "true", "--safegene.vector", "build/model/safety-vector"]
    with pytest.raises(DryRunComplete):
        main(["sft", "--config", "one/sft.yaml", *words, *changes])


def test_a_recipe_for_4_bits_runs(place, monkeypatch, capsys):
    model, tokenizer = wide_model(), make_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained("model")
    make_vector(model, tokenizer).save_pretrained("build/model/safety-vector")
    in_4_bits = lambda *known: replace(plan_for(*known), four_bit=True)  # noqa: E731
    monkeypatch.setattr("safegene_trl.commands.init.plan_for", in_4_bits)
    assert main(["init", "model", *OWN_DATA, "--num_gpus", "1"]) == 0
    assert "QLoRA needs bitsandbytes" in capsys.readouterr().out
    words = ["--use_cpu", "true", "--bf16", "false", "--disable_tqdm", "true"]
    with pytest.raises(DryRunComplete):
        recipe = str(RECIPE / "sft.yaml")
        main(["sft", "--config", recipe, "--safegene.dry_run", "true", *words])
    assert "all checks passed" in capsys.readouterr().out


@pytest.mark.parametrize("found", ["named", "in the folder"])
def test_with_a_vector_nothing_that_makes_one_is_written(found, place, capsys):
    _, vector = saved("llama")
    target = Path("mine") if found == "named" else RECIPE / "safety-vector"
    vector.save_pretrained(target)
    before = {path: path.read_bytes() for path in target.iterdir()}
    words = ["--vector", "mine"] if found == "named" else []
    assert main(["init", "model", "--data", "task.jsonl", *words]) == 0
    assert written() - {"safety-vector"} == FILES
    for name in ("sft.yaml", "apply.yaml"):
        assert yaml.safe_load((RECIPE / name).read_text())["safegene"]["vector"] == str(target)
    assert "extract" not in (RECIPE / "README.md").read_text()
    assert before == {path: path.read_bytes() for path in target.iterdir()}
    assert f"The vector {target} fits the model" in capsys.readouterr().out


def test_a_vector_that_does_not_fit_is_refused(place, capsys):
    _, vector = saved("llama")
    vector.save_pretrained("mine")
    saved("qwen3")
    assert "was made for LlamaForCausalLM" in refused(capsys, "model", "--vector", "mine")
    saved("llama")
    said = refused(capsys, "model", "--vector", "mine", "--harmful_data", "harmful.jsonl")
    assert "`--harmful_data` is for the making of a vector" in said
    for name in ("one", "two"):
        vector.save_pretrained(RECIPE / name)
    assert "holds several safety vectors (one, two)" in refused(capsys, "model")
    assert written() == {"one", "two"}


def test_without_data_an_example_is_named(place, capsys):
    saved("llama")
    assert main(["init", "model"]) == 0
    recipe = yaml.safe_load((RECIPE / "sft.yaml").read_text())
    assert recipe["dataset_name"] == "trl-lib/Capybara"
    told = capsys.readouterr().out
    assert "No --data was named" in told and "prepare.py --data-only` in a clone" in told
    assert (
        "# Before: python recipes/smollm2-135m/prepare.py" in (RECIPE / "degrade.yaml").read_text()
    )


@pytest.mark.parametrize("vector", [True, False])
def test_a_tokenizer_without_a_chat_template(vector, place, capsys):
    _, made = saved("llama", template=False)
    made.save_pretrained("mine")
    words = ["model", *(["--vector", "mine"] if vector else [])]
    said = refused(capsys, *words)
    assert "has no chat template" in said and "`--data`" in said
    assert ("`--degrade_data`" in said) == (not vector) and not RECIPE.exists()
    rows = "".join(
        json.dumps({"text": f"sort item {i} into box {i % 3}"}) + "\n" for i in range(24)
    )
    Path("plain.jsonl").write_text(rows)
    data = ["--data", "plain.jsonl"] + ([] if vector else ["--degrade_data", "plain.jsonl"])
    assert main(["init", *words, *data]) == 0
    assert "no chat template" in capsys.readouterr().out
    made.save_pretrained("build/model/safety-vector")
    with pytest.raises(DryRunComplete):
        main(["sft", "--config", str(RECIPE / "sft.yaml"), "--safegene.dry_run", "true"])


@pytest.mark.parametrize("name", sorted(FILES | TO_MAKE))
@pytest.mark.parametrize("what", ["file", "link that leads nowhere"])
def test_what_is_there_is_not_replaced(name, what, place, capsys):
    config_only(LlamaConfig(**small_shape()))
    RECIPE.mkdir(parents=True)
    if what == "file":
        (RECIPE / name).write_text("mine")
    else:
        (RECIPE / name).symlink_to(place / "elsewhere")
    for more in ([], ["--dry_run"]):
        said = refused(capsys, "model", *more)
        assert f"{RECIPE / name} is there already and is not replaced" in said
    assert written() == {name} and not (place / "elsewhere").exists()
    assert what != "file" or (RECIPE / name).read_text() == "mine"


def test_a_folder_that_cannot_be_written_into(place, capsys):
    config_only(LlamaConfig(**small_shape()))
    (place / "real").mkdir()
    (place / "link").symlink_to("real")
    assert "link is a symbolic link" in refused(capsys, "model", "--output_dir", "link")
    assert not list((place / "real").iterdir())
    assert "task.jsonl is a file" in refused(capsys, "model", "--output_dir", "task.jsonl")
    assert "a folder of its own" in refused(capsys, "model", "--output_dir", ".")
    assert "cannot be seen" in refused(capsys, "model", "--output_dir", "a\nb")
    for option in ("--output_dir", "--build_dir", "--vector", "--data"):
        assert "a name in it 255" in refused(capsys, "model", option, "n" * 256)
    assert "a name in it 255" in refused(capsys, "n" * 5000)
    assert "is empty" in refused(capsys, "model", "--data", "")


def test_a_dry_run_prints_and_writes_nothing(place, capsys):
    config_only(LlamaConfig(**small_shape()))
    before = sorted(place.rglob("*"))
    assert main(["init", "model", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert all(f"==> {RECIPE / name} <==" in told for name in FILES | TO_MAKE)
    assert told.endswith("Dry run: nothing was written.\n") and sorted(place.rglob("*")) == before


def changed(**values):
    """Writes what a model's config says otherwise."""
    path = Path("model/config.json")
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "brandnew"}, "The model type `brandnew` of model is not known"),
        ({"model_type": "brandnew"}, "upgrade transformers, or name a model of a family"),
        ({"model_type": "brandnew", "auto_map": {"AutoConfig": "x.Y"}}, "which is never run"),
        ({"model_type": None, "architectures": None}, "names no `model_type`"),
        ({"model_type": "t5"}, "no causal language model"),
        ({"vocab_size": 0}, "describes no model that can be made"),
        ({"num_attention_heads": 0}, "describes no model that can be made"),
        ({"num_hidden_layers": 10_000}, "has 10,000 layers, and a model has 1 to 2,000"),
        ({"num_hidden_layers": 0}, "has 0 layers"),
        ({"num_hidden_layers": -1}, "has -1 layers"),
        ({"hidden_size": "big"}, "describes no model that can be made"),
        ({"hidden_size": 32.5}, "describes no model that can be made"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "quantised",
        ),
    ],
)
def test_a_config_that_no_recipe_is_for(values, message, place, capsys):
    config_only(LlamaConfig(**small_shape()))
    changed(**values)
    assert message in refused(capsys, "model") and not Path("recipes").exists()


def test_a_folder_that_is_no_model(place, capsys, vector_dir):
    Path("model").mkdir()
    assert "model holds no model" in refused(capsys, "model")
    Path("model/model.safetensors").write_bytes(b"")
    assert "model has no config.json" in refused(capsys, "model")
    Path("model/config.json").write_text("{")
    assert "config.json of model cannot be read" in refused(capsys, "model")
    assert "is a safety vector and no model" in refused(capsys, str(vector_dir))
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"base_model_name_or_path": "the-base"}')
    assert "name the model that it was trained on, the-base" in refused(capsys, "adapter")
    assert not Path("recipes").exists()


def test_a_hub_id_that_cannot_be_reached(place, capsys):
    said = refused(capsys, "no/such-model")
    assert "neither a local directory nor a readable hub repository" in said
    assert "connect to the hub" in said
    assert "name the folder of a checkpoint" in refused(capsys, "no/such/model")


def test_cells_between_tabs_are_told_at_once(place, capsys):
    saved("llama")
    Path("faq.tsv").write_text("prompt\tcompletion\na\tb\n")
    said = refused(capsys, "model", "--data", "faq.tsv")
    assert "`--data` is faq.tsv, and a training reads no cells between tabs: save it as CSV" in said


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("faq.csv", "question,answer\na,b\n"),
        ("faq.csv", "\ufeffquestion,answer\na,b\n"),
        ("faq.jsonl", '{"question": "a", "answer": "b"}\n'),
    ],
)
def test_columns_that_no_training_reads_are_told_at_once(name, text, place, capsys):
    saved("llama")
    Path(name).write_text(text)
    for option in ("--data", "--degrade_data"):
        said = refused(capsys, "model", option, name)
        assert "has the columns `question`, `answer`: name those of questions" in said
    Path(name).write_text(text.replace("question", "prompt").replace("answer", "completion"))
    assert main(["init", "model", "--data", name, "--num_gpus", "0"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "none.jsonl"], "The data file none.jsonl is not there"),
        (["--data", "model/config.txt"], "which ends in none of"),
        (["--data", "no/such/data"], "no file or folder here and no name on the hub"),
        (["--harmful_data", "harmful.jsonl"], "set both, or neither"),
        (["--num_gpus", "-1"], "at least 0"),
        (["--gpu_memory", "0"], "above 0"),
        (["--gpu_memory", "1e300"], "at most"),
        (["--data", "a[1].jsonl"], "which datasets takes for a pattern: rename it"),
        (["--num_gpus", "0", "--gpu_memory", "80"], "a CPU has none"),
        (["--gpus", "2"], "did you mean"),
    ],
)
def test_options_that_cannot_be_meant(words, message, place, capsys):
    config_only(LlamaConfig(**small_shape()))
    Path("model/config.txt").write_text("")
    Path("a[1].jsonl").write_text("{}")
    assert message in refused(capsys, "model", *words) and not Path("recipes").exists()


def test_data_of_the_hub_and_of_other_files(place):
    config_only(LlamaConfig(**small_shape()))
    Path("rows.csv").write_text("text\nx\n")
    for folder, given, keys in (
        (
            "a",
            "o/n:c@s",
            {"dataset_name": "o/n", "dataset_config": "c", "dataset_train_split": "s"},
        ),
        (
            "b",
            "rows.csv",
            {"datasets": [{"path": "csv", "data_files": "rows.csv", "split": "train"}]},
        ),
    ):
        assert main(["init", "model", "--data", given, "--output_dir", folder]) == 0
        recipe = yaml.safe_load(Path(folder, "sft.yaml").read_text())
        assert keys.items() <= recipe.items()
        applied = yaml.safe_load(Path(folder, "apply.yaml").read_text())
        assert applied["safegene"]["data"]["task_data"] == given


LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)


def test_a_real_size_is_told_without_weights(place):
    config_only(LLAMA_8B)
    found = find_model("model")
    assert found.sizes.parameters == 8_030_261_248  # as its model card says
    assert found.sizes.in_layers == 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)
    assert found.sizes.factors == 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert not found.tied and found.targets is None and found.experts == 0
    chosen = {
        memory: plan_for("m", found.sizes, False, Machine(1, memory * GIB)).method
        for memory in (16, 48, 80)
    }
    assert chosen == {16: "QLoRA", 48: "LoRA", 80: "LoRA"}


def test_what_a_16_bit_model_does_not_fit_into_is_launched_on_several(place, capsys):
    config_only(LLAMA_8B)
    assert main(["init", "model", "--gpu_memory", "16"]) == 0
    told = capsys.readouterr().out
    assert "Chosen: QLoRA of rank 16 in bfloat16 on one GPU of 16 GiB; 1 × 16 samples" in told
    assert "QLoRA needs bitsandbytes" in told and "ZeRO-3 needs DeepSpeed" in told
    launch = "--accelerate_config zero3 --num_processes 2\n"
    for name in FILES | TO_MAKE:
        assert (launch in (RECIPE / name).read_text()) == (name in ("extract.yaml", "apply.yaml"))
    assert "zero3 --num_processes 2   # 3\n" in (RECIPE / "README.md").read_text()


def test_a_mixture_has_the_lora_on_its_attention(place):
    config_only(MixtralConfig(num_hidden_layers=2))
    found = find_model("model")
    assert found.targets == ["q_proj", "k_proj", "v_proj", "o_proj"] and found.experts == 8
    assert found.sizes.factors == 2 * (2 * 8192 + 2 * 5120)
    # a token goes through two of the eight experts
    experts = 2 * (4096 + 2 * 14336 + 14336 + 4096)
    router = found.sizes.width - (2 * 8192 + 2 * 5120 + experts)
    assert router in (0, 4096 + 8)  # a linear layer in some versions of transformers


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("mamba2", ".*\\.in_proj"),
        ("nemotron_h", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("deepseek_v3", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]),
        ("granitemoehybrid", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("bamba", None),
    ],
)
def test_no_lora_is_named_where_peft_or_the_step_refuses_one(kind, targets, place):
    config_only(make_architecture(kind).config)
    assert main(["init", "model"]) == 0
    recipe = (RECIPE / "sft.yaml").read_text()
    assert yaml.safe_load(recipe)["lora_target_modules"] == (targets or "all-linear")
    assert ("# Not all-linear: " in recipe) == (targets is not None)


SEVENTY = ModelSizes(
    parameters=70_600_000_000,
    in_layers=68_500_000_000,
    factors=12_950_000,
    layers=80,
    hidden=8192,
    width=180_000,
    vocabulary=128256,
)


@pytest.mark.parametrize(
    ("mixture", "gpus", "memory", "method", "processes", "sharded"),
    [
        (False, 1, 80, "QLoRA", 1, False),
        (False, 1, 192, "LoRA", 1, False),
        (False, 8, 80, "LoRA", 8, True),
        (True, 1, 80, "LoRA", 4, True),
        (False, 1, 16, "LoRA", 64, True),
    ],
)
def test_settings_by_size(mixture, gpus, memory, method, processes, sharded):
    plan = plan_for("m", SEVENTY, mixture, Machine(gpus, memory * GIB))
    found = (plan.method, plan.launch.processes, plan.launch.sharded)
    assert found == (method, processes, sharded)
    for needed in (plan.fine_tune.memory, plan.degrading.memory, plan.reading_memory):
        assert needed <= 0.9 * memory * GIB
    # the 16-bit model is read whole by `extract` and `apply`, whatever the training holds
    assert (plan.reading.processes > 1) == (memory < 192)
    whole = plan.fine_tune.samples * plan.fine_tune.accumulation * processes
    assert whole == max(16, plan.fine_tune.samples * processes)


def test_what_fits_nowhere_is_refused():
    with pytest.raises(ConfigError, match="64 GPUs of 8 GiB do not hold its training"):
        plan_for("m", SEVENTY, True, Machine(1, 8 * GIB))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", "qwen2.5-1.5b"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-4b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("out/My model (2)/", "my-model-2"),
    ],
)
def test_names_of_families_are_those_of_the_recipes(model, name):
    assert family_name(model) == name
