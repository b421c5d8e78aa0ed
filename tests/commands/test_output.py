"""`--json` and `--quiet`, of every command."""

import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from safegene_trl.commands import launching
from safegene_trl.commands.main import COMMANDS, main
from safegene_trl.commands.output import OPTIONS, Output, set_by_recipe, taken
from safegene_trl.evaluation.folder import RESULT
from safegene_trl.provenance import model_reference
from safegene_trl.step.history import append_release
from safegene_trl.vectors.audit_file import AUDIT_FILE

from ..conftest import argv, make_model, make_vector, options_of, write_prompts
from ..step.test_history import release


LENIENT = {
    "max_utility_loss": 100,
    "utility_weight": 0,
    "max_evaluations": 1,
    "num_test_prompts": 2,
    "max_new_tokens": 2,
}
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]
REPORTS = {"apply", "sft"}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def keys(tmp_path):
    key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "maker.pem").write_bytes(private)
    (tmp_path / "maker.pub").write_bytes(public)
    return str(tmp_path / "maker.pem"), str(tmp_path / "maker.pub")


@pytest.fixture
def safeguarding(vector_dir, task_file, monkeypatch):
    """Options of a safety step that accepts whatever comes."""
    monkeypatch.setattr("safegene_trl.recalibration.search.objection", lambda *losses: "")
    places = {"vector": vector_dir, "task_data": task_file}
    return options_of({**LENIENT, **places})


@pytest.fixture
def words(request, tmp_path, vector_dir):
    """The words of a command on tiny models, whose result is `out` where it writes one."""
    out = tmp_path / "out"

    def of(command):
        value = request.getfixturevalue
        if command in REPORTS:
            fine_tune = ["--model_name_or_path", str(value("model_dir"))]
            fine_tune += value("safeguarding")
            if command == "apply":
                return ["apply", *fine_tune, f"--safegene.output.output_dir={out}"]
            data = ["--dataset_name", value("data_set"), "--output_dir", str(out)]
            return ["sft", *fine_tune, *data, "--max_steps", "1", "--report_to", "none", *ON_CPU]
        if command == "extract":
            return argv("extract", value("extraction"))
        if command == "estimate":
            return ["estimate", *of("apply")]
        if command in ("evaluate", "audit"):
            vector, prompts = value("audited")
            shared = ["--harmful_data", prompts, "--max_new_tokens", "2", "--output_dir", str(out)]
            if command == "evaluate":
                return [command, "--model_name_or_path", str(value("model_dir")), *shared]
            return [command, vector, "--aligned_model", str(value("model_dir")), *shared]
        if command == "history":
            for refused in (95, 94, 92, 91, 70):
                append_release(tmp_path / "history.jsonl", release(refused))
            return ["history", str(tmp_path / "history.jsonl")]
        if command == "init":
            place = str(tmp_path / "recipes")
            return ["init", str(value("model_dir")), "--num_gpus", "0", "--output_dir", place]
        if command in ("sign", "verify"):
            private, public = value("keys")
            place = value("other_vector")
            signed = ["sign", place, "--private_key", private]
            if command == "sign":
                return signed
            assert main(signed) == 0
            value("capsys").readouterr()
            return ["verify", place, "--public_key", public]
        if command == "combine":
            return ["combine", str(vector_dir), value("other_vector"), "--output_dir", str(out)]
        if command == "similarity":
            return ["similarity", str(vector_dir), value("other_vector")]
        return {"inspect": ["inspect", str(vector_dir)], "completion": ["completion", "bash"]}[
            command
        ]

    return of


@pytest.fixture
def other_vector(tmp_path, tokenizer):
    make_vector(make_model(), tokenizer, seed=4).save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


@pytest.fixture
def audited(tmp_path, model_dir, tokenizer):
    """A vector of the aligned model that lies in `model_dir`, and prompts that it has not seen."""
    vector = make_vector(make_model(), tokenizer)
    vector.aligned_model = model_reference(str(model_dir))
    vector.save_pretrained(tmp_path / "own")
    unseen = [f"say where one may {verb} a raft unseen" for verb in ("lift", "sink", "hide")]
    return str(tmp_path / "own"), str(write_prompts(tmp_path / "unseen.jsonl", unseen))


@pytest.fixture
def data_set(tmp_path, task_file):
    (tmp_path / "data").mkdir()
    shutil.copy(task_file, tmp_path / "data")
    return str(tmp_path / "data")


def written(command, folder):
    """The record that a command has left in its files; None where it leaves none."""
    place = {
        "apply": "out/safegene_report.json",
        "sft": "out/safeguarded/safegene_report.json",
        "evaluate": f"out/{RESULT}",
        "audit": f"out/{AUDIT_FILE}",
    }.get(command)
    return None if place is None else json.loads((folder / place).read_text())


# `demo` ends by Ctrl-C alone; its own tests see to it
@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"demo"}))
def test_every_command_prints_one_document(command, words, tmp_path, capsys):
    code = main([*words(command), "--json"])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert code == (3 if command == "history" else 0) and found, printed.err[-2000:]
    record = written(command, tmp_path)
    if record is not None:
        assert found == record
    named = NAMED.get(command, [])
    assert set(named) <= set(found), sorted(found)


NAMED = {
    "history": ["releases", "warnings", "refusals_drift"],
    "extract": ["vector", "rank", "layers", "extraction", "selection", "prompts"],
    "inspect": ["vector", "rank", "layers", "audit"],
    "combine": ["vector", "components"],
    "similarity": ["vectors", "cosines"],
    "estimate": ["recalibrate", "save"],
    "init": ["folder", "written", "files", "model", "chosen", "notes"],
    "sign": ["vector", "signature"],
    "verify": ["vector", "public_key", "verified"],
    "completion": ["shell", "script"],
    "demo": ["release", "address"],
}


def test_the_page_of_commands_tells_of_every_document():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    section = text.partition("## What every command takes")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    for command in COMMANDS:
        (row,) = [line for line in table if f"`{command}`" in line.split("|")[1]][:1]
        if command == "estimate":  # by step
            assert all(f"`{name}`" in row for name in ("seconds", "memory", "disk"))
        else:
            assert all(f"`{name}`" in row for name in NAMED.get(command, [])), command


# of those that work with a model, these show no bar that the others have not
LONG = {"audit", "demo", "estimate", "extract", "init"}


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - LONG))
def test_a_quiet_command_prints_nothing(command, words, capsys):
    given = words(command)
    capsys.readouterr()  # of the models that were made
    code = main(["--quiet", *given])
    printed = capsys.readouterr()
    assert code == (3 if command == "history" else 0) and not printed.out, printed.err[-2000:]
    if command == "history":  # what changes what one should do
        assert printed.err.startswith("warning: The newest release refuses 70%")
        assert printed.err.count("\n") == 2
    else:
        assert not printed.err


@pytest.mark.parametrize(
    ("words", "json", "quiet", "rest"),
    [
        (["--json", "history", "h"], True, False, ["history", "h"]),
        (["history", "--json", "h.json"], True, False, ["history", "h.json"]),
        (["inspect", "--json", "report.json"], True, False, ["inspect", "report.json"]),
        (["inspect", "--json=a b.json", "v"], Path("a b.json"), False, ["inspect", "v"]),
        (["inspect", "--json=TRUE", "v"], True, False, ["inspect", "v"]),
        (["similarity", "v", "w", "--json", "c.json"], Path("c.json"), False, None),
        (["estimate", "--json", "c.json", "apply"], Path("c.json"), False, ["estimate", "apply"]),
        (["similarity", "--json", "v", "w"], True, False, ["similarity", "v", "w"]),
        (["audit", "v", "--json", "true", "--quiet"], True, True, ["audit", "v"]),
        (["audit", "v", "--json=false"], False, False, ["audit", "v"]),
        (["--quiet", "apply", "--config", "a.yaml", "--json"], True, True, None),
        (["apply", "--help", "--json"], False, False, ["apply", "--help"]),
    ],
)
def test_where_the_options_may_stand(words, json, quiet, rest):
    output, others = taken(words)
    assert (output.json, output.quiet) == (json, quiet)
    assert rest is None or (others == rest and output.command in (rest[0], ""))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--json", "inspect", "v", "--json"], "`--json` is on the command line twice"),
        (["inspect", "v", "--quiet=maybe"], "`--quiet` is 'maybe': it must be true or false."),
        (["inspect", "v", "--json="], "`--json` is '': it must be true, false or a file that ends"),
        (["inspect", "v", "--json=out.txt"], "must be true, false or a file that ends in .json."),
        (["inspect", "v", "--js"], "`--json` is cut short: write it out."),
        (["evaluate", "--quiet", "--qiet"], "is `--qiet`"),
    ],
)
def test_what_is_wrong_with_them_is_one_sentence(words, said, capsys):
    assert main(words) == 2
    printed = capsys.readouterr()
    assert said.replace("is `--qiet`", "qiet") in printed.err and printed.err.count("\n") == 1


def test_help_says_what_every_command_takes(capsys):
    for words in (["--help"], ["estimate", "--help"]):
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert all(option in printed for option in OPTIONS)
    for command in ("inspect", "evaluate"):
        with pytest.raises(SystemExit):
            main([command, "--help", "--json"])
        printed = capsys.readouterr().out
        assert "--json [FILE]" in printed and "--quiet" in printed


def test_an_error_is_a_document_too(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "none" / "at" / "all"), "--json"]) == 2
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert printed.err == f"safegene inspect: {found['error']}\n" and found["exit_code"] == 2
    assert main(["inspect", "--quiet", str(tmp_path / "none" / "at" / "all")]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err == f"safegene inspect: {found['error']}\n"


def test_the_document_replaces_nothing_that_the_command_reads(
    keys, other_vector, vector_dir, tmp_path, capsys
):
    private, public = keys
    for place in (private, public):  # whatever their names are
        shutil.move(place, f"{place}.json")
    private, public = f"{private}.json", f"{public}.json"
    recipe = tmp_path / "recipe.json"
    recipe.write_text(f"vector: {vector_dir}\nharmful_data: {public}\n")
    kept = {place: Path(place).read_bytes() for place in (private, public, recipe)}
    for words, place in (
        (["sign", other_vector, "--private_key", private], private),
        (["sign", other_vector, f"--private_key={private}"], private),
        (["verify", other_vector, "--public_key", public], public),
        (["audit", "--config", str(recipe)], recipe),
        (["audit", "--config", str(recipe)], public),
    ):
        assert main([*words, f"--json={place}"]) == 2
        assert f"{place} is read by the same command: choose" in capsys.readouterr().err
    assert {place: Path(place).read_bytes() for place in kept} == kept


@pytest.mark.parametrize("options", [[], ["--json"], ["--quiet"]])
def test_a_closed_standard_output_ends_nothing(options, vector_dir, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert main(["inspect", str(vector_dir), *options]) == 0


def test_words_that_cannot_be_read_have_a_document_too(capsys):
    assert main(["inspect", "v", "--json", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2


def test_an_error_replaces_an_earlier_document_and_no_other_file(tmp_path, capsys):
    found, gone = tmp_path / "found.json", str(tmp_path / "none" / "at" / "all")
    for content, replaced in (('{"status": "safeguarded"}', True), ("a: b", False), (None, True)):
        if content:
            found.write_text(content)
        else:
            found.unlink()
        assert main(["inspect", gone, f"--json={found}"]) == 2
        assert not capsys.readouterr().out
        if replaced:  # else it would pass for this command's
            assert json.loads(found.read_text())["exit_code"] == 2
        else:
            assert found.read_text() == content


def test_an_error_replaces_no_json_that_the_command_reads(tmp_path, capsys):
    data = tmp_path / "prompts.json"
    data.write_text('[{"prompt": "a"}]')
    words = ["evaluate", "--model_name_or_path", "none", "--harmful_data", str(data)]
    assert main([*words, "--output_dir", str(tmp_path / "out"), f"--json={data}"]) == 2
    assert data.read_text() == '[{"prompt": "a"}]'
    assert "is read by the same command" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said_before_the_work(vector_dir, capsys):
    assert main(["inspect", str(vector_dir), "--json=/dev/null/found.json"]) == 2
    printed = capsys.readouterr()
    assert "/dev/null" in printed.err and not printed.out


def test_a_file_takes_the_document_and_the_table_stays(words, tmp_path, capsys):
    """As `similarity` and `estimate` have always done it."""
    found = tmp_path / "found.json"
    assert main([*words("similarity"), "--json", str(found)]) == 0
    assert "overall" in capsys.readouterr().out
    assert set(json.loads(found.read_text())) == {"vectors", "cosines"}


@pytest.mark.parametrize("keep", [True, False])
def test_a_rejected_model_s_document_is_its_report(keep, words, tmp_path, capsys):
    gate = ["--safegene.gate.min_refusal_rate=1", f"--safegene.gate.write_rejected={keep}"]
    assert main([*words("apply"), *gate, "--json"]) == 4
    printed = capsys.readouterr()
    place = "out/safegene_report.json" if keep else "out.failed.json"
    found = json.loads(printed.out)
    assert found == json.loads((tmp_path / place).read_text())
    assert found["decision"]["outcome"] == "rejected"
    assert keep or "limits are not kept" in printed.err


def test_a_dry_run_s_document_is_its_report(words, capsys):
    assert main([*words("apply"), "--safegene.dry_run=true", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "prepared"
    with pytest.raises(SystemExit) as ended:
        main([*words("sft"), "--safegene.dry_run=true", "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["status"] == "prepared"


def test_a_recipe_may_set_them(words, tmp_path, capsys):
    recipe, found = tmp_path / "recipe.yaml", tmp_path / "found.json"
    evaluation = [*words("evaluate"), "--config", str(recipe)]
    recipe.write_text("json: true\n")
    assert main(evaluation) == 0
    result = json.loads(capsys.readouterr().out)
    recipe.write_text(f"json: {found}\nquiet: true\n")
    assert main(evaluation) == 0
    assert not capsys.readouterr().out and json.loads(found.read_text()) == result
    found.unlink()
    # the words come first
    assert main([*evaluation, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result and not found.exists()
    recipe.write_text("json: 5\n")
    assert main(evaluation) == 2
    assert (
        "`json` is 5: it must be true, false or a file that ends in .json."
        in capsys.readouterr().err
    )


def test_an_estimate_does_not_write_where_its_command_will(tmp_path):
    for prog, set_to in (("safegene estimate apply", False), ("safegene estimate", True)):
        output, recipe = Output("estimate"), {"json": True, "dtype": "auto"}
        with output.opened():
            set_by_recipe(recipe, prog)
        assert recipe == {"dtype": "auto"} and output.json is set_to


@pytest.fixture
def launcher(monkeypatch):
    """In the place of `accelerate launch`: its first process runs here."""

    def run(settings):
        asked.append(settings.training_script_args)
        codes.append(main(settings.training_script_args))

    asked, codes = [], []
    monkeypatch.setattr(launching, "launch_command", run)
    return asked


def test_the_first_process_of_a_launch_has_the_document(launcher, words, tmp_path, capsys):
    launch = ["--accelerate_config", "zero2", "--num_processes", "1"]
    assert main([*words("evaluate"), *launch, "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out) == written("evaluate", tmp_path)
    (asked,) = launcher
    assert asked[-2] == "--quiet" and asked[-1].startswith("--json=")
    assert main(["evaluate", "--model_name_or_path", "/no/model", *launch, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2
    assert main([*words("evaluate"), *launch]) == 0
    assert "Judge refusal_phrases" in capsys.readouterr().out


def test_a_launch_that_was_killed_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(launching, "_launched", lambda settings: 9)
    launch = ["--accelerate_config", "zero2", "--num_processes", "1"]
    assert main(["evaluate", "--model_name_or_path", "x", *launch, "--json"]) == 9
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "error": "It ended with exit code 9: standard error says why.",
        "exit_code": 9,
    }
