"""gc beside others: what is half removed, what vanishes, what is in use."""

import shutil

import pytest
from filelock import FileLock
from jobs import clip, command, folder_of, write_manifest

from tokenflow_batch import garbage
from tokenflow_batch.garbage import remove, unneeded
from tokenflow_batch.manifest import load
from tokenflow_batch.paths import Workspace

OLD = "0123456789abcdef01234567"


@pytest.fixture
def manifest(tmp_path, tiny_model):
    clip(tmp_path / "clip.mp4", 2)
    path = write_manifest(tmp_path, tiny_model)
    folder = folder_of(path, "encode")
    folder.open({}, {})
    folder.finish({})
    for name in (OLD, f"{OLD}.removed", f"{folder.key}.removed"):
        made = folder.folder.with_name(name)
        made.mkdir()
        (made / "data").write_bytes(b"x" * 100)
    return path


def there(manifest):
    root = folder_of(manifest, "encode").folder.parent
    return {path.name for path in root.iterdir() if path.is_dir()}


def test_a_folder_goes_together_with_what_a_killed_removal_has_left(manifest):
    answer = command("gc", manifest, "--yes")
    assert answer.exit_code == 0, answer.output
    assert "3 folders" in answer.output
    assert there(manifest) == {folder_of(manifest, "encode").key}


def test_what_others_remove_meanwhile_is_no_error(manifest, monkeypatch):
    batch = load(manifest)
    found = unneeded(batch)
    for item in found:
        shutil.rmtree(item.path)
    assert all(remove(Workspace(batch.output, batch.workdir), item) for item in found)
    original = garbage.tree_bytes

    def vanishing(path):
        shutil.rmtree(path)
        return original(path)

    folder_of(manifest, "encode").folder.with_name(OLD).mkdir()
    monkeypatch.setattr(garbage, "tree_bytes", vanishing)
    assert [item.bytes for item in unneeded(batch)] == [0]


def test_what_a_run_works_on_stays(manifest):
    path = folder_of(manifest, "encode").folder.with_name(f"{OLD}.lock")
    with FileLock(path):
        answer = command("gc", manifest, "--yes")
    assert answer.exit_code == 0
    assert "another process works in it" in answer.stderr
    assert there(manifest) == {folder_of(manifest, "encode").key, OLD, f"{OLD}.removed"}


def test_what_is_needed_stays_though_the_digests_are_lost(manifest):
    folder = folder_of(manifest, "encode")
    assert folder.complete
    Workspace(load(manifest).output, load(manifest).workdir).digests.unlink()
    assert command("gc", manifest, "--yes").exit_code == 0
    assert there(manifest) == {folder.key}


def test_other_folders_are_nobody_s_to_remove(manifest):
    """As with `--workdir` of the output folder and a clip that is named like a stage."""
    result = folder_of(manifest, "encode").folder.with_name("blue")
    result.mkdir()
    (result / "metrics.json").write_text("{}")
    assert command("gc", manifest, "--yes").exit_code == 0
    assert there(manifest) == {folder_of(manifest, "encode").key, "blue"}
