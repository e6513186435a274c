"""Steps of tiny models of many classes in one of two processes, which tests/method/test_models.py runs with DDP.

The first process has images, the second text alone, in either mode. Arguments: the model types.
"""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dualspeed import DualSpeedConfig, DualSpeedModel, Mode
from dualspeed.cluster.launch import one_of_several
from dualspeed.training.trainable import set_trainable
from tests.support.tiny_images import batch
from tests.support.tiny_models import tiny_model


def check(model_type: str) -> None:
    """Two steps, one in each mode, with images on the first rank only; both ranks end with the same gradients."""
    vlm = tiny_model(model_type)
    model = DualSpeedModel(vlm, DualSpeedConfig(pruning_ratio=0.9))
    set_trainable(model, "finetune")
    inputs = batch(vlm, [1, 2] if dist.get_rank() == 0 else [0, 0])
    assert ("pixel_values" in inputs) == (dist.get_rank() == 0)
    # Every parameter must be in the graph of every step: DDP isn't told to look for those that aren't.
    trained = DistributedDataParallel(model, find_unused_parameters=False)
    for mode in Mode:
        model.zero_grad()
        trained(mode=mode, **inputs).loss.backward()
        sums = torch.stack([p.grad.double().abs().sum() for p in model.parameters() if p.requires_grad])
        others = [torch.zeros_like(sums) for _ in range(dist.get_world_size())]
        dist.all_gather(others, sums)
        assert torch.equal(others[0], others[1]), f"{model_type}: gradients differ between ranks"


def main(model_types: list[str]) -> None:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    for model_type in model_types:
        try:
            check(model_type)
        except Exception as error:
            raise RuntimeError(f"rank {dist.get_rank()}: {model_type} failed") from error
        if dist.get_rank() == 0:
            print(model_type, flush=True)


if __name__ == "__main__":
    with one_of_several():
        main(sys.argv[1:])
