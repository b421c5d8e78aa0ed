"""DeepSpeed's shards are pickle files: they are read only where somebody says so."""

import pickle
import shutil
from contextlib import suppress

import pytest

from safegene_trl.checkpoints.loading import load_model
from safegene_trl.checkpoints.skeleton import load_skeleton
from safegene_trl.commands.main import main
from safegene_trl.errors import SafeGeneError, UnsupportedModelError

from ..conftest import ALONE, make_model


@pytest.fixture
def shards(tmp_path, model_dir):
    """A folder with nothing but DeepSpeed's shards, which are pickle files that write a file when
    they are read.
    """
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "latest").write_text("global_step3")
    (folder / "global_step3").mkdir()

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (folder / "global_step3" / name).write_bytes(pickle.dumps(Payload()))
    return folder


def test_pickled_shards_need_a_switch(shards, tmp_path):
    with pytest.raises(UnsupportedModelError, match="allow_pickled_shards"):
        load_model(str(shards))
    with pytest.raises(SafeGeneError):
        load_skeleton(str(shards), files={})
    assert not (tmp_path / "ran").exists()
    pytest.importorskip("deepspeed")
    with suppress(Exception):  # no real shards: the switch lets them be read, and that is all
        load_model(str(shards), allow_pickle=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["apply", "evaluate"])
def test_commands_refuse_pickled_shards(command, shards, vector_dir, task_file, tmp_path, capsys):
    words = [command, "--model_name_or_path", str(shards)]
    if command == "apply":
        words += [f"--safegene.vector={vector_dir}", f"--safegene.data.task_data={task_file}"]
        words += [f"--safegene.output.output_dir={tmp_path / 'out'}"]
    else:
        words += ["--harmful_data", str(task_file), "--output_dir", str(tmp_path / "out")]
    assert main(words) == 2
    assert "allow_pickled_shards" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("output_format", ["adapter", "both"])
def test_shards_are_no_base_of_an_adapter(
    output_format, shards, vector_dir, task_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        "safegene_trl.step.apply_with_search.load_placed", lambda *args: (make_model(), ALONE)
    )
    words = [
        "--allow_pickled_shards",
        "--model_name_or_path",
        str(shards),
        f"--safegene.vector={vector_dir}",
    ]
    words += [
        f"--safegene.data.task_data={task_file}",
        f"--safegene.output.output_dir={tmp_path / 'out'}",
    ]
    assert main(["apply", *words, f"--safegene.output.output_format={output_format}"]) == 2
    assert "only DeepSpeed's own shards, which PEFT cannot load" in capsys.readouterr().err
