"""A tiny run, trained in this process on a little text: what commands that read a run are tested with."""

from pathlib import Path

from memorizing.cli import main

SETTINGS = f"""
include '{Path(__file__).parents[1] / "configs/base.gin"}'

MEMORY_SIZE = 64
SEGMENT_LENGTH = 16
BATCH_SIZE = 8
NUM_STEPS = 8
CHECKPOINT_EVERY = 8
VOCABULARY_SIZE = 259

Model.layers = 2
Model.embedding_size = 16
Model.heads = 2
Model.head_size = 8
Model.feed_forward_size = 32
Model.memory_layers = (2,)
Model.dtype = 'float32'
Model.scan_layers = False
Model.gate_bias = 0.0
Memory.dtype = 'float32'
Memory.neighbors = 4
Batch.segments_per_call = 4
Optimizer.kind = 'adamw'
Optimizer.learning_rate = 0.01
Optimizer.schedule = 'constant'
Prepare.vocabulary = 'bytes'
Evaluation.batch_size = 8
Evaluation.segments_per_call = 4
"""
WORDS = ["one", "two", "three", "der", "die", "das", "abc", "xyz", "ünï", "12345", "und", "so", "fort"]
TEXTS = {
    f"{number}.txt": f"{number} "
    + f"{WORDS[number % 13]} {WORDS[number % 7]} {WORDS[number % 3]}\n" * (3 + number % 17)
    for number in range(30)
}
"""Documents by their names; a hash of these divides them into splits."""


def write_texts(folder: Path, texts: dict[str, str] = TEXTS) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def prepare_and_train(place: Path, *bindings: str) -> Path:
    """Makes `place/settings.gin`, tokens in `place/data` and a run in `place/run`; gives the latter."""
    settings = place / "settings.gin"
    settings.write_text(SETTINGS)
    raw = write_texts(place / "raw")
    assert main(["prepare", f"--gin_file={settings}", f"--raw={raw}", f"--out={place / 'data'}"]) == 0
    given = [f"--gin_param={binding}" for binding in (f"DATA = '{place / 'data'}'", *bindings)]
    assert main(["train", f"--gin_file={settings}", *given, f"--workdir={place / 'run'}"]) == 0
    return place / "run"
