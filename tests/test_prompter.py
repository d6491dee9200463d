import gc
import json
import logging
import weakref
from pathlib import Path

import pytest
import torch
from tokenizer_writer import write_tokenizer

from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.prompters import WanPrompter, clean_prompt
from diffsynth.prompters.tokenizer import WanTokenizer, load_tokenizer

SIZES = {"dim": 16, "dim_attn": 16, "dim_ffn": 32, "num_heads": 2, "num_layers": 2}
DOG, CAT = "A dog runs on the grass.", "A black cat jumps"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def prompter(folder):
    return WanPrompter(load_tokenizer(folder), text_len=64)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return WanTextEncoder(vocab=160, **SIZES)


@pytest.fixture
def calls(encoder):
    """Shapes of the ids that the encoder was given, in order."""
    shapes = []
    encoder.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes


def test_cleaning_equals_the_official_one(golden_dir):
    cases = json.loads((golden_dir / "tokenizer_tiny.json").read_text())["cases"]
    for case in cases:
        assert clean_prompt(case["text"]) == case["clean"]
    assert sum(case["text"] != case["clean"] for case in cases) > 5


def test_cleaning_refuses_what_is_not_text():
    with pytest.raises(TypeError, match="prompt must be a str; got None"):
        clean_prompt(None)


def test_rows_equal_the_official_context(golden):
    tensors, info = golden("umt5_tiny")
    names = ["vocab", "dim", "dim_attn", "dim_ffn", "num_heads", "num_layers", "num_buckets"]
    encoder = WanTextEncoder(**{name: info["config"][name] for name in names})
    encoder.load_state_dict({key[8:]: value for key, value in tensors.items() if key.startswith("weights.")})
    ids = {
        f"prompt {i}": tensors["ids"][i][tensors["mask"][i].bool()].tolist()[:-1]
        for i in range(len(tensors["ids"]))
    }
    tokenizer = WanTokenizer(pieces=ids.__getitem__, vocab_size=256, file=Path("golden"))
    rows = WanPrompter(tokenizer, text_len=160).encode_prompt(list(ids), encoder)
    torch.testing.assert_close(rows, tensors["context"], **info["tolerance"]["float32"])


def test_each_prompt_keeps_its_own_rows_and_is_zero_after_them(prompter, encoder):
    prompts = [DOG, "", "A cat", CAT]
    rows = prompter.encode_prompt(prompts, encoder)
    assert rows.shape == (4, 64, 16)
    assert not rows.requires_grad
    for prompt, row in zip(prompts, rows, strict=True):
        length = len(prompter.tokenizer.encode(prompt))
        assert row[:length].abs().sum(1).min() > 0
        assert row[length:].abs().max() == 0
        assert torch.equal(row, WanPrompter(prompter.tokenizer, 64).encode_prompt(prompt, encoder)[0])


def test_an_empty_prompt_is_one_end_token(prompter, encoder, calls):
    rows = prompter.encode_prompt(" \n ", encoder)
    assert calls == [(1, 1)]
    assert torch.equal(rows[0, :1], encoder(torch.tensor([[1]]))[0])


def test_rows_are_in_the_dtype_of_the_encoder(prompter, encoder):
    wide = prompter.encode_prompt(DOG, encoder)
    half = prompter.encode_prompt(DOG, encoder.to(torch.bfloat16))
    assert (wide.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(half.float(), wide, atol=0.1, rtol=0)
    assert not torch.equal(half, wide.to(torch.bfloat16))  # computed anew, not the remembered rows rounded


def test_a_prompt_is_encoded_once_at_its_own_length(prompter, encoder, calls):
    length = len(prompter.tokenizer.encode(DOG))
    assert not prompter.cached(DOG, encoder)
    first = prompter.encode_prompt([DOG, f"  {DOG}"], encoder)
    assert prompter.cached([DOG, DOG], encoder)
    assert not prompter.cached([DOG, CAT], encoder)
    assert torch.equal(prompter.encode_prompt(DOG, encoder), first[:1])
    assert torch.equal(first[0], first[1])
    assert calls == [(1, length)]


def test_remembered_rows_are_not_changed_through_what_was_handed_out(prompter, encoder):
    first = prompter.encode_prompt(DOG, encoder)
    kept = first.clone()
    first.zero_()
    assert torch.equal(prompter.encode_prompt(DOG, encoder), kept)


def test_other_weights_give_other_results(prompter, encoder):
    before = prompter.encode_prompt(DOG, encoder)
    encoder.load_state_dict({key: value * 1.5 for key, value in encoder.state_dict().items()})
    assert not prompter.cached(DOG, encoder)
    after = prompter.encode_prompt(DOG, encoder)
    assert (after - before).abs().max() > 0.1
    encoder.load_state_dict({key: value / 1.5 for key, value in encoder.state_dict().items()}, assign=True)
    torch.testing.assert_close(prompter.encode_prompt(DOG, encoder), before)


def test_another_encoder_does_not_get_the_results_of_the_first(prompter, encoder):
    torch.manual_seed(1)
    other = WanTextEncoder(vocab=160, **SIZES)
    assert not torch.equal(prompter.encode_prompt(DOG, encoder), prompter.encode_prompt(DOG, other))


def test_results_go_with_clear_and_with_their_encoder(prompter, encoder):
    prompter.encode_prompt([DOG, CAT], encoder)
    prompter.clear()
    assert not prompter.cached(DOG, encoder)
    short_lived = WanTextEncoder(vocab=160, **SIZES)
    prompter.encode_prompt(DOG, short_lived)
    result = weakref.ref(next(iter(prompter._results[short_lived].values())))
    assert result() is not None
    del short_lived
    gc.collect()
    assert result() is None


def test_the_prompts_used_longest_ago_are_forgotten_first(folder, encoder):
    prompter = WanPrompter(load_tokenizer(folder), text_len=64, cache_size=2)
    prompter.encode_prompt([DOG, CAT], encoder)
    prompter.encode_prompt(DOG, encoder)
    prompter.encode_prompt("A bear", encoder)
    assert prompter.cached([DOG, "A bear"], encoder)
    assert not prompter.cached(CAT, encoder)


def test_more_prompts_than_are_remembered_are_all_encoded(folder, encoder):
    prompter = WanPrompter(load_tokenizer(folder), text_len=64, cache_size=1)
    together = prompter.encode_prompt([DOG, CAT, "", DOG], encoder)
    for prompt, rows in zip([DOG, CAT, "", DOG], together, strict=True):
        assert torch.equal(prompter.encode_prompt(prompt, encoder)[0], rows)


def test_a_long_prompt_is_cut_with_a_warning(prompter, encoder, calls, caplog):
    long = " ".join([DOG] * 20)
    num_tokens = len(prompter.tokenizer.encode(long, max_length=None))
    with caplog.at_level(logging.WARNING):
        rows = prompter.encode_prompt([DOG, long], encoder)
    assert calls[-1] == (1, 64)
    assert [record.getMessage() for record in caplog.records] == [
        f"prompt 1 has {num_tokens} tokens; the last {num_tokens - 64} are cut, 64 are used"
    ]
    ids = prompter.tokenizer.encode(long, max_length=64)
    torch.testing.assert_close(rows[1], encoder(torch.tensor([ids]))[0])
    assert prompter.cached(long, encoder)


@pytest.mark.parametrize("prompt", [None, 7, ["a", 7], ["a", None], b"a", {"a": 1}])
def test_a_prompt_that_is_not_text_is_refused(prompter, encoder, prompt):
    with pytest.raises(TypeError, match="prompt must be a str or a list of str; got "):
        prompter.encode_prompt(prompt, encoder)
    with pytest.raises(TypeError, match="prompt must be"):
        prompter.cached(prompt, encoder)


def test_an_empty_list_is_refused(prompter, encoder):
    with pytest.raises(ValueError, match="prompt must hold at least one text; got an empty list"):
        prompter.encode_prompt([], encoder)


def test_a_tokenizer_of_another_model_is_refused(prompter):
    with pytest.raises(
        ValueError, match=r"tokenizer\.json does not belong to this text encoder: it gives token"
    ):
        prompter.encode_prompt(DOG, WanTextEncoder(vocab=8, **SIZES))


def test_values_that_are_not_finite_are_refused_and_not_remembered(prompter, encoder):
    with torch.no_grad():
        encoder.encoder.final_layer_norm.weight[3] = float("inf")
    with pytest.raises(RuntimeError, match=r"not finite in torch\.float32; load it in bfloat16 or float32"):
        prompter.encode_prompt(DOG, encoder)
    assert not prompter.cached(DOG, encoder)


@pytest.mark.parametrize("name", ["text_len", "cache_size"])
def test_sizes_below_one_are_refused(prompter, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        WanPrompter(prompter.tokenizer, **{name: 0})


@pytest.mark.gpu
def test_a_gpu_gives_the_rows_of_the_cpu(prompter, encoder):
    expected = prompter.encode_prompt(DOG, encoder)
    prompter.clear()
    rows = prompter.encode_prompt(DOG, encoder.to("cuda"))
    assert rows.device.type == "cuda"
    torch.testing.assert_close(rows.cpu(), expected, atol=1e-4, rtol=1e-4)
    assert all(value.device.type == "cpu" for value in prompter._results[encoder].values())
