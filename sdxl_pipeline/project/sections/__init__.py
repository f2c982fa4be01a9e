"""The settings of `config.json` by what they are about; `sdxl_pipeline.project.training` puts them together."""
