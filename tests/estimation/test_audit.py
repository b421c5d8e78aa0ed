"""`safegene estimate audit` against what the audit does: operations in place of seconds, and
bytes.
"""

import json
from pathlib import Path

import pytest

from safegene_trl.auditing.audit import audit
from safegene_trl.auditing.config import AuditConfig
from safegene_trl.commands.main import main
from safegene_trl.estimation.probe import Probe
from safegene_trl.provenance import model_reference

from ..conftest import make_model, make_vector, with_lora
from .test_estimation import llama, operations


PROMPTS = [
    f"say how one may {verb} a raft of {what}" for verb in ("saw", "sink") for what in "abcdefghi"
]


@pytest.fixture
def place(tmp_path, tokenizer, monkeypatch):
    """An aligned model, a vector of it, a LoRA on it and prompts, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Probe, "_seconds", lambda probe, run: operations(run))
    model = llama(4)
    model.generation_config.eos_token_id = model.config.eos_token_id = None  # to the last token
    model.save_pretrained("aligned")
    tokenizer.save_pretrained("aligned")
    vector = make_vector(model, tokenizer, std=0.01)
    vector.aligned_model = model_reference("aligned")
    vector.save_pretrained("vector")
    tuned = with_lora(model)
    tuned.peft_config["default"].base_model_name_or_path = "aligned"
    tuned.save_pretrained("tuned")
    rows = [json.dumps({"prompt": text, "category": text.split()[4]}) for text in PROMPTS]
    Path("prompts.jsonl").write_text("\n".join(rows))


def words(**options):
    given = {"aligned_model": "aligned", "harmful_data": "prompts.jsonl", "max_new_tokens": 6}
    given |= {"batch_size": 4} | options
    return [
        "vector",
        *(str(word) for name, value in given.items() for word in (f"--{name}", value)),
    ]


def config(**options):
    given = {"vector": "vector", "aligned_model": "aligned", "harmful_data": ["prompts.jsonl"]}
    return AuditConfig(**given | {"max_new_tokens": 6, "batch_size": 4} | options)


@pytest.mark.parametrize(
    "options", [{}, {"coefficients": "0.5"}, {"model": "tuned"}], ids=["reach", "given", "tuned"]
)
def test_work_and_bytes_are_those_of_the_audit(options, place, capsys):
    written = {"json": "costs.json"}
    assert (
        main(["estimate", "audit", *words(**options), *(f"--{k}={v}" for k, v in written.items())])
        == 0
    )
    assert "together" in capsys.readouterr().out and not Path("audit").exists()
    costs = json.loads(Path("costs.json").read_text())
    assert set(costs) == {"aligned", "save"} | ({"fine_tune"} if "model" in options else set())
    work = operations(lambda: audit(config(**options)))
    assert sum(cost["seconds"] for cost in costs.values()) == pytest.approx(work, rel=0.15)
    size = sum(path.stat().st_size for path in Path("audit").iterdir())
    assert costs["save"]["disk"] == pytest.approx(size, rel=0.3)
    weights = sum(parameter.nbytes for parameter in llama(4).parameters())
    assert all(cost["memory"] > weights for cost in costs.values())


def test_what_the_audit_would_refuse_is_refused(place, tokenizer, capsys):
    make_model(seed=5).save_pretrained("other")
    tokenizer.save_pretrained("other")
    for options, message in (
        ({"forms": "story"}, "`forms` must name `direct`"),
        ({"model": "other"}, "parameter names or shapes differ"),
        ({"output_dir": "aligned"}, "is read as aligned"),
    ):
        assert main(["estimate", "audit", *words(**options)]) == 2
        assert message in capsys.readouterr().err
    assert main(["estimate", "--num_processes=2", "audit", *words()]) == 2
    assert "one process's work" in capsys.readouterr().err
