"""A transport in two processes, and what becomes of the vector that it makes: trained on, signed, put
on a hub, and taken on in one process and in several.
"""

import json
import os

import pytest
import torch
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safegene_trl import SafetyVector
from safegene_trl.checkpoints.loading import load_tokenizer
from safegene_trl.commands.main import main
from safegene_trl.models.inputs import batches, tokenize
from safegene_trl.models.losses import cross_entropy

from ..conftest import BENIGN, HARMFUL, argv, make_vector, refusing, task_dataset
from ..extraction.transport import planted
from ..hub import Hub
from ..interpreter import Interpreter
from .launching import MODULE


pytestmark = pytest.mark.timeout(500)


@pytest.fixture(scope="module")
def transport(tmp_path_factory):
    """Options of a transport between planted models, and the vector made in one process. The target
    refuses nothing, and the source what it is asked.
    """
    root = tmp_path_factory.mktemp("transport")
    tokenizer, other = planted.source_tokenizer(), planted.target_tokenizer()
    source = planted.planted_model("llama", tokenizer, 32, 2, seed=5)
    planted.save(source, tokenizer, root / "source")
    deltas, _ = planted.planted_delta(source, tokenizer, seed=5)
    vector = make_vector(source, tokenizer, deltas)
    vector.selection["selected_layers"], vector.extraction["rank"] = [0], 1
    vector.save_pretrained(root / "source_vector")
    planted.save(planted.planted_model("qwen2", other, 48, 3, seed=6), other, root / "target")
    (root / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task_dataset()))
    options = {
        "method": "transport",
        "source_model": root / "source",
        "source_vector": root / "source_vector",
        "aligned_model": root / "target",
        "selection": "all",
        "max_new_tokens": 12,
        "weights_dtype": "float32",
        **planted.prompt_files(root),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safegene_trl.extraction.answers.answers_to_tokens", source_refuses)
        assert main(argv("extract", options | {"output_dir": root / "vector"})) == 0
    return root, options


def source_refuses(model, tokenizer, prompts, *rest):
    if model.config.model_type == "llama":
        return refusing(model, tokenizer, prompts)
    return ["Take a pan. Stir"] * len(prompts)


def block(root, **output):
    shots = {"num_safety_shots": 6, "num_benign_shots": 4, "num_task_shots": 6}
    return {
        "vector": str(root / "vector"),
        "data": {"task_data": str(root / "task.jsonl"), **shots},
        "search": {"max_evaluations": 2, "max_utility_loss": 100.0},
        "measure": {"max_new_tokens": 4},
        **({"output": output} if output else {}),
    }


def report_of(folder):
    return json.loads((folder / "safegene_report.json").read_text())


def test_a_fine_tune_takes_the_vector_on(transport, tmp_path):
    """By `sft`, which calls the callback, and by `apply` on what was trained."""
    root, _ = transport
    recipe = {
        "model_name_or_path": str(root / "target"),
        "output_dir": str(tmp_path / "out"),
        "dtype": "float32",
        "datasets": [{"path": "json", "data_files": str(root / "task.jsonl"), "split": "train"}],
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "safegene": block(root),
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["sft", "--config", str(tmp_path / "sft.yaml")]) == 0
    report = report_of(tmp_path / "out" / "safeguarded")
    names = set(SafetyVector.from_pretrained(root / "vector").deltas)
    assert set(report["coefficients"]) == names and any(report["coefficients"].values())
    # what the target does with the harmful prompts is not known: the refusals are the source's
    assert "restored" not in report["measured"]
    assert "refusal_rate" not in report["measured"].get("aligned", {})
    assert any("its refusals are that model's" in warning for warning in report["warnings"])
    (tmp_path / "apply.yaml").write_text(
        yaml.safe_dump({"safegene": block(root, output_dir=str(tmp_path / "alone"))})
    )
    source = ["--config", str(tmp_path / "apply.yaml"), "--model_name_or_path"]
    assert main(["apply", *source, str(tmp_path / "out")]) == 0
    alone = report_of(tmp_path / "alone")
    assert alone["coefficients"] == pytest.approx(report["coefficients"], abs=2e-6)
    AutoModelForCausalLM.from_pretrained(tmp_path / "alone")


def test_it_is_signed_verified_and_shared(transport, tmp_path):
    root, _ = transport
    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (tmp_path / "maker.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "maker.pub").write_bytes(
        key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    SafetyVector.from_pretrained(root / "vector").save_pretrained(tmp_path / "signed")
    signed = str(tmp_path / "signed")
    assert main(["sign", signed, "--private_key", str(tmp_path / "maker.pem")]) == 0
    assert main(["verify", signed, "--public_key", str(tmp_path / "maker.pub")]) == 0
    with Hub() as server:
        environment = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_made_up"}
        python = Interpreter(
            environment | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        )
        script = (
            "from safegene_trl import SafetyVector; "
            f"SafetyVector.from_pretrained({signed!r}).push_to_hub('me/vector')"
        )
        done = python.run(script)
        python.end()
        assert done.returncode == 0, done.stderr[-2000:]
        files = server.repositories["me/vector"]["files"]
    for name in sorted(os.listdir(signed)):
        if name != "README.md":
            assert files[name] == (tmp_path / "signed" / name).read_bytes(), name
    assert b"carried over from another model" in files["README.md"]


def test_zero3_takes_it_on_as_one_process_does(transport, forked, tmp_path):
    root, _ = transport
    (tmp_path / "apply.yaml").write_text(yaml.safe_dump({"safegene": block(root)}))
    words = ["--config", str(tmp_path / "apply.yaml")]
    words += ["--model_name_or_path", str(root / "target"), "--safegene.output.output_dir"]
    launch = [*MODULE, "apply", "--accelerate_config", "zero3", "--num_processes", "2"]
    done = forked([*launch, *words, str(tmp_path / "sharded")])
    assert done.returncode == 0, done.stdout[-6000:]
    assert main(["apply", *words, str(tmp_path / "alone")]) == 0
    reports = [report_of(tmp_path / name) for name in ("sharded", "alone")]
    assert reports[0]["launch"] == {"sharding": "zero3", "processes": 2}
    assert reports[0]["coefficients"] == pytest.approx(reports[1]["coefficients"], abs=2e-6)
    sharded, alone = (
        load_file(tmp_path / name / "model.safetensors") for name in ("sharded", "alone")
    )
    assert all(torch.allclose(sharded[key], alone[key], rtol=0, atol=1e-6) for key in alone)


@pytest.fixture(scope="module")
def refusing_source(transport):
    """The same, whose models answer by themselves: both have learned one sentence by heart."""
    root, options = transport
    for name in ("source", "target"):
        model = AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32)
        tokenizer = load_tokenizer(str(root / name))
        _learn(model, tokenizer)
        planted.save(model, tokenizer, root / f"learned_{name}")
    learned = {
        "source_model": root / "learned_source",
        "aligned_model": root / "learned_target",
        "allow_other_base": True,
        "min_transport_quality": 0.0,
    }
    return options | learned


def _learn(model, tokenizer):
    turns = [(prompt, "i cannot help with that.") for prompt in HARMFUL] + [
        (prompt, "take a pan.") for prompt in BENIGN
    ]
    samples = [
        tokenize(tokenizer, [{"role": "user", "content": prompt}], answer)
        for prompt, answer in turns
    ]
    (batch,) = batches(samples, len(samples), 0, torch.device("cpu"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = cross_entropy(model, batch).sum() / batch.target_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.exhaustive
def test_two_processes_make_one_vector(refusing_source, forked, tmp_path):
    words = [item for k, v in refusing_source.items() for item in (f"--{k}", str(v))]
    for config in ("zero3", "ddp"):
        launch = [*MODULE, "extract", "--accelerate_config", config, "--num_processes", "2"]
        done = forked([*launch, *words, "--output_dir", str(tmp_path / config)])
        assert done.returncode == 0, done.stdout[-6000:]
    assert main(["extract", *words, "--output_dir", str(tmp_path / "alone")]) == 0
    sharded, whole, alone = (
        SafetyVector.from_pretrained(tmp_path / name) for name in ("zero3", "ddp", "alone")
    )
    assert sharded.prompts == whole.prompts == alone.prompts
    for name, delta in alone.deltas.items():
        for other in (sharded, whole):
            torch.testing.assert_close(
                other.deltas[name].dense(), delta.dense(), atol=1e-3, rtol=1e-2
            )
