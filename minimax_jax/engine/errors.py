"""What can end a request. Each ends its own request and no other."""

from __future__ import annotations


class RequestError(RuntimeError):
    """A request could not be served to its end."""


class NonFiniteLogitsError(RequestError):
    """The logits after a request's token were not all finite, so that none could be chosen."""

    def __init__(self, position: int):
        super().__init__(f"the logits after token {position} of this request are not finite (NaN or infinity)")
        self.position = position


class DeviceStepError(RequestError):
    """The device failed a step in which this request had the most tokens."""

    def __init__(self, num_tokens: int, cause: Exception):
        text = (str(cause).splitlines() or [type(cause).__name__])[0]
        super().__init__(f"the device failed a step of {num_tokens} tokens, most of them this request's: {text}")
        self.__cause__ = cause


class DeviceLostError(RuntimeError):
    """The device failed a step, and then gave no fresh pages either: the engine ends."""

    def __init__(self, cause: Exception):
        text = (str(cause).splitlines() or [type(cause).__name__])[0]
        super().__init__(f"the device failed a step, and there are no pages on it any more: {text}")
        self.__cause__ = cause


class EngineClosedError(RequestError):
    """The engine was closed, or died, before the request was done."""
