"""Tests of the import graph: packages, cycles, transitive reduction, and the diagram in docs/architecture.md."""

from graphlib import TopologicalSorter

import pytest

from tools.import_graph import (
    BEGIN,
    END,
    PAGE,
    REPOSITORY,
    ROOTS,
    import_graph,
    imports_of,
    mermaid,
    package_of,
    reduced,
)


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("assets.lora", "assets"),
        ("sdxl_pipeline", ""),
        ("sdxl_pipeline.hub_client", "hub_client"),
        ("sdxl_pipeline.training.optim.ema", "training"),
        ("sdxl_pipeline.cache.store.shards", "cache.store"),
        ("sdxl_pipeline.cache.prune", "cache.prune"),
    ],
)
def test_package_of_module_is_its_node(module, package):
    assert package_of(module) == package


def test_imports_of_both_forms_and_nested_imports_are_found(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import torch\nimport sdxl_pipeline.files.digest\nfrom assets import lora\n"
        "def f():\n    from sdxl_pipeline.config.loader import Project\n",
        encoding="utf-8",
    )
    assert {*imports_of(file, "sdxl_pipeline.module")} == {
        "sdxl_pipeline.files.digest",
        "assets.lora",
        "sdxl_pipeline.config.loader.Project",
    }


def test_reduced_edges_that_follow_from_others_are_left_out():
    graph = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set()}
    assert reduced(graph) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set()}


def test_reduced_cycle_raises_with_its_packages():
    with pytest.raises(ValueError, match="cycle: a, b"):
        reduced({"a": {"b"}, "b": {"a"}, "c": {"a"}})


def test_import_graph_training_does_not_import_stages_or_assets():
    graph = import_graph()
    assert {"models", "runtime", "cache.store"} <= graph["training"]
    assert not graph["training"] & {"stages", "release", "evaluation", "assets", "resources", "cli"}


def test_architecture_page_has_the_current_diagram():
    text = PAGE.read_text(encoding="utf-8")
    written = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert written == mermaid(reduced(import_graph())), "run: python -m tools.import_graph --write"


def test_modules_have_no_import_cycle():
    """Imports within functions count too. `prepare` raises CycleError with the modules of a cycle."""
    files = {
        ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): file
        for root in ROOTS
        for file in (REPOSITORY / root).rglob("*.py")
    }
    imports = {
        module: {
            name if name in files else name.rpartition(".")[0]
            for name in imports_of(file, module)
            if name in files or name.rpartition(".")[0] not in ("", module)
        }
        for module, file in files.items()
    }
    assert len(imports) > 200
    TopologicalSorter(imports).prepare()
