"""The published Wan2.1 text-to-video checkpoints: where they are and what inference needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_T5_AND_VAE = {
    "models_t5_umt5-xxl-enc-bf16.pth": 11_361_920_418,
    "Wan2.1_VAE.pth": 507_609_880,
    "google/umt5-xxl/spiece.model": 4_548_313,
    "google/umt5-xxl/tokenizer.json": 16_837_417,
    "google/umt5-xxl/tokenizer_config.json": 61_728,
    "google/umt5-xxl/special_tokens_map.json": 6_623,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedCheckpoint:
    """One published checkpoint folder.

    name: what people call it, "Wan2.1-T2V-1.3B".
    model_id: its id on ModelScope and on Hugging Face.
    folder: its usual name below models/.
    files: path in the folder -> size in bytes, None where the file must speak for itself.
    num_parameters: of the DiT, which is published in float32.
    dit_kwargs: arguments of WanModel.
    """

    name: str
    model_id: str
    folder: str
    files: Mapping[str, int | None]
    num_parameters: int
    dit_kwargs: Mapping[str, object]

    def expected_bytes(self, path: str) -> int:
        """Return the size of one of `files`: the published one, or an even share of the DiT for a shard."""
        size = self.files[path]
        if size is not None:
            return size
        if not path.endswith(".safetensors"):
            return 0
        num_shards = sum(name.endswith(".safetensors") for name in self.files)
        return 4 * self.num_parameters // num_shards


def _dit_kwargs(dim: int, ffn_dim: int, num_heads: int, num_layers: int) -> Mapping[str, object]:
    return MappingProxyType(
        {
            "dim": dim,
            "in_dim": 16,
            "ffn_dim": ffn_dim,
            "out_dim": 16,
            "text_dim": 4096,
            "freq_dim": 256,
            "eps": 1e-6,
            "patch_size": (1, 2, 2),
            "num_heads": num_heads,
            "num_layers": num_layers,
            "has_image_input": False,
            "text_len": 512,
        }
    )


def _files(dit: Mapping[str, int | None]) -> Mapping[str, int | None]:
    return MappingProxyType({"config.json": None, **dit, **_T5_AND_VAE})


PUBLISHED: Mapping[str, PublishedCheckpoint] = MappingProxyType(
    {
        "1.3b": PublishedCheckpoint(
            name="Wan2.1-T2V-1.3B",
            model_id="Wan-AI/Wan2.1-T2V-1.3B",
            folder="Wan2.1-T2V-1.3B",
            files=_files({"diffusion_pytorch_model.safetensors": 5_676_070_424}),
            num_parameters=1_418_996_800,
            dit_kwargs=_dit_kwargs(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
        ),
        "14b": PublishedCheckpoint(
            name="Wan2.1-T2V-14B",
            model_id="Wan-AI/Wan2.1-T2V-14B",
            folder="Wan2.1-T2V-14B",
            files=_files(
                {
                    **{f"diffusion_pytorch_model-{i:05d}-of-00006.safetensors": None for i in range(1, 7)},
                    "diffusion_pytorch_model.safetensors.index.json": None,
                }
            ),
            num_parameters=14_288_491_584,
            dit_kwargs=_dit_kwargs(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
        ),
    }
)
