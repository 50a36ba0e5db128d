"""InputError: a user's mistake, in one line. NotFinite: training has diverged."""

import torch


class InputError(ValueError):
    """A user's mistake, as one line: `{file}:{line}: {what is wrong}; {what is accepted}`."""

    def __str__(self):
        text = super().__str__()
        return text if text.isprintable() else repr(text)[1:-1]  # of a name with a newline, say


class NotFinite(FloatingPointError):
    """Training has diverged: a number is not finite. `terms` are those of the loss, where known."""

    def __init__(self, message: str, terms: dict | None = None):
        super().__init__(message)
        self.terms = {name: float(torch.as_tensor(value).detach()) for name, value in (terms or {}).items()}


def check_finite(name: str, tensor, terms: dict | None = None) -> None:
    """Raises NotFinite where `tensor` holds a number that is not finite."""
    if not tensor.isfinite().all():
        raise NotFinite(f"{name} is {tensor.item() if tensor.numel() == 1 else 'not finite'}", terms)
