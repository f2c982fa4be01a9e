"""The release of a trained model: file formats, model card and the checks before publication."""
