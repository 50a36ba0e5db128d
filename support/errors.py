"""InputError: a user's mistake, in one line. NotFinite: training has diverged."""

import torch


class InputError(ValueError):
    """A user's mistake, as one line: `{file}:{line}: {what is wrong}; {what is accepted}`."""

    def __str__(self):
        text = super().__str__()
        return text if text.isprintable() else repr(text)[1:-1]  # of a name with a newline, say


class NotFinite(FloatingPointError):
    """A number that training needs is not finite."""


def check_finite(name: str, tensor, terms: dict | None = None) -> None:
    """Raises NotFinite where `tensor` holds a number that is not finite; names the terms at fault."""
    if tensor.isfinite().all():
        return
    values = {term: torch.as_tensor(value) for term, value in (terms or {}).items()}
    broken = [term for term, value in values.items() if not value.isfinite().all() and term != "loss"]
    where = f", and so {'is' if len(broken) == 1 else 'are'} {', '.join(broken)}" if broken else ""
    raise NotFinite(f"{name} is {tensor.item() if tensor.numel() == 1 else 'not finite'}{where}")
