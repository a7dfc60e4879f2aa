"""sftflow: base checkpoint -> chat format -> task mixture -> SFT -> evaluation -> comparison -> serving."""

__version__ = "0.1.0"
