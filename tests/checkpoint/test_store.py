"""The store: atomic, verified, and readable after a kill at any point."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import form
from megatron.checkpoint import store as store_module
from megatron.checkpoint import writer as writer_module
from megatron.checkpoint.form import manifest_checksum
from megatron.checkpoint.pieces import Piece, whole_pieces
from megatron.checkpoint.state import CanonicalState
from megatron.checkpoint.store import BadValues, CheckpointReader, DamagedCheckpoint, FolderLock, RunFolder
from megatron.errors import UserError

PROGRESS = {
    "iteration": 0, "skipped_iterations": 0, "consumed_samples": 0, "consumed_tokens": 0, "epoch_blocks": {},
    "loss_scaler": {}, "lineage": [],
}  # fmt: skip


def state(iteration: int, value: float = 1.0) -> CanonicalState:
    tensors = {
        "model": [("layer.weight", torch.full((4, 3), value)), ("layer.tau_tokens", torch.tensor(4))],
        "optimizer": [("exp_avg/layer.weight", torch.ones(4, 3)), ("step/layer.weight", torch.tensor(7.0))],
    }
    progress, pieces = {**PROGRESS, "iteration": iteration}, whole_pieces(tensors)
    return CanonicalState(iteration, progress, {"num_layers": 1}, pieces, {"python": "3"})


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """A manifest with the checksum that belongs to it."""
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifest_checksum(manifest)}))


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).save(state(3, 2.5))
    assert folder.name == "global_step3" and RunFolder(tmp_path).find() == folder
    reader = CheckpointReader(folder)
    assert torch.equal(reader.tensor("model", "layer.weight"), torch.full((4, 3), 2.5))
    assert reader.tensor("model", "layer.tau_tokens").dtype == torch.int64
    assert reader.shape("optimizer", "exp_avg/layer.weight") == (4, 3)
    assert (reader.iteration, reader.train_state, reader.config) == (3, {**PROGRESS, "iteration": 3}, {"num_layers": 1})


def test_large_states_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 64)
    stream = [(f"w{i}", torch.full((8,), float(i))) for i in range(10)]
    folder = RunFolder(tmp_path).save(CanonicalState(1, {}, {}, whole_pieces({"model": stream})))
    assert len(list(folder.glob("model-*.safetensors"))) == 5
    reader = CheckpointReader(folder)
    assert all(torch.equal(reader.tensor("model", name), tensor) for name, tensor in stream)


@pytest.mark.parametrize("when", ["tensors", "manifest", "rename", "latest"])
def test_a_kill_while_saving_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    RunFolder(tmp_path).save(state(1, 1.0))

    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if when == "tensors":
            patch.setattr(store_module, "write_pieces", die)
        elif when == "manifest":
            patch.setattr(store_module, "manifest_checksum", die)
        elif when == "rename":
            patch.setattr(store_module.os, "rename", die)
        else:
            patch.setattr(store_module.os, "replace", die)
        with pytest.raises(Killed):
            RunFolder(tmp_path).save(state(2, 2.0))
    latest = RunFolder(tmp_path).find()
    assert latest is not None and latest.name == "global_step1"
    CheckpointReader(latest)
    RunFolder(tmp_path).save(state(2, 2.0))
    assert [p.name for p in tmp_path.glob(".*")] == []
    assert RunFolder(tmp_path).find() == tmp_path / "global_step2"


def test_a_kill_while_replacing_a_checkpoint_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunFolder(tmp_path).save(state(1, 1.0))
    rename, calls = os.rename, []

    def rename_once(source: Any, target: Any) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(source)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "rename", rename_once)
        with pytest.raises(KeyboardInterrupt):
            RunFolder(tmp_path).save(state(1, 2.0))
    survivor = RunFolder(tmp_path).find()
    assert survivor is not None
    assert CheckpointReader(survivor).tensor("model", "layer.weight")[0, 0] == 1.0
    RunFolder(tmp_path).save(state(1, 3.0))
    assert CheckpointReader(tmp_path / "global_step1").tensor("model", "layer.weight")[0, 0] == 3.0


def test_a_checkpoint_whose_latest_could_not_be_moved_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes back saves iterations again."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    RunFolder(tmp_path).save(state(1))
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "set_latest", full)
        with pytest.raises(UserError, match="No space left on device"):
            RunFolder(tmp_path).save(state(1, 2.0))
    root, again = RunFolder(tmp_path), state(1, 3.0)
    folder = root.publish(again, [root.write_part(again)])
    assert CheckpointReader(folder).tensor("model", "layer.weight")[0, 0] == 3.0


def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder(tmp_path).save(state(1))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer_module, "write_safetensors", full)
    with pytest.raises(UserError, match="cannot write checkpoint .*No space left on device; earlier checkpoints are"):
        RunFolder(tmp_path).save(state(2))
    assert RunFolder(tmp_path).iterations() == [1]
    assert not list(tmp_path.glob(".saving-*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model-00000.safetensors").unlink(), "model-00000.safetensors is missing"),
        (lambda f: (f / "train_state.json").write_text("{}"), "train_state.json has 2 bytes instead of"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is not valid JSON"),
        (lambda f: (f / "manifest.json").write_text("{}"), "does not describe"),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, damage: Any, message: str) -> None:
    folder = RunFolder(tmp_path).save(state(1))
    damage(folder)
    with pytest.raises(UserError, match=message):
        CheckpointReader(folder)


@pytest.mark.parametrize("file", ["train_state.json", "config.yml"])
@pytest.mark.parametrize("content", [None, b"", b"[1", b"{}", b"\xff\xfe\x00"], ids=str)
def test_small_files_are_checked_where_those_of_tensors_are_not(
    tmp_path: Path, file: str, content: bytes | None
) -> None:
    folder = RunFolder(tmp_path).save(state(1))
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=f"^load: checkpoint .*global_step1 is damaged: {file} (is missing|has )"):
        CheckpointReader(folder, verify=False)


@pytest.mark.parametrize("file", ["train_state.json", "config.yml"])
@pytest.mark.parametrize("content", [b"", b"[1", b"[1]", b"\xff\xfe\x00"], ids=str)
def test_small_files_that_hold_nothing_of_use_are_named(tmp_path: Path, file: str, content: bytes) -> None:
    """Even with the checksum of the manifest."""
    folder = RunFolder(tmp_path).save(state(1))
    (folder / file).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file] = {"bytes": len(content), "sha256": store_module.file_sha256(folder / file)}
    write_manifest(folder, manifest)
    with pytest.raises(UserError, match=f"is damaged: {file} (cannot be parsed|does not hold keys and values)"):
        CheckpointReader(folder)


def test_a_manifest_lists_the_small_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).save(state(1))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["config.yml"]
    write_manifest(folder, manifest)
    with pytest.raises(UserError, match="is damaged: manifest.json does not list config.yml"):
        CheckpointReader(folder, verify=False)


@pytest.mark.parametrize("file", ["manifest.json", "train_state.json", "config.yml", "model-00000.safetensors"])
def test_a_disk_that_does_not_read_is_no_reason_to_remove_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    folder = RunFolder(tmp_path).save(state(1))
    real = Path.open

    def refuse(path: Path, *arguments: Any, **keys: Any) -> Any:
        if path.name == file:
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **keys)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_text", lambda path, **keys: refuse(path, **keys).read())
    with pytest.raises(UserError, match=rf"global_step1/{file} cannot be read: Permission denied; check"):
        CheckpointReader(folder)


@pytest.mark.parametrize("damage", ["missing", "cut", "another file"])
def test_a_tensor_of_a_damaged_file_names_the_file(tmp_path: Path, damage: str) -> None:
    folder = RunFolder(tmp_path).save(state(1))
    reader, file = CheckpointReader(folder, verify=False), folder / "model-00000.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:20] if damage == "cut" else b"x" * file.stat().st_size)
    with pytest.raises(UserError, match="is damaged: model-00000.safetensors (is missing|has 20 bytes|does not have)"):
        reader.tensor("model", "layer.weight")


def test_messages_name_the_key_that_gave_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).save(state(1))
    (folder / "config.yml").unlink()
    with pytest.raises(UserError, match="^pretrain_partial_init: checkpoint .*config.yml is missing; name another one"):
        CheckpointReader(folder, verify=False, key="pretrain_partial_init")
    (tmp_path / "latest").write_text("global_step9")
    with pytest.raises(UserError, match="^IN: .*iterations found there: 1; name the folder of one"):
        RunFolder(tmp_path, key="IN").find()


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).save(state(1))
    file = folder / "optimizer-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="does not have the checksum"):
        CheckpointReader(folder)


def test_a_later_format_is_refused_with_its_number(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).save(state(1))
    manifest = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, {**manifest, "version": 99})
    with pytest.raises(UserError, match="format version 99"):
        CheckpointReader(folder)


def test_latest_that_names_nothing_lists_what_is_there(tmp_path: Path) -> None:
    RunFolder(tmp_path).save(state(5))
    (tmp_path / "latest").write_text("global_step9")
    with pytest.raises(UserError, match="global_step9 is not a complete checkpoint; iterations found there: 5"):
        RunFolder(tmp_path).find()
    with pytest.raises(UserError, match="global_step7"):
        RunFolder(tmp_path).find(7)
    assert RunFolder(tmp_path).find(5) == tmp_path / "global_step5"


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).find() is None and RunFolder(tmp_path / "missing").find() is None


def test_old_checkpoints_go_and_protected_ones_stay(tmp_path: Path) -> None:
    for iteration in (0, 1, 2, 3, 4):
        RunFolder(tmp_path).save(state(iteration))
    assert RunFolder(tmp_path).remove_old(2, protected=[0]) == [1, 2]
    assert RunFolder(tmp_path).iterations() == [0, 3, 4]


def test_what_could_not_be_removed_once_does_not_keep_later_ones(tmp_path: Path) -> None:
    """As on a network's file system, where an open file keeps its folder; a run that goes back saves it again."""
    root = RunFolder(tmp_path)
    for iteration in (1, 2, 3):
        root.save(state(iteration))
    (tmp_path / ".saving-removing-global_step1" / "left").mkdir(parents=True)
    assert root.remove_old(1) == [1, 2] and root.iterations() == [3]
    assert not list(tmp_path.glob(".*"))


def test_kept_are_the_ones_saved_last_not_the_highest_numbers(tmp_path: Path) -> None:
    for iteration in (8, 10, 3):
        RunFolder(tmp_path).save(state(iteration))
    assert RunFolder(tmp_path).remove_old(2) == [8]
    assert RunFolder(tmp_path).iterations() == [3, 10]


def in_two_parts(value: float) -> list[CanonicalState]:
    """A checkpoint of two processes, each with rows of one tensor; the first has another one too."""
    whole, states = torch.arange(12, dtype=torch.float32).view(4, 3) + value, []
    for rank in (0, 1):
        pieces = [Piece("model", "layer.weight", (4, 3), (2 * rank, 0), whole[2 * rank : 2 * rank + 2])]
        pieces += whole_pieces({"rng": [(f"rank{rank}/torch", torch.ones(5, dtype=torch.uint8))]})
        pieces += whole_pieces({"model": [("bias", torch.ones(3))]}) if rank == 0 else ()
        states.append(CanonicalState(1, {}, {}, pieces))
    return states


def test_a_folder_that_another_process_removes_meanwhile_has_no_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that is refused the first rank removes it, while others may look still."""
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    assert RunFolder(tmp_path / "removed").iterations() == []


def test_each_process_writes_its_part_and_one_publishes(tmp_path: Path) -> None:
    root, states = RunFolder(tmp_path), in_two_parts(1.0)
    parts = [root.write_part(state, rank) for rank, state in reversed(list(enumerate(states)))]
    assert root.iterations() == []
    folder = root.publish(states[0], parts)
    assert {path.name for path in folder.glob("*.safetensors")} == {
        f"{kind}-0000{rank}-00000.safetensors" for kind in ("model", "rng") for rank in (0, 1)
    } | {"model-00000-00001.safetensors"}
    reader = CheckpointReader(folder)
    whole = torch.arange(12, dtype=torch.float32).view(4, 3) + 1
    assert torch.equal(reader.tensor("model", "layer.weight"), whole)
    assert torch.equal(reader.part("model", "layer.weight", slice(1, 3), slice(1, 3)), whole[1:3, 1:3])
    assert torch.equal(reader.part("model", "layer.weight", slice(2, 4)), whole[2:4])
    assert reader.shape("model", "layer.weight") == (4, 3) and torch.equal(
        reader.tensor("model", "bias"), torch.ones(3)
    )
    assert json.loads((folder / "manifest.json").read_text())["version"] == 2


def test_processes_look_at_the_files_that_they_wrote_and_between_them_at_all(tmp_path: Path) -> None:
    root, states = RunFolder(tmp_path), in_two_parts(1.0)
    folder = root.publish(states[0], [root.write_part(state, rank) for rank, state in enumerate(states)])
    file = folder / "model-00001-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    reader = CheckpointReader(folder, verify=False)
    reader.verify(share=(0, 2))
    for processes in (1, 2, 3, 7):
        faults = 0
        for number in range(processes):
            try:
                CheckpointReader(folder, verify=False).verify(share=(number, processes))
            except DamagedCheckpoint as error:
                assert "model-00001-00000.safetensors has" in str(error)
                faults += 1
        assert faults == 1


@pytest.mark.parametrize("lost", [0, 1])
def test_parts_that_are_not_all_of_a_tensor_are_not_published(
    tmp_path: Path, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_PATIENCE_SECONDS", 0.0)
    root, states = RunFolder(tmp_path), in_two_parts(1.0)
    parts = [root.write_part(state, rank) for rank, state in enumerate(states)]
    with pytest.raises(BadValues, match=r"not written: layer.weight \(model\) has 6 of its 12 values only"):
        root.publish(states[0], [parts[1 - lost]])
    (tmp_path / ".saving-global_step1" / f"model-0000{lost}-00000.safetensors").unlink()
    with pytest.raises(
        UserError, match=f"model-0000{lost}-00000.* is not there, so the nodes do not share this folder"
    ):
        root.publish(states[0], parts)
    assert root.iterations() == []


def forged(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    write_manifest(folder, manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda places: places.pop(), "has 6 of its 12 values only"),
        (lambda places: places[0].__setitem__(1, [3, 0]), "has a part outside of it"),
        (lambda places: places[0].__setitem__(1, [1, 0]), "has values twice"),
        (lambda places: places.append(places[0]), "has values twice"),
        (lambda places: places[0].__setitem__(2, [2]), "has no file, dtype and shape"),
        (lambda places: places[0].__setitem__(2, [2, -3]), "has no file, dtype and shape"),
        (lambda places: places[0].__setitem__(0, "rng-00000-00000.safetensors"), "has no file, dtype and shape"),
        (lambda places: places[0].pop(), "has no file, dtype and shape"),
        (lambda places: places.clear(), "has 0 of its 12 values only"),
    ],
)
def test_a_manifest_whose_parts_make_no_tensor_is_damaged(
    tmp_path: Path, change: Callable[[list[Any]], Any], message: str
) -> None:
    root, states = RunFolder(tmp_path), in_two_parts(1.0)
    folder = root.publish(states[0], [root.write_part(state, rank) for rank, state in enumerate(states)])
    forged(folder, lambda manifest: change(manifest["tensors"]["model"]["layer.weight"][0]))
    with pytest.raises(DamagedCheckpoint, match=f"manifest.json .*layer.weight.*{message}|{message} of layer.weight"):
        CheckpointReader(folder)


@pytest.mark.parametrize("shape", [[2**52] * 300, [2**52] * 5, [1] * 17])
def test_a_tensor_of_an_impossible_shape_is_damage(tmp_path: Path, shape: list[int]) -> None:
    root, states = RunFolder(tmp_path), in_two_parts(1.0)
    folder = root.publish(states[0], [root.write_part(state, rank) for rank, state in enumerate(states)])

    def change(manifest: dict[str, Any]) -> None:
        entry = manifest["tensors"]["model"]["layer.weight"]
        entry[0], entry[2] = [[entry[0][0][0], [0] * len(shape), [1] * len(shape)]], shape

    forged(folder, change)
    with pytest.raises(DamagedCheckpoint, match="has no file, dtype and shape of layer.weight"):
        CheckpointReader(folder)


def test_a_manifest_has_as_many_values_as_its_tensors_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty thousand tensors in the parts of sixteen ranks are more values than any configuration has."""
    tensors = [(f"layer.{number}", torch.ones(2, 2)) for number in range(100)]
    folder = RunFolder(tmp_path).save(CanonicalState(1, {}, {}, whole_pieces({"model": tensors})))
    monkeypatch.setattr(form, "_MAX_VALUES", 500)
    assert len(CheckpointReader(folder).names("model")) == 100


def test_a_version_that_its_tables_do_not_have_is_damage(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).save(state(1))
    forged(folder, lambda manifest: manifest.update(version=2))
    with pytest.raises(DamagedCheckpoint, match="is of version 2, its tables of version 1"):
        CheckpointReader(folder)


def test_transient_checkpoints_go_with_the_next_and_do_not_count(tmp_path: Path) -> None:
    root = RunFolder(tmp_path)

    def save(iteration: int, transient: bool) -> None:
        one = state(iteration)
        root.publish(one, [root.write_part(one)], transient)
        root.remove_old(2)

    for iteration, transient in ((1, False), (2, True), (3, True), (4, False), (5, True)):
        save(iteration, transient)
    assert root.iterations() == [1, 4, 5] and root.find() == tmp_path / "global_step5"
    save(6, False)
    assert root.iterations() == [4, 6]


@pytest.mark.parametrize("name", [".saving-global_step1", ".latest", "latest", ".lock", ".replaced-global_step1"])
@pytest.mark.parametrize("kind", ["link", "folder link"])
def test_links_named_like_ours_are_not_followed_and_not_fatal(tmp_path: Path, name: str, kind: str) -> None:
    root, mine = tmp_path / "run", tmp_path / "mine"
    root.mkdir()
    mine.mkdir()
    (mine / "file").write_text("keep")
    (root / name).symlink_to(mine if kind == "folder link" else mine / "file")
    lock = FolderLock(root)
    for _ in range(2):
        RunFolder(root).save(state(1))
    lock.close()
    assert RunFolder(root).find() == root / "global_step1"
    assert (mine / "file").read_text() == "keep" and [path.name for path in mine.iterdir()] == ["file"]
