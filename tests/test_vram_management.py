import pytest
import torch

from diffsynth import WanVideoPipeline
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.planning.memory import activation_bytes
from diffsynth.vram_management import available_memory, choose_device, choose_dtype

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


@pytest.fixture
def one_card(monkeypatch):
    """A machine with one CUDA device of a compute capability, as far as PyTorch tells."""

    def pretend(capability=(8, 9)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])

    return pretend


def test_a_device_that_is_not_there_is_refused_with_how_many_there_are(one_card):
    one_card()
    with pytest.raises(
        ValueError, match=r"'cuda:7' does not exist: torch sees 1 CUDA device\(s\), from cuda:0"
    ):
        choose_device("cuda:7")


def test_a_card_that_the_wheel_has_no_kernels_for_is_refused_with_what_it_has(one_card, monkeypatch):
    one_card((5, 0))

    def no_kernel(*_, **__):
        raise RuntimeError(
            "CUDA error: no kernel image is available for execution on the device\nCompile with"
        )

    monkeypatch.setattr(torch, "ones", no_kernel)
    with pytest.raises(
        ValueError, match=r"'cuda' does not compute with this PyTorch .*for sm_75, sm_90.*no kernel image"
    ):
        choose_device("auto")


def test_cards_below_eight_compute_in_float16_and_refuse_bfloat16(one_card):
    device = torch.device("cuda")
    one_card((7, 5))
    assert choose_dtype(device) == torch.float16
    assert choose_dtype(device, torch.float32) == torch.float32
    with pytest.raises(ValueError, match=r"bfloat16 needs compute capability 8.0; use float16"):
        choose_dtype(device, torch.bfloat16)
    one_card((8, 0))
    assert choose_dtype(device) == torch.bfloat16
    assert choose_dtype(torch.device("cpu")) == torch.float32


def test_in_float16_the_text_encoder_stays_in_float32(tiny_checkpoint):
    pipe = WanVideoPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float16, device="cpu")
    assert pipe.torch_dtype == torch.float16
    assert pipe.text_encoder.dtype == torch.float32
