"""The Python standard library's source as a TFDS dataset.

Every machine that can run this project already holds this corpus (about 12 MB of code and prose),
so it needs no download. The split depends only on each file's relative path.
"""

import dataclasses
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

VALIDATION_ONE_IN = 20
_SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclasses.dataclass(eq=False)
class PythonLibraryConfig(tfds.core.BuilderConfig):
    """One library of Python source files.

    Attributes:
        root: Directory whose `.py` files are the documents.
    """

    root: str = ""


def interpreter_config() -> PythonLibraryConfig:
    """The config of the running interpreter, named after its exact version.

    The standard library changes between patch releases, so the name carries all three numbers.
    """
    major, minor, patch = sys.version_info[:3]
    return PythonLibraryConfig(
        name=f"{sys.implementation.name}_{major}_{minor}_{patch}",
        description=f"Standard library of {sys.implementation.name} {major}.{minor}.{patch}.",
        root=sysconfig.get_paths()["stdlib"],
    )


def source_paths(root: Path) -> list[Path]:
    """Relative paths of the library's modules, sorted, without tests and installed packages."""
    paths = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    return sorted(path for path in paths if not _SKIPPED_DIRECTORIES & set(path.parts[:-1]))


def is_validation(path: str) -> bool:
    """Whether a document belongs to the validation split, by the hash of its relative path."""
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest, "big") % VALIDATION_ONE_IN == 0


class Builder(tfds.core.GeneratorBasedBuilder):
    """Builds `python_library`: features `text` (a whole file) and `path` (relative to the root)."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Modules without tests; 5 % of the files are for validation."}
    BUILDER_CONFIGS = [interpreter_config()]

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {"text": tfds.features.Text(), "path": tfds.features.Text()}
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="The Python standard library's own source, one document per file.",
            features=features,
            homepage="https://docs.python.org/3/library/",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        return {
            "train": self._generate_examples(validation=False),
            "validation": self._generate_examples(validation=True),
        }

    def _generate_examples(self, validation: bool) -> Iterator[tuple[str, dict[str, str]]]:
        root = Path(self.builder_config.root)
        for path in source_paths(root):
            name = path.as_posix()
            if is_validation(name) != validation:
                continue
            try:
                text = (root / path).read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            if text:
                yield name, {"text": text, "path": name}
