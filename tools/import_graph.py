"""Print the import graph of the packages as a Mermaid diagram, or write it into docs/architecture.md.

    python -m tools.import_graph [--write]

An arrow leads from a package to one that it imports. Arrows that follow from others are left out (transitive reduction), so the
diagram shows the order of the layers. Imports within functions count too.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs/architecture.md"
ROOTS = ("sdxl_pipeline", "assets", "resources")
SPLIT = ("sdxl_pipeline.cache",)  # packages shown by their parts, which are in different layers
PROGRAMS = ("assets.summary",)  # loads the definitions, as a user's program does; no part of the assets
BEGIN, END = "<!-- import graph: python -m tools.import_graph --write -->", "<!-- end of import graph -->"

Graph = dict[str, set[str]]


def package_of(module: str) -> str:
    """Return the node of a dotted module: `assets`, `resources`, or the part of `sdxl_pipeline` that it belongs to."""
    names = module.split(".")
    if names[0] != "sdxl_pipeline":
        return names[0]
    return ".".join(names[1 : 3 if module.startswith(SPLIT) else 2])


def imports_of(file: Path, module: str) -> Iterator[str]:
    """Yield the dotted names that a module imports from this repository."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ROOTS and name != module)


def import_graph(repository: Path = REPOSITORY) -> Graph:
    """Return each package with the packages that it imports."""
    graph: Graph = {}
    for root in ROOTS:
        for file in sorted((repository / root).rglob("*.py")):
            module = ".".join(file.relative_to(repository).with_suffix("").parts).removesuffix(".__init__")
            if module in PROGRAMS or not (package := package_of(module)):
                continue
            imported = {package_of(name) for name in imports_of(file, module)}
            graph.setdefault(package, set()).update(imported - {package, ""})
    return {package: imported & graph.keys() for package, imported in graph.items()}


def reachable(graph: Graph, start: str) -> set[str]:
    """Return all packages that `start` imports, directly or not."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for package in graph[waiting.pop()] - found:
            found.add(package)
            waiting.append(package)
    return found


def reduced(graph: Graph) -> Graph:
    """Return the graph without edges that follow from others. Raise ValueError if packages import each other in a cycle."""
    below = {package: reachable(graph, package) for package in graph}
    if cycles := sorted(package for package in graph if package in below[package]):
        raise ValueError(f"packages import each other in a cycle: {', '.join(cycles)}")
    return {
        package: {name for name in imported if not any(name in below[other] for other in imported)}
        for package, imported in graph.items()
    }


def mermaid(graph: Graph) -> str:
    """Return the diagram as Mermaid text."""
    lines = [
        f"  {package} --> {name}" for package, imported in sorted(graph.items()) for name in sorted(imported)
    ]
    return "\n".join(["```mermaid", "graph TD", *lines, "```"])


def main() -> int:
    """Print the diagram; with --write, replace the one in docs/architecture.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"replace the diagram in {PAGE.name}")
    diagram = mermaid(reduced(import_graph()))
    if not parser.parse_args().write:
        sys.stdout.write(f"{diagram}\n")
        return 0
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(pattern.sub(f"{BEGIN}\n{diagram}\n{END}", text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
