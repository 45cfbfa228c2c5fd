"""What Python programs are given, as `from memorizing import open_reader`: a trained run, ready to read and write."""

from collections.abc import Callable, Sequence

import jax

from memorizing.config import load_trained
from memorizing.evaluation.evaluate import restore
from memorizing.files import AnyPath, run_folder
from memorizing.generation.reader import Reader
from memorizing.model.transformer import open_mesh
from memorizing.parallel.mesh import MeshSettings
from memorizing.storage.init_from import source_of
from memorizing.storage.workdir import open_vocabulary


def open_reader(
    workdir: str | AnyPath,
    memory_size: int | None = None,
    gin_files: Sequence[str] = (),
    gin_params: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Reader:
    """A `Reader` with the newest checkpoint of a run, and an empty memory of its size or of another one.

    The run's folder is enough: it holds the vocabulary. The reader is one row, so it uses the first `Mesh.model` local
    devices.

    Raises:
        InputError: naming what is missing or does not fit.
    """
    workdir = run_folder("--workdir", str(workdir))
    it = load_trained(workdir, gin_files, gin_params)
    it = it.with_memory_size(it.memory.size if memory_size is None else memory_size)
    tokens = open_vocabulary(workdir)
    segment, devices = it.batch.segment_length, jax.local_devices()[: it.mesh.model]
    mesh = open_mesh(MeshSettings(1, it.mesh.model), it.model, it.memory, segment, 1, devices=devices)
    parameters, step = restore(workdir, it.model, mesh)
    source = source_of(workdir, it.model, segment, tokens, parameters, step)
    return Reader(source, it.memory, parameters, tokens.vocabulary, it.folder, mesh, say)
