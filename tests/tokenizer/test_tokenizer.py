from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.errors import UserError
from megatron.tokenizer import HFTokenizer, build_tokenizer
from megatron.tokenizer.training import train_tokenizer

TEXT = "The union is strong. Gr\u00fc\u00dfe, \u4f60\u597d!\n\n\tNew  spaces"


def train(folder: Path, special: list[str]) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("tokenizer"), ["<|endoftext|>"])


def config(kind: str, folder: Path | None) -> TokenizerConfig:
    vocab = {"HFTokenizer": "tokenizer.json", "GPT2BPETokenizer": "vocab.json"}.get(kind)
    if folder is None or vocab is None:
        return TokenizerConfig(tokenizer_type=kind)
    return TokenizerConfig(tokenizer_type=kind, vocab_file=f"{folder}/{vocab}", merge_file=f"{folder}/merges.txt")


@pytest.mark.parametrize("kind", ["HFTokenizer", "GPT2BPETokenizer", "CharLevelTokenizer"])
def test_text_survives_encoding(kind: str, files: Path) -> None:
    tokenizer = build_tokenizer(config(kind, files))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.name == kind
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == TEXT
    assert max(ids) < tokenizer.vocab_size and tokenizer.eod_id not in ids
    assert tokenizer.encode("") == []


def test_both_bpe_kinds_agree(files: Path) -> None:
    by_json, by_pair = (build_tokenizer(config(kind, files)) for kind in ("HFTokenizer", "GPT2BPETokenizer"))
    assert by_json.encode(TEXT) == by_pair.encode(TEXT)
    assert (by_json.vocab_size, by_json.eod_id) == (by_pair.vocab_size, by_pair.eod_id)


@pytest.mark.parametrize("kind", ["HFTokenizer", "GPT2BPETokenizer"])
def test_files_saved_by_an_editor_are_the_same_tokenizer(kind: str, files: Path, tmp_path: Path) -> None:
    for file in files.iterdir():
        text = file.read_text(encoding="utf-8").replace("\n", "\r\n")
        (tmp_path / file.name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    plain, edited = build_tokenizer(config(kind, files)), build_tokenizer(config(kind, tmp_path))
    assert edited.encode(TEXT) == plain.encode(TEXT)


def test_bytes_are_ids_in_a_vocabulary_of_512() -> None:
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="CharLevelTokenizer"))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (512, 0)
    assert tokenizer.encode("a\u00fc") == [97, 0xC3, 0xBC]
    assert tokenizer.decode([97, 300, 98]) == "a\ufffdb"


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("HFTokenizer", "vocab_file", None, "vocab_file: missing; HFTokenizer"),
        ("HFTokenizer", "vocab_file", "/nowhere/t.json", "vocab_file: no such file: /nowhere/t.json"),
        ("HFTokenizer", "vocab_file", "{files}/merges.txt", "vocab_file: .*merges.txt is not a valid tokenizer.json"),
        ("GPT2BPETokenizer", "vocab_file", None, "vocab_file: missing; GPT2BPETokenizer"),
        ("GPT2BPETokenizer", "merge_file", None, "merge_file: missing"),
        ("GPT2BPETokenizer", "merge_file", "/nowhere/m.txt", "merge_file: no such file: /nowhere/m.txt"),
        ("GPT2BPETokenizer", "vocab_file", "{files}/merges.txt", "vocab_file, merge_file: .*no valid GPT-2 pair"),
    ],
)
def test_bad_files_name_key_and_path(kind: str, key: str, value: str | None, message: str, files: Path) -> None:
    given = value and value.format(files=files)
    with pytest.raises(UserError, match=message):
        build_tokenizer(config(kind, files).model_copy(update={key: given}))


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json has no <\|endoftext\|> token"):
        build_tokenizer(config("HFTokenizer", train(tmp_path, [])))


def test_truncation_and_padding_of_the_file_are_left_out(tmp_path: Path) -> None:
    import tokenizers

    train_tokenizer(["we hold these truths"], 260, tmp_path / "plain.json")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "plain.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=12)
    backend.save(str(tmp_path / "cutting.json"))
    plain, cutting = (HFTokenizer(str(tmp_path / f"{name}.json")) for name in ("plain", "cutting"))
    assert cutting.encode("we hold these truths") == plain.encode("we hold these truths")
    assert len(cutting.encode("a")) == 1
