"""The Python examples of the pages: cheap statements run, and the others name what exists."""

from __future__ import annotations

import ast
import inspect
import re
import typing

import pytest

import moe_jax as mj
from moe_jax import routing
from tests.docs.test_pages import PAGES

# Calls that train or need files; a statement with one of them is compared with signatures instead.
COSTLY = ("mj.train", "mj.load_hf", "mj.save_hf", "mj.open_run", "mj.reproduce", "mj.sweep")
COSTLY += ("mj.compare", "mj.explain", "mj.analyze")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page):
    return BLOCK.findall(page.read_text())


def call_of(statement):
    """The call of ``f(...)`` and of ``name = f(...)``; ``None`` for other statements."""
    value = getattr(statement, "value", None)
    return value if isinstance(value, ast.Call) else None


class Example:
    """The statements of one page, in one namespace.

    ``results`` holds the class of each variable that a costly call would set.
    """

    def __init__(self):
        self.namespace, self.results = {}, {}

    def run(self, statement):
        costly = self.costly(call_of(statement))
        if costly is None:
            code = compile(ast.Module([statement], []), "example", "exec")
            exec(code, self.namespace)
            return
        function, instance = costly
        call = call_of(statement)
        keywords = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(function).bind(*[None] * (len(call.args) + instance), **keywords)
        if isinstance(statement, ast.Assign):
            result = typing.get_type_hints(function)["return"]
            self.results[ast.unparse(statement.targets[0])] = result

    def costly(self, call):
        """The function of a costly call, and whether its first argument is an instance."""
        name = "" if call is None else ast.unparse(call.func)
        owner, _, attribute = name.rpartition(".")
        if name in COSTLY:
            return getattr(mj, attribute), False
        if owner in self.results:
            return getattr(self.results[owner], attribute), True
        return None


@pytest.mark.parametrize("page", filter(blocks, PAGES), ids=lambda page: page.name)
def test_examples_run(page):
    example, presets = Example(), list(routing.PRESETS)
    try:
        for block in blocks(page):
            for statement in ast.parse(block).body:
                example.run(statement)
            if "get_config" in example.namespace:
                # Later blocks of a page go on with the config of its first.
                config = example.namespace.setdefault("config", example.namespace["get_config"]())
                mj.experiment(config)
    finally:
        routing.PRESETS[:] = presets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_public_names_exist(page):
    names = set(re.findall(r"\bmj\.(\w+)", page.read_text()))
    assert names <= {*mj.__all__}


def test_a_costly_call_is_compared_with_its_signature():
    example = Example()
    good = "run = mj.train('quickstart', workdir='w')\nrun.evaluate()\nrun.generate('a', top_k=1)"
    for statement in ast.parse(good).body:
        example.run(statement)
    for wrong in ("mj.train('quickstart', wrokdir='w')", "run.generate()"):
        with pytest.raises(TypeError):
            example.run(ast.parse(wrong).body[0])


def test_the_api_page_has_every_public_name():
    text = next(page for page in PAGES if page.name == "api.md").read_text()
    assert {*re.findall(r"^::: moe_jax\.(\w+)$", text, re.MULTILINE)} == {*mj.__all__} - {
        "__version__"
    }
