"""Reads the tensors of a Hugging Face folder: safetensors files, one or several with an index, one tensor at a time.

Pickled weights (.bin, .pt) are rejected, because opening one runs the code in it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memorizing.errors import InputError

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = ("F32", "F16", "BF16")
_SHARD_BYTES = 5 << 30
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


class Tensors:
    """The tensors in the files of a folder, by name."""

    def __init__(self, folder: Path):
        self.folder = folder
        safetensors = _library()
        self._files: dict[str, Any] = {}
        for path in _files(folder):
            try:
                file = safetensors.safe_open(path, framework="numpy")
                names = list(file.keys())
            except Exception as error:  # SafetensorError, OSError
                raise InputError(f"{path} cannot be read ({error}). Fetch it again") from error
            for name in names:
                if name in self._files:
                    raise InputError(f"{folder}: the tensor {name} is in several files. Fetch the folder again")
                self._files[name] = file

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return self._files[name].get_slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in float32.

        Raises:
            InputError: if a number of it is NaN or infinite.
        """
        tensor = np.asarray(self._files[name].get_tensor(name)).astype(np.float32)
        if not np.isfinite(tensor).all():
            raise InputError(
                f"{self.folder}: the tensor {name} has {np.count_nonzero(~np.isfinite(tensor)):,} numbers that are NaN "
                "or infinite. Fetch the folder again, or export a checkpoint from before the training diverged"
            )
        return tensor

    def check_dtype(self, name: str) -> None:
        """Rejects dtypes that are not plain weights: quantized ones need scales, which are not read here."""
        if (dtype := self.dtype(name)) not in _DTYPES:
            raise InputError(
                f"{self.folder}: the tensor {name} is of {dtype}. Supported are {', '.join(_DTYPES)}. Save the model "
                "without quantization"
            )


def _library() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise InputError(
            "pretrained models need the extra `pretrained`, which is not installed. Run bash launch/setup.sh, or pip "
            "install safetensors tokenizers"
        ) from error
    return safetensors


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            names = sorted(
                {str(Path(name)) for name in json.loads((folder / INDEX).read_text())["weight_map"].values()}
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / INDEX} is damaged ({error}). Fetch it again") from error
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise InputError(f"{folder / INDEX} names {name}, which is not in that folder. Fetch it")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1 and (folder / WHOLE) not in found:
        raise InputError(f"{folder} has {len(found)} safetensors files and no {INDEX}. Fetch that too")
    if found:
        return [folder / WHOLE] if (folder / WHOLE) in found else found
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"{folder} has {', '.join(pickled[:3])} and no safetensors. Pickled files can run code when they are "
            "opened. Fetch the safetensors version, or save the model again with transformers' save_pretrained"
        )
    raise InputError(f"{folder} has no *.safetensors. Fetch the weights")


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one file, or shards of at most 5 GB with an index, as transformers does."""
    library = _library()
    shards: list[dict[str, np.ndarray]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        if held and held + tensor.nbytes > _SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = np.ascontiguousarray(tensor)
        held += tensor.nbytes
    names = [WHOLE] if len(shards) == 1 else [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        library.numpy.save_file(shard, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
