"""What one process can show of the seam; `tests/distributed` shows the rest."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.distributed import DistributedConfig

from safegene_trl.distributed.layouts import Sharding, load_distributed, loads_sharded, sharding_of
from safegene_trl.distributed.processes import check_parallelism
from safegene_trl.distributed.shapes import class_name, full_shape
from safegene_trl.errors import ConfigError, UnsupportedModelError

from ..conftest import ALONE, make_model, with_lora


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 8, 9])
def test_work_is_shared_out_evenly(world_size, count):
    shares = []
    for rank in range(world_size):
        sharding = Sharding(torch.device("cpu"))
        sharding.rank, sharding.world_size = rank, world_size
        shares.append(sharding.share(count))
    assert len({len(share) for share in shares}) == 1
    assert sorted(index for share in shares for index in share if index is not None) == list(
        range(count)
    )
    assert len(shares[0]) <= count / world_size + 1


def test_one_process_is_whole():
    model = with_lora(make_model())
    sharding = sharding_of(model)
    assert sharding.describe() == {"sharding": "whole", "processes": 1} and sharding.is_main
    weight = model.get_base_model().lm_head.weight
    with sharding.full([weight]) as (full,):
        assert full is weight
    assert (
        full_shape(weight) == (320, 32) and class_name(model.get_base_model()) == "LlamaForCausalLM"
    )
    assert torch.equal(sharding.sum(torch.arange(3)), torch.arange(3))
    sharding.check_same("samples", "any")


def test_own_error_comes_out_as_it_is():
    error = KeyError("x")
    with pytest.raises(KeyError) as caught, ALONE.naming_rank(), ALONE.raising_together():
        raise error
    assert caught.value is error and not hasattr(error, "__notes__")


def arguments(world_size=1, **sizes):
    return SimpleNamespace(
        world_size=world_size, parallelism_config=ParallelismConfig(**sizes) if sizes else None
    )


@pytest.mark.parametrize(
    ("key", "name"), [("tp_size", "tensor"), ("cp_size", "context"), ("sp_size", "sequence")]
)
def test_other_parallelism_is_refused_by_name(key, name):
    with pytest.raises(UnsupportedModelError, match=f"uses {name} parallelism"):
        check_parallelism(make_model(), arguments(dp_shard_size=2, **{key: 2}))


def test_tensor_parallel_model_is_refused():
    model = make_model()
    model._tp_size = 2
    with pytest.raises(UnsupportedModelError, match="uses tensor parallelism"):
        check_parallelism(model, arguments())


def test_first_fsdp_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="FSDP version 1"):
        check_parallelism(FullyShardedDataParallel.__new__(FullyShardedDataParallel), arguments())


def test_processes_that_the_trainer_does_not_see_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="started 4 processes and the trainer sees 1"):
        check_parallelism(make_model(), arguments())
    check_parallelism(make_model(), arguments(world_size=4))


def test_supported_launch_passes():
    check_parallelism(make_model(), arguments())
    check_parallelism(make_model(), arguments(dp_replicate_size=2, dp_shard_size=2))


def test_finished_checkpoint_is_not_loaded_under_fsdp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UnsupportedModelError, match="launch with `zero3`"):
        load_distributed(make_model, torch.float32, ALONE)


@pytest.mark.parametrize(
    ("stage", "sharded"), [(None, False), ("1", False), ("2", False), ("3", True)]
)
def test_a_launch_tells_whether_it_shards_what_is_loaded(stage, sharded, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    if stage is not None:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    assert loads_sharded() == sharded


def test_expert_parallelism_is_refused_by_name():
    model = make_model()
    named = inspect.signature(DistributedConfig).parameters  # transformers renamed it
    experts = {"ep_size": 2} if "ep_size" in named else {"enable_expert_parallel": True}
    model.config.distributed_config = DistributedConfig(fsdp_size=2, **experts)
    with pytest.raises(UnsupportedModelError, match="uses expert parallelism"):
        check_parallelism(model, arguments())
    model.config.distributed_config = DistributedConfig(fsdp_size=2)
    check_parallelism(model, arguments())
