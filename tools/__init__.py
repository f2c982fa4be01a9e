"""Tools for developers of this project: vocabulary check, import graph, training of the bundled model."""
