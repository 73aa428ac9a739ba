"""The version, where every room may read it without reading the whole package."""

__version__ = "0.1.0"
