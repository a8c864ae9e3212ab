"""The one exception that means «the user can mend this»."""


class UserError(ValueError):
    """A mistake in what the user asked for.

    The message is one line: what is wrong, with the value, and what would be right. Command lines print it
    and exit with code 2; library callers see an ordinary ``ValueError``.
    """
