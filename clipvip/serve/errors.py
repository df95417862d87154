"""Errors that the server answers with."""


class ApiError(Exception):
    """An error for the client: an HTTP status and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Busy(ApiError):
    """More work than the server takes on at once."""

    def __init__(self, sentence: str) -> None:
        super().__init__(503, sentence)
