"""vlmtune: one recipe file becomes a trained, exported and evaluated vision-language model."""

__version__ = "0.1.0"
