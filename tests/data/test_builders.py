"""TFDS datasets of the corpora: what they hold, that a kill costs little, and that nothing depends on the runner."""

import json
import logging
import os
from pathlib import Path

import pytest

from memorizing.data.bulk import Beam, BeamSettings, run_jobs, write_once
from memorizing.data.corpora.arxiv import Arxiv
from memorizing.data.corpora.c4 import C4
from memorizing.data.corpora.github import Github
from memorizing.data.corpora.pg19 import Pg19
from memorizing.data.corpora.published import Published
from memorizing.errors import InputError

builders = pytest.importorskip("memorizing.data.builders")
tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture
def raw(tmp_path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}-0.txt").write_text(f"Title: Book {number}\n\n" + f"line of book {number}\n" * (number + 1))
    (folder / "5-0.txt").write_text((folder / "4-0.txt").read_text())
    (folder / "99.txt").write_text("")
    return folder


DIRECT = BeamSettings()


def build(raw, data_dir, name="pg19", beam=DIRECT, **fields):
    builder = builders.BUILDERS[name](data_dir=data_dir, **fields)
    runner, options = Beam.from_settings(beam) if beam else (None, None)
    config = tfds.download.DownloadConfig(manual_dir=raw, beam_runner=runner, beam_options=options)
    builder.download_and_prepare(download_config=config)
    return builder


IN_ORDER = tfds.ReadConfig(interleave_cycle_length=1)


def documents(builder) -> dict[str, list[dict]]:
    return {
        split: [
            {name: value.decode() if isinstance(value, bytes) else int(value) for name, value in example.items()}
            for example in tfds.as_numpy(builder.as_dataset(split=split, read_config=IN_ORDER))
        ]
        for split in builder.info.splits
    }


def test_a_dataset_holds_whole_documents_in_order_and_loads_by_name(raw, tmp_path):
    builder = build(raw, tmp_path / "data", part_bytes=200)
    found = documents(builder)
    assert set(found) == {"train", "validation", "test"} and builder.info.splits["train"].num_shards > 2
    everything = [document for split in found.values() for document in split]
    assert sorted(int(document["document_id"]) for document in everything) == list(range(20))
    for document in everything:
        number = 4 if document["document_id"] == "5" else int(document["document_id"])
        text = f"Title: Book {number}\n\n" + f"line of book {number}\n" * (number + 1)
        assert document == {
            "text": text,
            "document_id": document["document_id"],
            "title": f"Book {number}",
            "bytes": len(text.encode()),
            "license": "public domain (Project Gutenberg)",
        }
    train = [int(document["document_id"]) for document in found["train"]]
    assert train == sorted(train)
    assert [tuple(note) for note in builders.problems(builder)] == [
        ("99.txt", "left out: it has no text"),
        ("4", next(note.message for note in builders.problems(builder) if note.place == "4")),
    ]
    assert not (tmp_path / "data" / "pg19_documents.unfinished").exists()
    again = tfds.builder("pg19_documents", data_dir=tmp_path / "data")
    assert documents(again) == found


@pytest.mark.parametrize(
    "beam",
    [None, BeamSettings(options=("--direct_running_mode=multi_processing", "--direct_num_workers=2"))],
    ids=["no-beam", "two-processes"],
)
def test_results_do_not_depend_on_the_runner_or_workers(raw, tmp_path, beam):
    one, other = build(raw, tmp_path / "one"), build(raw, tmp_path / "other", beam=beam)
    assert documents(one) == documents(other) and builders.problems(one) == builders.problems(other)


def test_a_resumed_build_does_not_read_items_again(raw, tmp_path, monkeypatch):
    raw = raw / "pages"  # without the books, each of which would be noted
    (raw / "train").mkdir(parents=True)
    (raw / "test").mkdir()
    line = json.dumps({"text": "x" * 50}) + "\n"
    for number in range(3):
        (raw / "train" / f"{number}.json").write_text(line)
    (raw / "test" / "0.json.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(InputError, match=r"0\.json\.gz: cut off or damaged after line 0"):
        build(raw, tmp_path / "data", "c4", corpus=C4(1))
    jobs = tmp_path / "data" / "c4_documents.unfinished"
    done = {path: path.stat().st_mtime_ns for path in jobs.glob("*.json")}
    assert len(done) == 3
    (raw / "test" / "0.json.gz").unlink()
    (raw / "test" / "0.json").write_text(line.replace("x", "y"))
    times = {}
    monkeypatch.setattr(
        builders.shutil, "rmtree", lambda path, **_: times.update((p, p.stat().st_mtime_ns) for p in done)
    )
    builder = build(raw, tmp_path / "data", "c4", corpus=C4(1))
    assert times == done  # when the jobs would be removed they were still those of the first run
    assert [len(split) for split in documents(builder).values()] == [3, 1] or len(documents(builder)["train"]) == 3


def test_a_dataset_of_other_settings_or_files_is_refused(raw, tmp_path):
    build(raw, tmp_path / "data")
    build(raw, tmp_path / "data")  # the same again is found
    with pytest.raises(InputError, match=r"was made with settings Pg19\(strip_license=True\).*, not with .*False"):
        build(raw, tmp_path / "data", corpus=Pg19(strip_license=False))
    (raw / "7-0.txt").write_text("another text")
    with pytest.raises(InputError, match=r"was made from '.*raw', whose files have changed since. Remove it"):
        build(raw, tmp_path / "data")
    deep = tmp_path / "repositories" / "o__r" / "a" / "b.py"
    deep.parent.mkdir(parents=True)
    deep.write_text("b = 1\n")
    (tmp_path / "repositories" / "o__s").mkdir()
    (tmp_path / "repositories" / "o__s" / "c.py").write_text("c = 1\n")
    shares = {"validation": 0.0, "test": 0.0}
    build(tmp_path / "repositories", tmp_path / "data", "github", **shares)
    deep.write_text("b = 22\n")
    with pytest.raises(InputError, match="whose files have changed since"):
        build(tmp_path / "repositories", tmp_path / "data", "github", **shares)


def changed(raw, data_dir, name, **fields):
    with pytest.raises(InputError, match="whose files have changed since"):
        build(raw, data_dir, name, **fields)


def test_changed_metadata_and_link_targets_are_detected(raw, tmp_path):
    (tmp_path / "elsewhere.txt").write_text("a book that lies elsewhere\n")
    (raw / "77.txt").symlink_to(tmp_path / "elsewhere.txt")
    (raw / "78.txt").symlink_to(raw / "nowhere")
    build(raw, tmp_path / "books")
    build(raw, tmp_path / "books")
    (tmp_path / "elsewhere.txt").write_text("another book\n")
    changed(raw, tmp_path / "books", "pg19")
    build(raw, tmp_path / "listed")
    (raw / "metadata.csv").write_text("1,A title,1900,url\n")
    changed(raw, tmp_path / "listed", "pg19")
    paper = tmp_path / "papers" / "2101.00001" / "main.tex"
    paper.parent.mkdir(parents=True)
    paper.write_text("\\documentclass{article}\\begin{document}Text.\\end{document}\n")
    metadata = tmp_path / "metadata.json"
    metadata.write_text('{"id": "2101.00001", "title": "One"}\n')
    how = {"corpus": Arxiv(metadata=str(metadata)), "validation": 0.0, "test": 0.0}
    build(tmp_path / "papers", tmp_path / "papers_data", "arxiv", **how)
    metadata.write_text('{"id": "2101.00001", "title": "Another"}\n')
    changed(tmp_path / "papers", tmp_path / "papers_data", "arxiv", **how)


def test_raw_files_are_recognized_by_relative_paths_and_links(raw, tmp_path, monkeypatch):
    build(raw, tmp_path / "data")
    monkeypatch.setattr(Pg19, "read", None)
    monkeypatch.chdir(tmp_path)
    build("raw", tmp_path / "data")
    (tmp_path / "link").symlink_to(raw)
    build(tmp_path / "link", tmp_path / "data")
    other = tmp_path / "other"
    other.mkdir()
    (other / "1-0.txt").write_text("one")
    with pytest.raises(InputError, match=r"made from '.*raw', whose files differ from those in '.*other'"):
        build(other, tmp_path / "data")


def test_an_existing_dataset_loads_without_raw_files_and_a_missing_one_is_refused(raw, tmp_path):
    build(raw, tmp_path / "data", corpus=Pg19(strip_license=False))
    assert len(list(tfds.load("pg19_documents", split="train+validation+test", data_dir=tmp_path / "data"))) == 20
    with pytest.raises(InputError, match="does not exist, and manual_dir does not name raw files"):
        tfds.load("pg19_documents", data_dir=tmp_path / "none")


def test_a_damaged_dataset_is_refused(raw, tmp_path):
    builder = build(raw, tmp_path / "data", validation=0.0, test=0.0)
    (shard_range,) = builders.shard_ranges(builder)["train"]
    assert len(list(builders.read(builder, shard_range))) == 20
    file = Path(builder.info.splits["train"].filepaths[0])
    content = file.read_bytes()
    first = 16 + int.from_bytes(content[:8], "little")  # a record: length, its checksum, data, its checksum
    for damaged in (content[:first], content[:-3], content[: first + 30] + b"!" + content[first + 31 :]):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"is damaged after document \d+ \(.*Remove .*pg19_documents"):
            list(builders.read(builder, shard_range))


def test_names_that_are_not_utf_8_get_question_marks(tmp_path):
    folder = tmp_path / "raw" / "o__r"
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"na\xefve.py")).write_text("a = 1\n")
    (folder / os.fsdecode(b"na\xefve.rs")).write_text("no")
    builder = build(tmp_path / "raw", tmp_path / "data", "github", validation=0.0, test=0.0)
    ((document,),) = documents(builder).values()
    assert document["text"] == "### na?ve.py\na = 1\n\n"
    assert r"na\udcefve.rs" in builders.problems(builder)[0].message


def test_extra_orders_of_a_repository_are_only_in_train(tmp_path):
    for number in range(12):
        for name in ("a.py", "b.py", "c/d.py", "c/e.py", "c/f.py", "g.py", "h.py", "i.py"):
            path = tmp_path / "raw" / f"o__r{number}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{name} of {number}\n")
    builder = build(tmp_path / "raw", tmp_path / "data", "github", corpus=Github(order="shuffled", orders=3))
    found = {split: [document["document_id"] for document in own] for split, own in documents(builder).items()}
    for split, ids in found.items():
        assert len(ids) == len({id.partition("#")[0] for id in ids}) * (3 if split == "train" else 1)
    assert len({id.partition("#")[0] for ids in found.values() for id in ids}) == 12


def test_a_published_dataset_that_cannot_be_fetched_is_refused(tmp_path, monkeypatch):
    def unreachable(self, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", unreachable)
    with pytest.raises(InputError, match=r"TFDS pg19 could not be fetched \(OSError: no route to host\).*--raw"):
        Published("pg19", str(tmp_path)).list(None)


def test_a_published_dataset_is_read_with_the_loader_of_tfds(tmp_path):
    """Files as TFDS's pg19 has them, made with its own features; only the download is missing."""
    published = tfds.builder("pg19", data_dir=tmp_path)
    folder = Path(published.data_dir)
    folder.mkdir(parents=True)
    splits = {}
    writer = tfds.core.SequentialWriter(published.info, max_examples_per_shard=100)
    writer.initialize_splits(["train", "validation", "test"])
    for split, count in (("train", 300), ("validation", 2), ("test", 2)):
        texts = [f"{split} {number} " * 9 for number in range(count)]
        examples = [
            {"book_text": text, "book_id": number, "book_title": "T", "publication_date": "1900", "book_link": "u"}
            for number, text in enumerate(texts)
        ]
        writer.add_examples({split: examples})
        splits[split] = texts
    writer.close_all()
    corpus = Published("pg19", str(tmp_path))
    found = {}
    for item in corpus.list(None):
        found.setdefault(item.split, []).extend(reading.document.text for reading in corpus.read(item))
    assert found == splits
    for _ in range(2):  # made once, and then found
        builder = build(None, tmp_path, corpus=corpus)
        own = {split: [document["text"] for document in documents] for split, documents in documents(builder).items()}
        assert own == splits


class Job:
    def __init__(self, folder: Path, number: int):
        self.folder, self.number = folder, number

    @property
    def path(self) -> Path:
        return self.folder / str(self.number)

    def __call__(self) -> None:
        if self.number == 2 and not (self.folder / "mended").exists():
            raise InputError("job 2 is broken")
        with (self.folder / "calls").open("a") as file:
            file.write(f"{self.number}\n")
        write_once(self.path, lambda path: path.write_text("done"))


@pytest.mark.parametrize("beam", [None, BeamSettings()], ids=["no-beam", "beam"])
def test_jobs_run_once(tmp_path, beam):
    jobs = [Job(tmp_path, number) for number in range(5)]
    with pytest.raises(InputError, match="job 2 is broken"):
        run_jobs(jobs, "testing", beam and Beam.from_settings(beam))
    (tmp_path / "mended").touch()
    run_jobs(jobs, "testing", beam and Beam.from_settings(beam))
    run_jobs(jobs, "testing", beam and Beam.from_settings(beam))
    assert sorted((tmp_path / "calls").read_text().split()) == ["0", "1", "2", "3", "4"]
    assert logging.root.manager.disable == logging.NOTSET


def test_unknown_beam_options_are_refused():
    with pytest.raises(InputError, match=r"Beam\.options has workers 8\. Write each option as '--name=value'"):
        Beam.from_settings(BeamSettings(options=("workers 8",)))
    with pytest.raises(InputError, match=r"Beam\.runner = 'NoSuchRunner': Unexpected pipeline runner"):
        Beam.from_settings(BeamSettings("NoSuchRunner"))
    misspelt = BeamSettings(options=("--direct_numm_workerss=2", "--nonsense=1"))
    with pytest.raises(
        InputError, match=r"has --direct_numm_workerss=2, --nonsense=1, .*Did you mean --direct_num_workers\?"
    ):
        Beam.from_settings(misspelt)
    with pytest.raises(InputError, match=r"Beam\.options = .*direct_num_workers: invalid int value: 'two'"):
        Beam.from_settings(BeamSettings(options=("--direct_num_workers=two",)))
    with pytest.raises(InputError, match=r"Beam\.options = .*--direct_running_mode: invalid choice: 'x'"):
        Beam.from_settings(BeamSettings(options=("--direct_running_mode=x",)))


@pytest.mark.parametrize("beam", [None, BeamSettings()], ids=["no-beam", "beam"])
def test_an_unreadable_file_is_named(raw, tmp_path, beam, monkeypatch):
    def forbidden(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", forbidden)  # permissions themselves do not stop root
    with pytest.raises(InputError, match=r"/raw/\d+-0\.txt.* .Permission denied.[;.] [Ff]ix"):
        build(raw, tmp_path / "data", beam=beam)


def test_a_repository_with_one_order_gives_one_document(tmp_path):
    for number in range(4):
        (tmp_path / "raw" / f"o__r{number}").mkdir(parents=True)
        (tmp_path / "raw" / f"o__r{number}" / "a.py").write_text(f"a = {number}\n")
    how = {"corpus": Github(order="shuffled", orders=3), "validation": 0.0, "test": 0.0}
    builder = build(tmp_path / "raw", tmp_path / "data", "github", **how)
    assert [document["document_id"] for document in documents(builder)["train"]] == [f"o/r{n}" for n in range(4)]
    messages = {note.place: note.message for note in builders.problems(builder)}
    assert messages["o/r1#2"] == "left out: in the same order as another of its documents" and len(messages) == 8
