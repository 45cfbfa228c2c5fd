"""`memorizing inspect-data`: what it prints, and that it refuses what is not whole."""

import pytest

from memorizing.cli import main


@pytest.fixture
def data(tmp_path):
    (tmp_path / "raw").mkdir()
    for number in range(6):
        (tmp_path / "raw" / f"{number}.txt").write_text("".join(f"{number}:{line}\n" for line in range(100 * number)))
    settings = ("Prepare.vocabulary = 'bytes'", "Prepare.validation = 0.0", "Prepare.test = 0.0")
    params = [word for setting in settings for word in ("--gin_param", setting)]
    assert main(["prepare", *params, f"--raw={tmp_path / 'raw'}", f"--out={tmp_path / 'data'}"]) == 0
    return tmp_path / "data"


def test_it_prints_the_manifest_a_document_and_its_segments(data, capsys):
    capsys.readouterr()
    assert main(["inspect-data", str(data), "--document=3.txt", "--segment_length=64"]) == 0
    said = capsys.readouterr().out
    text = "".join(f"3:{line}\n" for line in range(300))
    assert "train: 5 documents" in said and "as on disk" in said
    assert "0.txt: left out: 0 bytes, fewer than Folder.minimum_bytes = 1" in said
    assert "Prepare.vocabulary = 'bytes'" in said
    assert f"{len(text):,} tokens, {-(-len(text) // 64):,} segments of 64" in said
    assert "  | 3:0\n  | 3:1\n" in said
    for place in (1, 5, -(-len(text) // 64) - 1):
        start = 64 * place
        after = text[start : start + 32][:30]
        assert f"{start:,}  " in said and repr(after) in said and repr(text[max(0, start - 32) : start][-30:]) in said


def test_it_says_how_many_were_left_out_and_why(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("memorizing.data.prepare.LISTED", 2)
    raw = tmp_path / "short"
    raw.mkdir()
    for number in range(30):
        (raw / f"{number}.txt").write_text(f"{number}" * (40 if number < 5 else 1))
    params = ("vocabulary = 'bytes'", "validation = 0.0", "test = 0.0", "minimum_tokens = 10")
    params = [word for param in params for word in ("--gin_param", f"Prepare.{param}")]
    assert main(["prepare", *params, f"--raw={raw}", f"--out={tmp_path / 'few'}"]) == 0
    assert "left out: 25; 25 notes" in capsys.readouterr().out
    assert main(["inspect-data", str(tmp_path / "few")]) == 0
    said = capsys.readouterr().out
    assert "left out: 25; 25 notes" in said and "25 N tokens, fewer than Prepare.minimum_tokens = N\n" in said


def test_it_refuses_what_is_not_there_or_not_whole(data, capsys):
    for arguments, words in (
        (["--document=9.txt"], "--document=9.txt: not in the train split; its first are 1.txt"),
        (["--split=test"], "has no split 'test', only train"),
        (["--segment_length=0"], "--segment_length=0: must be at least 1"),
    ):
        assert main(["inspect-data", str(data), *arguments]) == 2
        assert words in capsys.readouterr().err
    names = data / "train" / "ends" / "c" / "0"
    names.write_bytes(names.read_bytes()[:-1] + b"x")
    assert main(["inspect-data", str(data)]) == 2
    assert "damaged" in capsys.readouterr().err
