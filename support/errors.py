"""InputError: a user's mistake, in one line. NotFinite: training has diverged."""


class InputError(ValueError):
    """A user's mistake, as one line: `{file}:{line}: {what is wrong}; {what is accepted}`."""

    def __str__(self):
        text = super().__str__()
        return text if text.isprintable() else repr(text)[1:-1]  # of a name with a newline, say


class TooLong(InputError):
    """A text with more tokens than the model's context has room for."""


class NotFinite(FloatingPointError):
    """A number that training needs is not finite."""


def check_finite(name: str, tensor) -> None:
    """Raises NotFinite where `tensor` holds a number that is not finite."""
    if not tensor.isfinite().all():
        raise NotFinite(f"{name} is {tensor.item() if tensor.numel() == 1 else 'not finite'}")
