"""The Python standard library's source as a TFDS dataset.

Every machine that can run this project already holds this corpus (about 10 MB of code and prose),
so it needs no download. The split depends only on each file's relative path. Modules that are
tables (`is_table`) are left out: codecs, Unicode, HTML entities and help texts are a fifth of the
library, and a model that meets them in a row learns numbers instead of Python.
"""

import ast
import dataclasses
import hashlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

VALIDATION_ONE_IN = 20
_SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
# Nodes of an expression that names, builds and combines values, and decides nothing.
_VALUES = (
    ast.Attribute,
    ast.BinOp,
    ast.Call,
    ast.Constant,
    ast.Dict,
    ast.List,
    ast.Name,
    ast.Set,
    ast.Starred,
    ast.Tuple,
    ast.UnaryOp,
    ast.expr_context,
    ast.keyword,
    ast.operator,
    ast.unaryop,
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


def is_validation(path: str, one_in: int = VALIDATION_ONE_IN) -> bool:
    """Whether a document belongs to the validation split, by the hash of its relative path."""
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest, "big") % one_in == 0


def is_table(text: str) -> bool:
    """Whether more than half of a module is data: statements of its top level that list constants.

    Args:
        text: The module; one that this interpreter cannot parse is no table.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            statements = ast.parse(text).body
    except (SyntaxError, ValueError):
        return False
    lines = text.splitlines(keepends=True)
    listed = (node for node in statements if _lists_constants(node))
    length = sum(len("".join(lines[node.lineno - 1 : node.end_lineno])) for node in listed)
    return 2 * length > len(text)


def _lists_constants(statement: ast.stmt) -> bool:
    """Whether a statement assigns, or calls something with, constants; a docstring does not."""
    if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr):
        return False
    if statement.value is None or isinstance(statement, ast.Expr) and _is_constant(statement.value):
        return False
    nodes = list(ast.walk(statement.value))
    return any(map(_is_constant, nodes)) and all(isinstance(node, _VALUES) for node in nodes)


def _is_constant(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant)


class Builder(tfds.core.GeneratorBasedBuilder):
    """Builds `python_library`: features `text` (a whole file) and `path` (relative to the root)."""

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {
        "2.0.0": "Without tables: modules of which more than half lists constants.",
        "1.0.0": "Modules without tests; 5 % of the files are for validation.",
    }
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
            if text and not is_table(text):
                yield name, {"text": text, "path": name}
