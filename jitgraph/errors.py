"""Typed errors. Every message is one sentence that says what is wrong and what to do about it.

No torch. A ``JitgraphError`` is the user's to mend, so the command line prints its message alone and exits
with code 2; anything else is a defect of this project and shows its traceback.
"""

from __future__ import annotations


class JitgraphError(Exception):
    """Base of all errors a user can mend."""


class ConfigError(JitgraphError):
    """A setting, or a combination of settings, that cannot work."""


class CheckpointError(JitgraphError):
    """A checkpoint that is missing, damaged or contradicts its own configuration."""


class UnsupportedModelError(CheckpointError):
    """A model family or feature outside the native decoder; the message names what is supported."""


class RequestError(JitgraphError):
    """A request that is malformed: empty prompt, ids out of the vocabulary, a temperature below zero."""


class CapacityError(RequestError):
    """A request or configuration that can never fit; the message carries the figure that would."""


class DeviceError(JitgraphError):
    """The device asked for is absent or cannot run what was asked."""


class CompileError(DeviceError):
    """A kernel that does not compile for the device, or that was to be compiled where strictness forbids it."""


class OutputError(JitgraphError):
    """A file or folder that cannot be written."""
