import pytest
import torch

from diffsynth.models.wan_video_dit import WanModel
from diffsynth.planning.memory import activation_bytes
from diffsynth.vram_management import available_memory

CPU = torch.device("cpu")


def make_dit(dtype, num_layers, ffn_dim=256):
    dit = WanModel(
        dim=64,
        in_dim=16,
        ffn_dim=ffn_dim,
        out_dim=16,
        text_dim=8,
        freq_dim=16,
        num_heads=4,
        num_layers=num_layers,
    )
    return dit.to(dtype).requires_grad_(False)


def kept_bytes(dit, num_blocks):
    """Bytes of all storages that autograd keeps for the gradient of the latents, but for weights."""
    kept, weights = {}, {parameter.untyped_storage().data_ptr() for parameter in dit.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.randn(1, 16, 2, 32, 32, requires_grad=True)
        _features = dit.features(x, torch.tensor([500.0]), torch.zeros(1, 4, 8), block=num_blocks)
    return sum(size for address, (size, _) in kept.items() if address not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ffn_dim", [64, 512])
def test_predicted_activations_are_those_that_autograd_keeps(dtype, ffn_dim):
    dit = make_dit(dtype, num_layers=4, ffn_dim=ffn_dim)
    measured = kept_bytes(dit, 3) - kept_bytes(dit, 1)
    assert activation_bytes(dit, num_tokens=512, num_blocks=2) == pytest.approx(measured, rel=0.05)


def test_available_memory_is_that_of_this_machine():
    assert 2**28 < available_memory(CPU) < 2**44
