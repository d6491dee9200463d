import json
import shutil

import pytest
from tokenizer_writer import write_tokenizer

from diffsynth.prompters import clean_prompt
from diffsynth.prompters.tokenizer import cut, find_tokenizer, load_tokenizer

TEXTS = [
    "A red car drives along a wet road.",
    "two  blanks,   tabs\tand\nlines ",
    " A tiger: 4k, slow motion (cartoon)!",
    "unknown signs \u732b\U0001f415 \u00e9 in between\u732b",
    "stop </s> here <pad><unk> and <s>there</s>",
    "Caseless ANSWERS_with 0123456789 &%$",
    "",
    "a",
    "light on the water " * 40,
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write_tokenizer(folder)
    return folder


def only(file, folder, tmp_path):
    """A folder that holds one file of another."""
    shutil.copy(folder / file, tmp_path / file)
    return tmp_path


@pytest.mark.parametrize("file", ["tokenizer.json", "spiece.model"])
def test_ids_equal_the_official_ones(golden_dir, tmp_path, file):
    tokenizer = load_tokenizer(only(file, golden_dir / "tokenizer_tiny", tmp_path))
    assert tokenizer.file.name == file
    assert tokenizer.vocab_size == 120
    info = json.loads((golden_dir / "tokenizer_tiny.json").read_text())
    assert len(info["cases"]) == 14
    for case in info["cases"]:
        ids = tokenizer.encode(clean_prompt(case["text"]), max_length=info["seq_len"])
        assert len(ids) == case["length"]
        assert ids + [0] * (info["seq_len"] - len(ids)) == case["ids"]


@pytest.mark.parametrize("file", ["tokenizer.json", "spiece.model"])
def test_special_tokens_in_a_prompt_are_ordinary_text(written, tmp_path, file):
    tokenizer = load_tokenizer(only(file, written, tmp_path))
    for text in ("dog </s> cat", "</s>", "a</s>", "dog<pad></s>", "<s> dog <pad>"):
        ids = tokenizer.encode(text)
        assert ids.count(1) == 1
        assert ids[-1] == 1
        assert not {0, 2} & set(ids)
        assert len(ids) > 4


def test_both_files_give_the_same_ids(written, tmp_path):
    from_json, from_pieces = load_tokenizer(written), load_tokenizer(only("spiece.model", written, tmp_path))
    assert (from_json.file.name, from_pieces.file.name) == ("tokenizer.json", "spiece.model")
    assert from_json.vocab_size == from_pieces.vocab_size
    assert from_json(TEXTS, max_length=None) == from_pieces(TEXTS, max_length=None)


def test_a_batch_keeps_true_lengths_and_cuts_before_the_end_token(written):
    tokenizer = load_tokenizer(written)
    whole = tokenizer.encode(TEXTS[-1], max_length=None)
    assert len(whole) > 100
    short, cut_ids = tokenizer(["", TEXTS[-1]], max_length=20)
    assert short == [1]
    assert cut_ids == [*whole[:19], 1]
    assert tokenizer.encode(TEXTS[-1], max_length=len(whole)) == whole


def test_a_length_without_room_for_the_end_token_is_refused():
    with pytest.raises(ValueError, match="max_length must be at least 1, the end token; got 0"):
        cut([5, 1], 0)


def test_a_folder_without_a_tokenizer_is_named_with_the_remedy(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError) as caught:
            load_tokenizer(folder)
        for words in (str(folder), "tokenizer.json", "spiece.model", "fastvmt download 1.3b"):
            assert words in str(caught.value)


def test_every_cut_of_a_file_is_refused(written, tmp_path):
    for file in ("tokenizer.json", "spiece.model"):
        content = (written / file).read_bytes()
        for length in [*range(0, len(content), 97), len(content) - 1]:
            (tmp_path / file).write_bytes(content[:length])
            with pytest.raises(ValueError, match=f"{file} is damaged or not a UMT5 tokenizer"):
                load_tokenizer(tmp_path)
        (tmp_path / file).unlink()


def test_a_piece_model_cut_between_two_pieces_is_refused(written, tmp_path):
    content = (written / "spiece.model").read_bytes()
    cuts = []
    position = 0
    while content[position] == 0x0A:  # a piece: tag, length, content
        position += 2 + content[position + 1]
        cuts.append(position)
    assert len(cuts) == 160
    for position in cuts:
        (tmp_path / "spiece.model").write_bytes(content[:position])
        with pytest.raises(ValueError, match="the file is cut short"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "spiece.model"])
def test_a_file_of_another_kind_is_refused(tmp_path, file):
    for content in (b"version https://git-lfs.github.com/spec/v1", b"[]", b"{}", b"\xff\xfe\x00" * 50):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ValueError, match=f"{file} is damaged or not a UMT5 tokenizer"):
            load_tokenizer(tmp_path)


def test_a_tokenizer_with_another_end_id_is_refused(written, tmp_path):
    content = json.loads((written / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab[0], vocab[1] = vocab[1], vocab[0]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="id 1 is '<pad>', not '</s>'"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    model = (written / "spiece.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(model.replace(b"</s>", b"</q>"))
    with pytest.raises(ValueError, match=r"id of '</s>' is -?\d+, not 1"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("place", ["google/umt5-xxl", "tokenizer", "../tokenizer", "."])
def test_the_tokenizer_of_a_checkpoint_is_found(written, tmp_path, place):
    weights = tmp_path / "text_encoder"
    weights.mkdir()
    shutil.copytree(written, weights / place, dirs_exist_ok=True)
    assert find_tokenizer(weights).resolve() == (weights / place).resolve()


def test_a_checkpoint_without_a_tokenizer_is_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"google/umt5-xxl.*fastvmt download 1\.3b") as caught:
        find_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_the_written_tokenizer_is_the_same_every_time(written, tmp_path):
    assert write_tokenizer(tmp_path / "again") == 160
    names = {"spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {file.name for file in written.iterdir()} == names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (written / name).read_bytes()


def test_the_written_tokenizer_has_the_ids_of_umt5(written):
    vocab = json.loads((written / "tokenizer.json").read_text())["model"]["vocab"]
    assert [piece for piece, _ in vocab[:4]] == ["<pad>", "</s>", "<s>", "<unk>"]
    assert load_tokenizer(written).encode("\u732b")[-2:] == [3, 1]


def test_the_written_tokenizer_says_how_many_ids_it_has(tmp_path):
    # As many as its texts give, if more are asked for: 175, or 185 with tokenizers before 0.23.
    for asked, there in ((46, {46}), (100, {100}), (10_000, {175, 185})):
        assert write_tokenizer(tmp_path, asked) == load_tokenizer(tmp_path).vocab_size
        assert load_tokenizer(tmp_path).vocab_size in there
    with pytest.raises(ValueError, match="vocab_size must be at least 46; got 45"):
        write_tokenizer(tmp_path, 45)
