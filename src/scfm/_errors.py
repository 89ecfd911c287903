"""Exceptions that users may want to catch by name."""

from __future__ import annotations


class UnsupportedError(NotImplementedError):
    """A model was asked for something its architecture cannot give; the message names models that can."""


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, belongs to another model, or does not fit the network key by key."""


class OfflineError(ConnectionError):
    """A file is needed from the network while scfm is offline; the message says which file to put where."""


class LicenseError(PermissionError):
    """The weights carry a licence that has to be accepted before they are downloaded."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message holds the pip command."""
