"""The King James Bible as a task: predict each next character."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import torch

from experiments.config_errors import ConfigError
from experiments.loaders import Examples
from experiments.tasks import Task, check_sizes
from experiments.whole_files import written_whole

READER = "bible"  # of Debian's package bible-kjv; the package bible-kjv-text brings it and its data
WHOLE = "Gen1:1-Rev22:21"
REFERENCE = re.compile(r"^\S+ ", re.MULTILINE)  # "Ge1:1 " before each verse
CACHE = "king_james.txt"


def king_james(
    root: str = "data",
    context: int = 64,
    train_size: int = 20_000,
    validation_size: int = 200,
    test_size: int = 1000,
    split_seed: int = 0,
) -> Task:
    """Pieces of the text, each one character longer than `context`; no two of them overlap.

    Args:
        root: a folder where the text is kept once it has been read.
        context: characters in one example.
        train_size: training examples.
        validation_size: validation examples.
        test_size: test examples.
        split_seed: of the split.

    Returns:
        The task: inputs `(n, context)` and targets `(n, context)`, both character numbers; its
        classes are the characters.

    Raises:
        FileNotFoundError: if the text is neither there nor to be read from the Debian package.
        ConfigError: for a size below 1, or if the sizes ask for more than there is.
    """
    check_sizes(
        context=context,
        train_size=train_size,
        validation_size=validation_size,
        test_size=test_size,
    )
    text = read_text(Path(root))
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    codes = torch.tensor([number[character] for character in text])
    pieces = codes[: len(codes) // (context + 1) * (context + 1)].view(-1, context + 1)
    sizes = [train_size, validation_size, test_size]
    if sum(sizes) > len(pieces):
        raise ConfigError(
            f"`task.train_size`, `task.validation_size` and `task.test_size` do not fit the text. "
            f"Got {sum(sizes)} examples in all, and there are {len(pieces)}."
        )
    generator = torch.Generator().manual_seed(split_seed)
    order = torch.randperm(len(pieces), generator=generator)[: sum(sizes)].split(sizes)
    parts = (Examples(pieces[part, :-1], pieces[part, 1:]) for part in order)
    train, validation, test = parts
    return Task(train, validation, test, classes=len(characters))


def read_text(root: Path) -> str:
    """The text, one verse a line, from `root` or from the Debian package.

    Args:
        root: where a copy is kept.

    Returns:
        About four million characters.

    Raises:
        FileNotFoundError: if there is no copy and no package.
    """
    copy = root / CACHE
    if not copy.is_file():
        if shutil.which(READER) is None:
            raise FileNotFoundError(
                f"No King James text. Got `{root}`, but there is no {copy}. "
                "Install Debian's package `bible-kjv-text`, or put the text there."
            )
        command = [READER, "-f", WHOLE]
        verses = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        root.mkdir(parents=True, exist_ok=True)
        with written_whole(copy) as unfinished:
            unfinished.write_text(REFERENCE.sub("", verses))
    return copy.read_text()
