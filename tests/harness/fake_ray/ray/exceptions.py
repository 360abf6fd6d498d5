"""The errors of Ray that are told apart."""

from __future__ import annotations


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class ActorDiedError(RayError):
    pass
