"""YAML of strangers: values with two readings, byte order marks, files that would take memory or time without end."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config import load_config
from megatron.config.yaml_loader import MAX_DEPTH
from megatron.errors import UserError
from megatron.files import read_text

BASE = "num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nseq_length: 32\n"


def refusal(folder: Path, text: str | bytes, overrides: list[str] | None = None) -> list[str]:
    """What is wrong with a small model and `text`, a line each, without the folder's name."""
    content = text if isinstance(text, bytes) else text.encode()
    (folder / "a.yml").write_bytes(BASE.encode() + content)
    with pytest.raises(UserError) as error:
        load_config(folder / "a.yml", overrides)
    return str(error.value).replace(f"{folder}/", "").split("\n")


@pytest.mark.parametrize(
    ("written", "old", "new"),
    [
        ("010", "8", "10"), ("-017", "-15", "-17"), ("0_12", "10", "12"), ("08", "text", "8"), ("1:30", "90", "text"),
        ("190:20:30", "685230", "text"), ("1:30.5", "90.5", "text"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["seed: {}", "train_data_weights: [1, {}]", "comment: {}", "fp16: {{loss_scale: {}}}"])
def test_a_value_with_two_readings_is_refused_with_both(
    tmp_path: Path, form: str, written: str, old: str, new: str
) -> None:
    (line,) = refusal(tmp_path, form.format(written))
    assert line.startswith(f"a.yml:5: {form.partition(':')[0]}") and f": {written} is {old} in YAML 1.1" in line
    assert f"{new} in YAML 1.2" in line


@pytest.mark.parametrize(("written", "value"), [("07", 7), ("00", 0), ("0", 0), ("1_000", 1000), ("0x10", 16)])
def test_a_value_with_one_reading_is_taken(tmp_path: Path, written: str, value: int) -> None:
    (tmp_path / "a.yml").write_text(f"{BASE}seed: {written}\n")
    assert load_config(tmp_path / "a.yml").training.seed == value


def test_quotes_make_text_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(f"{BASE}comment: '010'\naccount: \"1:30\"\nwandb_group: 2026-11-26\n")
    config = load_config(tmp_path / "a.yml", ["wandb_team='0777'"])
    assert (config.launch.comment, config.launch.account) == ("010", "1:30")
    assert (config.logging.wandb_group, config.logging.wandb_team) == ("2026-11-26", "0777")


def test_set_reads_as_files_do(tmp_path: Path) -> None:
    assert refusal(tmp_path, "", ["seed=010"]) == [
        "--set seed=010: 010 is 8 in YAML 1.1 (octal) and 10 in YAML 1.2; write 8 or 10, or '010' in quotes for text"
    ]


def test_words_of_yes_and_no_are_shown_as_written(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(f"{BASE}use_wandb: yes\n")
    assert load_config(tmp_path / "a.yml").logging.use_wandb is True
    (line,) = refusal(tmp_path, "wandb_group: no\n")
    assert line.startswith(
        "a.yml:5: wandb_group: expected text (in quotes), got false; 'no' is read so by YAML 1.1 and"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: " + "9" * 5000, "a.yml:5: seed: 99999"),
        ("seed: 99999999999999999999", "is a whole number of more than 64 bits"),
        ("seed: 0x" + "f" * 5000, "is a whole number of more than 64 bits"),
        ("seed: 4294967296", "a.yml:5: seed: must be less than 4294967296, got 4294967296"),
        ("seed: -1", "a.yml:5: seed: must be at least 0, got -1"),
        ("seed: 2026-13-45", "a.yml:5: seed: expected a whole number, got '2026-13-45'"),
        ("seed: !!timestamp 2026-13-45", "a.yml:5: not valid YAML: could not determine a constructor for the tag"),
        ("seed: !!int x", "a.yml:5: not valid YAML: 'x' is not a value of its tag"),
        ("seed: !!bool x", "a.yml:5: not valid YAML: 'x' is not a value of its tag"),
        ("seed: !!python/object/apply:os.system [ls]", "a.yml:5: not valid YAML: could not determine a constructor"),
        ("eps: " + "[" * 100_000, f"nested more than {MAX_DEPTH} levels deep"),
        ("a: " + "{a: " * 500 + "1" + "}" * 500, f"nested more than {MAX_DEPTH} levels deep"),
        ("a: &a [*a]", "an alias stands inside the value that it stands for"),
        ("zero_optimization: &a {x: *a}", "an alias stands inside the value that it stands for"),
        ("? [1, 2]\n: 3", "a.yml:5: a list or a table stands where a key should"),
        ("save: \"a\\0b\"", "a.yml:5: save: the path has a NUL in it"),
        ("save: \"\\ud800\"", "holds half of a character (a lone surrogate)"),
        (b"save: a\x00b", "not valid YAML: "),
        (b"save: \xff", "a.yml cannot be read: it is not UTF-8 text (line 5)"),
        ("x" * 2**22, "a.yml cannot be read: it has more than"),
        ('vocab_file: "\\U99999999"\n', "no character has the number of this escape"),
        ('vocab_file: "\\Uffffffff"\n', "no character has the number of this escape"),
    ],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
def test_what_no_reader_should_choke_on_is_one_short_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    lines = refusal(tmp_path, text)
    assert len(lines) == 1 and message in lines[0] and len(lines[0]) < 300, lines


@pytest.mark.parametrize(
    "link", ["[*{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}]", "{{<<: [*{0}, *{0}, *{0}, *{0}]}}"]
)
def test_an_alias_bomb_is_refused_before_it_is_built(tmp_path: Path, link: str) -> None:
    levels = [f"l{i}: &l{i} {link.format(f'l{i - 1}')}" for i in range(1, 30)]
    (line,) = refusal(tmp_path, "\n".join(["l0: &l0 {a: 1}", *levels]))
    assert "values (aliases count as what they stand for)" in line or "levels deep" in line


def test_pairs_of_escapes_are_one_character(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(f'{BASE}comment: "\\ud83d\\ude00"\n')
    assert load_config(tmp_path / "a.yml").launch.comment == "\U0001f600"


def test_many_unknown_keys_take_no_time_and_not_all_lines(tmp_path: Path) -> None:
    lines = refusal(tmp_path, "".join(f"hidden_size_{i}: 1\n" for i in range(3000)))
    assert len(lines) == 101 and lines[-1] == "and 2900 more mistakes"


# ---- byte order marks ----


def test_every_reader_of_text_leaves_out_a_byte_order_mark(tmp_path: Path, tokenizer_file: Path) -> None:
    from eval_tasks.local import read_texts
    from megatron.config.sections.generation import GenerationConfig
    from megatron.data.text import read_documents
    from megatron.inference.prompts import read_requests
    from megatron.launch.hosts import read_hostfile
    from megatron.planner import read_machine
    from megatron.tokenizer import build_tokenizer

    def marked(name: str, text: str) -> str:
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        return str(tmp_path / name)

    assert load_config(marked("a.yml", f"{BASE}seed: 3\n")).training.seed == 3
    options = GenerationConfig()
    assert [r.prompt for r in read_requests(marked("p.txt", "one\ntwo\n"), options)] == ["one", "two"]
    assert [r.prompt for r in read_requests(marked("p.jsonl", '{"prompt": "one"}\n'), options)] == ["one"]
    assert read_texts(marked("t.jsonl", '{"text": "one"}\n')) == ["one"]
    assert read_texts(marked("t.txt", "one\n")) == ["one\n"]
    assert [d.content for d in read_documents([marked("d.txt", "one")])] == [b"one"]
    assert read_hostfile(marked("hosts", "node1 slots=2\n")) == {"node1": 2}
    assert read_machine(marked("m.yml", "base: A100-40GB\n")).name == "m"
    config = load_config([], {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8,
                              "tokenizer_type": "HFTokenizer",
                              "vocab_file": marked("tokenizer.json", tokenizer_file.read_text())})  # fmt: skip
    assert build_tokenizer(config.tokenizer).vocab_size > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text".encode("utf-16"), "it is not UTF-8 text but UTF-16; save it as UTF-8"),
        (b"one\ntwo \xe4\n", "it is not UTF-8 text (line 2); give a text file"),
    ],
)
def test_other_encodings_are_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_text(tmp_path / "a", "--input")
    assert str(error.value) == f"--input: {tmp_path}/a cannot be read: {message}"


@pytest.mark.parametrize("name", ["absent", ".", "a\0b", "n" * 300])
def test_what_is_no_file_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_text(tmp_path / name, "--input")
