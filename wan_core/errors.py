"""The one exception that speaks to the user instead of to a programmer."""


class WanError(ValueError):
    """A mistake the user can mend: the message says what was found, what was expected and what to do.

    The command line prints it without a traceback; ComfyUI shows it on the node.
    """
