"""A language model that comes as one GGUF file, unpacked once into the folder that everything else reads."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vlmtune.config.locate import packaged
from vlmtune.config.lock import file_hash
from vlmtune.errors import CheckpointError

logger = logging.getLogger(__name__)

CACHE = Path(".cache/vlmtune/gguf")


def unpacked(name: str, cache: Path = CACHE) -> str:
    """A folder with safetensors and tokenizer for a `.gguf` file; any other name as it is.

    Dequantised weights are kept in bfloat16, which holds them as well as their 4 to 8 bits did. The folder is
    named by the file's hash and written aside first, so an interrupted conversion leaves nothing behind.
    Raises CheckpointError when the file is missing or not readable.
    """
    if not name.endswith(".gguf"):
        return name
    file = packaged(name)
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}", name, "Check the path.")
    folder = cache / f"{file.stem}-{file_hash(file)[:16]}"
    if not folder.exists():
        logger.info("unpacking %s (once; about 20 seconds for 135 million weights)", file.name)
        _unpack(file, folder, name)
    return str(folder)


def _unpack(file: Path, folder: Path, name: str) -> None:
    from transformers import GgufConfig

    source = {"gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        # Without dequantize the model can neither be trained nor saved.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **source
        )
    except (ImportError, OSError, ValueError, KeyError) as error:
        remedy = 'It needs the package gguf: pip install "vlmtune[gguf]".'
        raise CheckpointError(f"cannot read {file.name}: {error}", name, remedy) from error
    aside = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if folder.exists():  # another process was faster
        shutil.rmtree(aside)
    else:
        os.replace(aside, folder)
