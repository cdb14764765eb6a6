"""SPMTokenizer and TiktokenTokenizer against the packages themselves, with tokenizers made on the spot."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.errors import UserError
from megatron.tokenizer import HFTokenizer, SPMTokenizer, TiktokenTokenizer, build_tokenizer
from megatron.tokenizer.tiktoken import DEFINITIONS
from megatron.tokenizer.training import train_sentencepiece, train_tokenizer

sentencepiece = pytest.importorskip("sentencepiece", reason="needs requirements-tokenizers.txt")
tiktoken = pytest.importorskip("tiktoken", reason="needs requirements-tokenizers.txt")
openai_public = pytest.importorskip("tiktoken_ext.openai_public")

TEXTS = {
    "english": "The union is strong.  We've 1,234 reasons; it's 'fine'.",
    "code": "def f(x: int) -> int:\n\tif x > 10:\n        return x ** 2  # square\n\n\nprint(f'{f(3)}')\r\n",
    "german": "Gr\u00fc\u00dfe aus K\u00f6ln",
    "russian": "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440",
    "chinese": "\u4f60\u597d\uff0c\u4e16\u754c",
    "arabic": "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643",
    "hindi": "\u0928\u092e\u0938\u094d\u0924\u0947",
    "emoji": "\U0001f600 \U0001f468\u200d\U0001f469 e\u0301",
    "spaces": " a\n\n b\u00a0 c   ",
}
CORPUS = [*TEXTS.values(), "the union of the people and the states " * 5] * 3
each_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


def write_ranks(path: Path, ranks: dict[bytes, int]) -> str:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return str(path)


def byte_ranks(*merged: bytes) -> dict[bytes, int]:
    return {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(merged)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json, spm.model, and that BPE again as gpt2.tiktoken and own.tiktoken."""
    folder = tmp_path_factory.mktemp("optional")
    train_tokenizer(CORPUS, 400, folder / "tokenizer.json")
    train_sentencepiece(CORPUS, 400, folder / "spm.model")
    write_ranks(folder / "gpt2.tiktoken", ranks_of(folder / "tokenizer.json"))
    write_ranks(folder / "own.tiktoken", ranks_of(folder / "tokenizer.json"))
    return folder


def ranks_of(tokenizer_json: Path) -> dict[bytes, int]:
    """The vocabulary of a byte-level BPE with bytes instead of GPT-2's printable stand-ins."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    vocabulary = json.loads(tokenizer_json.read_text(encoding="utf-8"))["model"]["vocab"]
    return {bytes(byte_of[c] for c in token): rank for token, rank in vocabulary.items() if rank}


@each_text
def test_spm_ids_are_sentencepieces(folder: Path, text: str) -> None:
    tokenizer = SPMTokenizer(str(folder / "spm.model"))
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    ids = tokenizer.encode(text)
    assert ids == library.encode(text)
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == text
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (400, library.piece_to_id("<|endoftext|>"))


@each_text
def test_tiktoken_ids_are_tiktokens(folder: Path, text: str) -> None:
    tokenizer = TiktokenTokenizer(str(folder / "own.tiktoken"))
    library = tiktoken.Encoding(
        "own", pat_str=DEFINITIONS["cl100k_base"].pattern, mergeable_ranks=ranks_of(folder / "tokenizer.json"),
        special_tokens={"<|endoftext|>": 400},
    )  # fmt: skip
    ids = tokenizer.encode(text)
    assert ids == library.encode(text)
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == text == library.decode(ids)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (library.n_vocab, library.eot_token) == (401, 400)


@each_text
def test_the_same_bpe_gives_the_same_ids_in_tokenizers_and_tiktoken(folder: Path, text: str) -> None:
    by_tokenizers = HFTokenizer(str(folder / "tokenizer.json"))
    by_tiktoken = TiktokenTokenizer(str(folder / "gpt2.tiktoken"))
    assert by_tokenizers.encode(text) == by_tiktoken.encode(text)
    assert by_tokenizers.decode(by_tokenizers.encode(text)) == text


@pytest.mark.parametrize("name", DEFINITIONS)
def test_known_files_equal_tiktokens_encodings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, loader, lambda *_, **__: {})
    original = openai_public.ENCODING_CONSTRUCTORS[name]()
    assert DEFINITIONS[name].pattern == original["pat_str"]
    assert DEFINITIONS[name].special_tokens == original["special_tokens"]


def test_spm_takes_the_models_end_of_sentence_or_refuses(tmp_path: Path) -> None:
    for name, eos in (("with", 1), ("without", -1)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_prefix=str(tmp_path / name), vocab_size=120, unk_id=0, eos_id=eos,
            bos_id=-1, minloglevel=2, hard_vocab_limit=False,
        )  # fmt: skip
    assert SPMTokenizer(str(tmp_path / "with.model")).eod_id == 1
    with pytest.raises(UserError, match=r"without\.model has neither a <\|endoftext\|> piece nor"):
        SPMTokenizer(str(tmp_path / "without.model"))


@pytest.mark.parametrize("kind", ["spm.model", "own.tiktoken", "tokenizer.json"])
def test_odd_text_and_odd_ids_are_no_errors(folder: Path, kind: str) -> None:
    classes = {"spm.model": SPMTokenizer, "own.tiktoken": TiktokenTokenizer, "tokenizer.json": HFTokenizer}
    tokenizer = classes[kind](str(folder / kind))
    assert tokenizer.encode("") == []
    assert tokenizer.decode(tokenizer.encode("a\ud800b\0")) == "a?b\0"
    assert tokenizer.decode([tokenizer.eod_id, 100000]) == ""
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("\U0001f680")[:2])  # an unseen character: four bytes


def test_special_tokens_in_a_text_are_plain_text(folder: Path) -> None:
    for tokenizer in (SPMTokenizer(str(folder / "spm.model")), TiktokenTokenizer(str(folder / "own.tiktoken"))):
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.eod_id not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> SPMTokenizer:
    """A sentencepiece model as most are: words bring their space along, also the first of a text."""
    prefix = tmp_path_factory.mktemp("spaced") / "spm"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(prefix), vocab_size=360, byte_fallback=True, minloglevel=2,
        model_type="bpe", control_symbols=["<|endoftext|>", "<turn>"],
    )  # fmt: skip
    return SPMTokenizer(f"{prefix}.model")


@each_text
def test_a_continuation_keeps_its_leading_space(folder: Path, spaced: SPMTokenizer, text: str) -> None:
    others = [SPMTokenizer(str(folder / "spm.model")), TiktokenTokenizer(str(folder / "own.tiktoken"))]
    for tokenizer in (spaced, *others):
        ids = tokenizer.encode(text)
        for cut in range(len(ids) + 1):
            before, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
            assert before.rstrip("\ufffd") + tokenizer.decode_after(ids[:cut], ids[cut:]) == whole


def test_special_tokens_are_written_out_where_asked(folder: Path, spaced: SPMTokenizer) -> None:
    turn = next(i for i, text in spaced.specials.items() if text == "<turn>")
    ids = [spaced.eod_id, *spaced.encode("the union"), turn, *spaced.encode("of states"), turn]
    assert spaced.decode(ids) == "the union of states"
    assert spaced.decode_whole(ids) == "<|endoftext|>the union<turn> of states<turn>"
    assert spaced.decode_whole(ids[-3:], ids[:-3]).endswith("<turn>")
    tokenizer = TiktokenTokenizer(str(folder / "own.tiktoken"))
    ids = [*tokenizer.encode("a"), tokenizer.eod_id, *tokenizer.encode(" b")]
    assert (tokenizer.decode(ids), tokenizer.decode_whole(ids)) == ("a b", "a<|endoftext|> b")


@pytest.mark.parametrize("kind", ["SPMTokenizer", "TiktokenTokenizer"])
def test_the_config_builds_them(folder: Path, kind: str) -> None:
    file = {"SPMTokenizer": "spm.model", "TiktokenTokenizer": "own.tiktoken"}[kind]
    assert build_tokenizer(TokenizerConfig(tokenizer_type=kind, vocab_file=str(folder / file))).name == kind
    with pytest.raises(UserError, match=f"vocab_file: missing; {kind} needs"):
        build_tokenizer(TokenizerConfig(tokenizer_type=kind))


@pytest.mark.parametrize(("kind", "package"), [("SPMTokenizer", "sentencepiece"), ("TiktokenTokenizer", "tiktoken")])
def test_an_absent_package_names_the_pip_line(
    folder: Path, kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    config = TokenizerConfig(tokenizer_type=kind, vocab_file=str(folder / "spm.model"))
    with pytest.raises(
        UserError, match=f"{kind}: the {package} .* pip install -r requirements/requirements-tokenizers"
    ):
        build_tokenizer(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a model", "is not a valid sentencepiece model"),
        (b"!! 1\n", "is not a ranks file of lines"),
        (b"YQ== 0\n", "repeats a token or rank, or lacks one of the 256 bytes"),
        (b"YQ== x\n", "is not a ranks file of lines"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    kind = SPMTokenizer if "sentencepiece" in message else TiktokenTokenizer
    with pytest.raises(UserError, match=f"vocab_file: .*file {message}"):
        kind(str(tmp_path / "file"))


def test_ranks_may_not_take_a_special_tokens_id(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "r50k_base.tiktoken", byte_ranks() | {b"ab": 50256})
    with pytest.raises(UserError, match="gives a token the id 50256 of a special token"):
        TiktokenTokenizer(path)


def test_an_encoding_by_name_without_network_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ConnectionError(f"no route for {name}")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(
        UserError, match=r"'cl100k_base' could not be downloaded \(ConnectionError\); fetch cl100k_base"
    ):
        TiktokenTokenizer("cl100k_base")
    with pytest.raises(UserError, match="no such file: cl200k"):
        TiktokenTokenizer("cl200k")


def test_an_encoding_by_name_is_tiktokens(monkeypatch: pytest.MonkeyPatch) -> None:
    special = {"<|endoftext|>": 300, "<|other|>": 301}
    encoding = tiktoken.Encoding("tiny", pat_str=r"\S+|\s+", mergeable_ranks=byte_ranks(b"ab"), special_tokens=special)
    fake = SimpleNamespace(list_encoding_names=lambda: ["tiny"], get_encoding={"tiny": encoding}.__getitem__)
    monkeypatch.setitem(sys.modules, "tiktoken", fake)
    tokenizer = TiktokenTokenizer("tiny")
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.encode("ab c")) == (302, 300, [256, 32, 99])
    assert tokenizer.decode([256, 301, 280, 300, 99]) == "abc"
