import json
import subprocess
import sys

import pytest
import torch

from diffsynth.models.packed_linear import PackedLinear, pack_block_linears
from diffsynth.models.wan_video_text_encoder import (
    WanTextEncoder,
    text_encoder_config_from_shapes,
    transformers_to_official_key,
)

CONSTRUCTOR = ["vocab", "dim", "dim_attn", "dim_ffn", "num_heads", "num_layers", "num_buckets"]


@pytest.fixture(scope="module")
def tiny(golden):
    """(arguments, official weights, golden tensors, description)"""
    tensors, info = golden("umt5_tiny")
    weights = {
        key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")
    }
    return {name: info["config"][name] for name in CONSTRUCTOR}, weights, tensors, info


@pytest.fixture
def encoder(tiny):
    arguments, weights, *_ = tiny
    encoder = WanTextEncoder(**arguments)
    encoder.load_state_dict(weights)
    return encoder.requires_grad_(False)


@pytest.fixture(scope="module")
def xxl_shapes(golden_dir):
    keys = json.loads((golden_dir / "wan_vae_t5_keys.json").read_text())["umt5_xxl_encoder"]["keys"]
    return {key: tuple(shape) for key, shape in keys.items()}


def test_output_equals_the_official_one_at_every_position(encoder, tiny):
    _, _, g, info = tiny
    output = encoder(g["ids"], g["mask"])
    torch.testing.assert_close(output, g["output"], **info["tolerance"]["float32"])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.075), (torch.float16, 0.02)])
def test_half_types_stay_as_near_as_the_official_code(encoder, tiny, dtype, bound):
    _, _, g, _ = tiny
    output = encoder.to(dtype)(g["ids"], g["mask"])
    assert output.dtype == encoder.dtype == dtype
    assert (output.float() - g["output"]).abs().max() < bound


def test_distances_fall_into_the_official_buckets(encoder, tiny):
    _, _, g, _ = tiny
    attention = encoder.encoder.block[1].layer[0].SelfAttention
    attention.relative_attention_bias.weight.copy_(torch.arange(32.0)[:, None].expand(32, 4))
    bias = attention.compute_bias(201, 201)[0, 0]
    positions = g["relative_positions"]
    assert positions.min() == -200
    assert positions.max() == 200
    query = (-positions).clamp_min(0)
    assert torch.equal(bias[query, query + positions].long(), g["relative_buckets"])


def test_padding_changes_nothing_before_it(encoder, tiny):
    _, _, g, _ = tiny
    for ids, mask, expected in zip(g["ids"], g["mask"], g["output"], strict=True):
        length = int(mask.sum())
        output = encoder(ids[None, :length])
        torch.testing.assert_close(output[0], expected[:length], atol=5e-6, rtol=0)


def test_it_has_no_dropout_and_starts_in_eval_mode(encoder, tiny):
    _, _, g, _ = tiny
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(encoder.train()(g["ids"], g["mask"]), encoder.eval()(g["ids"], g["mask"]))


def test_the_xxl_model_has_exactly_the_official_names_and_shapes(xxl_shapes):
    with torch.device("meta"):
        encoder = WanTextEncoder()
    assert {key: tuple(value.shape) for key, value in encoder.state_dict().items()} == xxl_shapes
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 5_680_910_336


def test_weights_come_out_under_the_names_they_went_in(encoder, tiny):
    _, weights, *_ = tiny
    state = encoder.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], weights[key]) for key in weights)
    assert encoder.state_dict(prefix="text.").keys() == {f"text.{key}" for key in weights}
    assert all(isinstance(value, torch.nn.Parameter) for value in encoder.state_dict(keep_vars=True).values())


def test_a_meta_model_takes_the_given_tensors_without_a_copy(tiny):
    arguments, weights, g, info = tiny
    with torch.device("meta"):
        encoder = WanTextEncoder(**arguments)
    encoder.load_state_dict(weights, assign=True)
    tensors = [*encoder.parameters(), *encoder.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert {tensor.data_ptr() for tensor in tensors} == {value.data_ptr() for value in weights.values()}
    assert len(tensors) == len(weights)
    torch.testing.assert_close(encoder(g["ids"], g["mask"]), g["output"], **info["tolerance"]["float32"])
    encoder.to(torch.bfloat16)
    assert {value.dtype for value in encoder.state_dict().values()} == {torch.bfloat16}


def test_wrong_weights_are_refused_by_their_official_names_and_change_nothing(encoder, tiny):
    _, weights, *_ = tiny
    wrong = {key: torch.zeros_like(value) for key, value in weights.items() if key != "norm.weight"}
    wrong["blocks.1.attn.q.weight"] = torch.zeros(3, 3)
    wrong["surplus"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as caught:
        encoder.load_state_dict(wrong)
    assert "blocks.1.attn.q.weight has shape (3, 3) instead of (32, 32)" in str(caught.value)
    assert "missing: norm.weight" in str(caught.value)
    assert "unexpected: surplus" in str(caught.value)
    assert all(torch.equal(value, weights[key]) for key, value in encoder.state_dict().items())


def test_loading_that_is_not_strict_reports_official_names(encoder, tiny):
    _, weights, *_ = tiny
    result = encoder.load_state_dict({"token_embedding.weight": torch.ones(256, 32), "x": 0}, strict=False)
    assert set(result.missing_keys) == weights.keys() - {"token_embedding.weight"}
    assert result.unexpected_keys == ["x"]
    assert torch.equal(encoder.state_dict()["token_embedding.weight"], torch.ones(256, 32))


def test_arguments_are_read_off_the_shapes(tiny, xxl_shapes):
    arguments, weights, *_ = tiny
    assert text_encoder_config_from_shapes({key: value.shape for key, value in weights.items()}) == arguments
    assert text_encoder_config_from_shapes(xxl_shapes) == {
        "vocab": 256384,
        "dim": 4096,
        "dim_attn": 4096,
        "dim_ffn": 10240,
        "num_heads": 64,
        "num_layers": 24,
        "num_buckets": 32,
    }


def test_shapes_of_something_else_are_refused(xxl_shapes):
    with pytest.raises(ValueError, match=r"not a UMT5 encoder: no matrix token_embedding\.weight, blocks\.0"):
        text_encoder_config_from_shapes({"blocks.0.self_attn.q.weight": (8, 8)})
    with pytest.raises(ValueError, match=r"no matrix blocks\.0\.ffn\.fc1\.weight$"):
        text_encoder_config_from_shapes(xxl_shapes | {"blocks.0.ffn.fc1.weight": (5,)})


def test_transformers_names_map_to_official_ones(tiny):
    *_, info = tiny
    for official, theirs in info["official_to_transformers"].items():
        assert transformers_to_official_key(theirs) == official
    assert transformers_to_official_key("encoder.embed_tokens.weight") == "token_embedding.weight"
    block = "encoder.block.23.layer"
    assert transformers_to_official_key(f"{block}.1.DenseReluDense.wo.weight") == "blocks.23.ffn.fc2.weight"
    for foreign in ("lm_head.weight", "decoder.block.0.layer.0.layer_norm.weight", f"{block}.2.x.weight", ""):
        assert transformers_to_official_key(foreign) is None


def test_a_transformers_checkpoint_gives_what_transformers_gives(tiny):
    from transformers import UMT5Config, UMT5EncoderModel

    arguments, _, g, info = tiny
    torch.manual_seed(3)
    theirs = UMT5EncoderModel(UMT5Config(**info["transformers_config"])).eval()
    ours = WanTextEncoder(**arguments)
    ours.load_state_dict({transformers_to_official_key(key): v for key, v in theirs.state_dict().items()})
    expected = theirs(input_ids=g["ids"], attention_mask=g["mask"]).last_hidden_state
    torch.testing.assert_close(ours(g["ids"], g["mask"]), expected, atol=1e-5, rtol=0)


def test_linear_layers_packed_in_float8_are_used_as_such(encoder, tiny):
    _, _, g, _ = tiny
    pack_block_linears(encoder)
    assert sum(isinstance(module, PackedLinear) for module in encoder.modules()) == 14
    difference = (encoder(g["ids"], g["mask"]) - g["output"]).square().mean().sqrt()
    assert 1e-4 < difference < 0.1  # of outputs of size 1
    assert "blocks.0.ffn.fc2.scale" in encoder.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "dim_attn must be a multiple of num_heads=5; got 32"),
        ({"num_layers": 0}, "num_layers must be at least 1; got 0"),
        ({"num_buckets": 6}, "num_buckets must be a positive multiple of 4; got 6"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tiny, change, message):
    arguments, *_ = tiny
    with pytest.raises(ValueError, match=message):
        WanTextEncoder(**arguments | change)


def test_ids_and_mask_of_other_shapes_are_refused(encoder):
    with pytest.raises(ValueError, match=r"ids must be \[B, L\] with L at least 1; got shape \(4,\)"):
        encoder(torch.ones(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got shape \(1, 0\)"):
        encoder(torch.ones(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"mask must have the shape of ids, \(1, 4\); got \(1, 3\)"):
        encoder(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 3))


def test_importing_the_encoder_and_the_prompter_loads_no_heavy_library():
    code = (
        "import sys, diffsynth.models.wan_video_text_encoder, diffsynth.prompters;"
        "heavy = {'transformers', 'tokenizers', 'sentencepiece', 'ftfy'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
