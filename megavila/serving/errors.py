"""The one error that a client sees, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from megavila.runtime.errors import MegavilaError


class ApiError(MegavilaError):
    """A request that gets no answer.

    Attributes:
        status: the HTTP status.
        message: what is wrong and what to do about it.
        param: the field of the request that it is about.
        code: a name for programs to look at.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }


def invalid(param: str, message: str) -> ApiError:
    """Status 400 about a field; `message` goes on after its name."""
    return ApiError(400, f"{param}: {message}", param=param)
